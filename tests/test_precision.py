"""Formats, layers, and the search over mixes where only bytes count: against NNCF, and against all mixes there are."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from edgert.converters.compress import compress, to_fp16
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cost import block, chain
from tiny_models import exported

from edgert.errors import PlanError, UsageError
from edgert.graph import BlockGraph, BlockKind
from edgert.irgraph import make_names_unique
from edgert.npu.recipe import GROUP_SIZES
from edgert.partition import annotate
from edgert.precision import FORMATS, Format, Layer, Mix, Option, Problem, fill, front, named, random_mixes, solve
from edgert.precision.formats import NPU_GROUP_SIZES
from edgert.precision.hull import Table
from edgert.precision.layers import bits_per_weight, graph_with, mix_bytes, mix_loss, recipe_only

F16, INT8, SYM32, PC = (named(name) for name in ("f16", "int8", "int4-sym-g32", "int4-sym-pc"))
SEEDS = st.integers(0, 10**6)
SHAPES = ((64, 256), (256, 64), (96, 96), (33, 160))


def layers_of(rng: np.random.Generator, count: int, options: int) -> tuple[Layer, ...]:
    """Layers of block 1, with random options besides f16, whose loss is random too, now and then 0."""
    found = []
    for number in range(count):
        shape = SHAPES[rng.integers(len(SHAPES))]
        fitting = [kind for kind in FORMATS[1:] if kind.fits(shape)]
        chosen = rng.choice(len(fitting), size=min(options - 1, len(fitting)), replace=False)
        losses = rng.choice([0.0, 1.0], len(chosen), p=[0.1, 0.9]) * rng.lognormal(-5, 2, len(chosen))
        kinds = zip([fitting[k] for k in chosen], losses, strict=True)
        held = (Option(F16, 0.0), *(Option(kind, float(loss)) for kind, loss in kinds))
        found.append(Layer(f"layer {number}", "linear", (1,), shape, held))
    return tuple(found)


def graph_of(layers: tuple[Layer, ...]) -> BlockGraph:
    size = sum(2 * layer.elements for layer in layers)
    blocks = [block(0, BlockKind.EMBED), block(1, weight_bytes={"f16": size, "f32": 40}), block(2, BlockKind.HEAD)]
    return chain(blocks, 64)


def problem_of(seed: int, count: int = 4, options: int = 4) -> Problem:
    layers = layers_of(np.random.default_rng(seed), count, options)
    return Problem(layers, graph_of(layers))


def every_mix(problem: Problem) -> list[tuple[float, int]]:
    """Loss and bytes of all mixes there are."""
    ways = itertools.product(*[[option.format for option in layer.options] for layer in problem.layers])
    mixes: list[Mix] = [dict(zip((la.name for la in problem.layers), way, strict=True)) for way in ways]
    return [(mix_loss(problem.layers, mix), mix_bytes(problem.layers, mix)) for mix in mixes]


def test_what_suits_an_npu_is_what_its_recipe_says() -> None:
    assert NPU_GROUP_SIZES == GROUP_SIZES
    assert [kind.name for kind in FORMATS if kind.npu] == ["f16", "int8", "int4-sym-g128", "int4-sym-pc"]


def test_formats_have_names() -> None:
    assert len(FORMATS) == 10
    for kind in FORMATS:
        assert named(kind.name) is kind
    with pytest.raises(UsageError, match=r"format 'int3' is not known; known: f16, int8, int4-asym-g32"):
        named("int3")


@pytest.mark.parametrize(
    ("shape", "names"),
    [
        ((8, 256), ["f16", "int8", *(f"int4-{k}-{g}" for k in ("asym", "sym") for g in ("g32", "g64", "g128", "pc"))]),
        ((8, 64), ["f16", "int8", "int4-asym-g32", "int4-asym-pc", "int4-sym-g32", "int4-sym-pc"]),
        ((8, 96), ["f16", "int8", "int4-asym-g32", "int4-asym-pc", "int4-sym-g32", "int4-sym-pc"]),
        ((8, 20), ["f16", "int8", "int4-asym-pc", "int4-sym-pc"]),
        ((4, 8, 64), ["f16", "int8", "int4-asym-g32", "int4-asym-pc", "int4-sym-g32", "int4-sym-pc"]),
    ],
)
def test_a_group_divides_the_input_dimension_and_is_smaller(shape: tuple[int, ...], names: list[str]) -> None:
    assert [kind.name for kind in FORMATS if kind.fits(shape)] == names


def test_bytes_by_hand() -> None:
    assert F16.weight_bytes((3, 5)) == {"f16": 30}
    assert INT8.weight_bytes((3, 5)) == {"u8": 15 + 3, "f16": 6}
    assert PC.weight_bytes((3, 5)) == {"i4": 8, "f16": 6}
    assert named("int4-asym-pc").weight_bytes((3, 5)) == {"u4": 8 + 2, "f16": 6}
    assert SYM32.weight_bytes((3, 64)) == {"i4": 96, "f16": 12}
    assert INT8.weight_bytes((2, 3, 5)) == {"u8": 30 + 6, "f16": 12}
    assert PC.weight_bytes((2, 3, 5)) == {"i4": 15, "f16": 12}
    assert SYM32.weight_bytes((2, 3, 64)) == {"i4": 192, "f16": 24}
    assert named("int4-asym-g32").weight_bytes((3, 64)) == {"u4": 96 + 3, "f16": 12}
    with pytest.raises(UsageError, match=r"format int4-sym-g32: a matrix of shape \[3, 33\] cannot be stored so"):
        SYM32.weight_bytes((3, 33))


ATTENTION, FFN = ((64, 64), (32, 64), (32, 64), (64, 64)), ((128, 64), (128, 64), (64, 128))
WIDE_HEADS = ((128, 64), (64, 64), (64, 64), (64, 128))
EXPERTS = ((4, 64, 64),) * 3  # the router is left alone


@pytest.mark.parametrize(
    ("family", "name", "options"),
    [
        ("llama", "int8", {"weights": "int8"}),
        ("llama", "int4-asym-g32", {"weights": "int4", "group_size": 32}),
        ("llama", "int4-sym-g32", {"weights": "int4", "group_size": 32, "sym": True}),
        ("llama", "int4-sym-pc", {"weights": "int4", "group_size": -1, "sym": True}),
        ("qwen3_moe", "int8", {"weights": "int8"}),
        ("qwen3_moe", "int4-asym-g32", {"weights": "int4", "group_size": 32}),
    ],
)
def test_blocks_are_as_large_as_nncf_makes_them(family: str, name: str, options: dict[str, object]) -> None:
    model, compressed = exported(family)[1], exported(family)[1]
    for one in (model, compressed):
        to_fp16(one)
    compressed = compress(compressed, **options)  # type: ignore[arg-type]
    for one in (model, compressed):
        make_names_unique(one)
    matrices = (ATTENTION, FFN) if family == "llama" else (WIDE_HEADS, EXPERTS)
    shapes = [((256, 64),), *matrices, *matrices, ((256, 64),)]
    layers = tuple(
        Layer(f"{index}.{number}", "linear", (index,), shape, (Option(F16, 0.0),))
        for index, held in enumerate(shapes)
        for number, shape in enumerate(held)
    )
    kind = named(name)
    mix = {layer.name: kind if 0 < layer.blocks[0] < 5 else INT8 for layer in layers}
    found = graph_with(annotate(model), layers, mix)
    assert [b.weight_bytes for b in found.blocks] == [b.weight_bytes for b in annotate(compressed).blocks]


def test_a_tied_table_is_in_both_blocks_and_counts_once() -> None:
    table = Layer("table", "embedding+head", (0, 2), (64, 32), (Option(F16, 0.0), Option(INT8, 0.1)))
    blocks = [block(0, BlockKind.EMBED, weight_bytes={"f16": 4096}), block(1, weight_bytes={"f32": 7})]
    graph = chain([*blocks, block(2, BlockKind.HEAD, weight_bytes={"f16": 4096, "f32": 8})])
    found = graph_with(graph, (table,), {"table": INT8})
    small = {"u8": 2048 + 64, "f16": 128}
    assert [b.weight_bytes for b in found.blocks] == [small, {"f32": 7}, {**small, "f32": 8}]
    assert mix_bytes((table,), {"table": INT8}) == 2048 + 64 + 128
    assert bits_per_weight((table,), {"table": INT8}) == 8 + 3 * 8 / 32
    assert found.edges == graph.edges
    assert graph_with(graph, (table,), {"table": F16}) == graph


def test_layers_that_make_no_sense() -> None:
    good = Layer("a", "linear", (1,), (8, 64), (Option(F16, 0.0), Option(SYM32, 0.5)))
    for changes, message in (
        ({"role": "tail"}, "layer a: role is 'tail', expected one of embedding, head"),
        ({"blocks": ()}, r"layer a: blocks are \[\], expected ascending numbers"),
        ({"blocks": (2, 1)}, r"layer a: blocks are \[2, 1\]"),
        ({"options": ()}, "layer a: 0 options, expected one or more"),
        (
            {"options": (Option(F16, 0.0), Option(F16, 0.1))},
            "layer a: 2 options, expected one or more, no format twice",
        ),
        ({"shape": (8, 20)}, r"layer a: int4-sym-g32 does not fit its shape \[8, 20\]"),
        ({"options": (Option(F16, -0.1),)}, "layer a: the loss of f16 is -0.1, expected 0 or more"),
        ({"options": (Option(F16, float("nan")),)}, "layer a: the loss of f16 is nan"),
    ):
        with pytest.raises(UsageError, match=message):
            replace(good, **changes)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="layer a: block 1 of the graph does not hold it in f16"):
        graph_with(chain([block(0), block(1, weight_bytes={"f16": 1000})]), (good,), {"a": F16})
    graph = graph_of((good,))
    with pytest.raises(UsageError, match="layers: 1 names are there twice, the first is a"):
        Problem((good, good), graph)
    with pytest.raises(PlanError, match="layer a: it is of block 3, the graph has 3"):
        Problem((replace(good, blocks=(3,)),), graph)
    with pytest.raises(UsageError, match="layer a: 0 options"):
        recipe_only((replace(good, options=good.options[1:]),))
    assert [o.format for o in recipe_only((good,))[0].options] == [F16]


@settings(deadline=None, max_examples=40)
@given(seed=SEEDS, exponent=st.floats(3, 9))
def test_no_mix_is_better_for_a_price(seed: int, exponent: float) -> None:
    problem, price = problem_of(seed), 10**exponent
    found = solve(problem, price)
    assert found.value + price * found.loss <= min(size + price * loss for loss, size in every_mix(problem)) * (
        1 + 1e-9
    )
    assert found.bytes == found.value == mix_bytes(problem.layers, found.mix)
    assert found.loss == mix_loss(problem.layers, found.mix)
    assert (found.unit, found.plan, found.prediction, found.recipe) == ("bytes", None, None, ())


@settings(deadline=None, max_examples=30)
@given(seed=SEEDS)
def test_no_mix_is_below_the_front(seed: int) -> None:
    problem = problem_of(seed)
    found, others = front(problem, 1000), np.array(every_mix(problem))
    losses, values = np.array([one.loss for one in found]), np.array([one.value for one in found])
    assert (np.diff(losses) > 0).all()
    assert (np.diff(values) < 0).all()
    assert losses[0] == others[:, 0].min()
    assert values[-1] == others[:, 1].min()
    inside = others[(others[:, 0] >= losses[0]) & (others[:, 0] <= losses[-1])]
    assert (inside[:, 1] >= np.interp(inside[:, 0], losses, values) * (1 - 1e-9)).all()
    for one in found:  # corners are mixes, and as large as they say
        assert (one.loss, one.bytes) in set(every_mix(problem))
    few = front(problem, 3)
    assert len(few) <= 3
    assert {one.bytes for one in few} >= {found[0].bytes, found[-1].bytes}


@settings(deadline=None, max_examples=40)
@given(seed=SEEDS, part=st.floats(0, 1))
def test_a_budget_is_kept_and_used(seed: int, part: float) -> None:
    problem = problem_of(seed, 5)
    corners = front(problem, 1000)
    budget = corners[0].loss + part * (corners[-1].loss - corners[0].loss)
    found = fill(problem, budget)
    assert found.loss <= budget
    assert found.value <= min(one.value for one in corners if one.loss <= budget)
    # No single exchange saves anything.
    for layer in problem.layers:
        for option in layer.options:
            mix = found.mix | {layer.name: option.format}
            assert mix_loss(problem.layers, mix) > budget or mix_bytes(problem.layers, mix) >= found.bytes


def test_a_budget_is_nearly_filled() -> None:
    shares = []
    for seed in range(12):
        problem = problem_of(seed, 6)
        budget = 0.3 * front(problem, 1000)[-1].loss
        least = min(size for loss, size in every_mix(problem) if loss <= budget)
        shares.append(fill(problem, budget).value / least)
    assert min(shares) >= 1
    assert np.mean(shares) < 1.02


def test_no_budget_below_the_most_exact_mix() -> None:
    layer = Layer("a", "linear", (1,), (8, 64), (Option(INT8, 0.25), Option(SYM32, 0.5)))
    problem = Problem((layer,), graph_of((layer,)))
    assert fill(problem, 0.25).mix == {"a": INT8}
    for budget in (0.2, -1.0, float("nan")):
        with pytest.raises(UsageError, match=r"nats a token, the least that these layers reach is 0\.25"):
            fill(problem, budget)


def test_among_equals_the_more_exact() -> None:
    asym, sym = named("int4-asym-g32"), SYM32
    odd = (2, 64)  # the zero points of its four groups are two bytes: at that price of the loss they pay
    saved = asym.total_bytes(odd) - sym.total_bytes(odd)
    layer = Layer("a", "linear", (1,), odd, (Option(sym, 0.5), Option(asym, 0.25)))
    problem = Problem((layer,), graph_of((layer,)))
    assert solve(problem, saved / 0.25).mix == {"a": asym}
    assert solve(problem, 0.99 * saved / 0.25).mix == {"a": sym}


def test_options_that_are_no_corner_are_no_step() -> None:
    # The second lies above the line from the first to the third, the last is dearer and worse than the third.
    table = Table(np.array([[10.0, 9.0, 4.0, 5.0]]), np.array([[0.0, 1.0, 2.0, 3.0]]))
    assert table.walk.options.tolist() == [2]
    assert table.walk.prices.tolist() == [3.0]
    assert table.fill(1.5).tolist() == [1]
    assert table.fill(5.0).tolist() == [2]


def test_random_mixes_are_spread_and_differ() -> None:
    problem = problem_of(3, 40, 6)
    found = random_mixes(problem, 30, seed=5, lo=1e-3, hi=0.3)
    losses = np.array([mix_loss(problem.layers, mix) for mix in found])
    assert len({tuple(mix.values()) for mix in found}) == 30
    wanted = np.geomspace(1e-3, 0.3, 31)
    near = (losses > 0.8 * wanted[:-1]) & (losses < 1.25 * wanted[1:])
    assert near.mean() > 0.8  # small losses are far apart
    assert random_mixes(problem, 30, seed=5, lo=1e-3, hi=0.3) == found
    assert random_mixes(problem, 30, seed=6, lo=1e-3, hi=0.3) != found
    # They are no walk along the front: of two, the larger one is often the worse one.
    sizes = np.array([mix_bytes(problem.layers, mix) for mix in found])
    assert (np.diff(sizes[np.argsort(losses)]) > 0).any()


def test_random_mixes_of_few_layers() -> None:
    layer = Layer("a", "linear", (1,), (8, 64), (Option(F16, 0.0), Option(INT8, 0.01)))
    problem = Problem((layer,), graph_of((layer,)))
    found = random_mixes(problem, 10, seed=0, lo=1e-4, hi=1.0)
    assert {mix["a"] for mix in found} <= {F16, INT8}
    assert len(found) == len({mix["a"] for mix in found})
    for lo, hi in ((0.0, 1.0), (2.0, 1.0), (1.0, float("inf"))):
        with pytest.raises(UsageError, match="losses of random mixes are"):
            random_mixes(problem, 3, 0, lo, hi)


def test_what_is_asked_wrongly() -> None:
    problem = problem_of(0)
    for price in (-1.0, float("nan"), float("inf")):
        with pytest.raises(UsageError, match=f"price is {price}, expected a finite number"):
            solve(problem, price)
    with pytest.raises(UsageError, match="points is 1, the least is 2"):
        front(problem, 1)


def test_a_model_without_layers() -> None:
    problem = Problem((), graph_of(()))
    assert [one.bytes for one in front(problem)] == [0]
    assert solve(problem, 1.0).mix == fill(problem, 0.0).mix == {}
    assert isinstance(named("f16"), Format)
