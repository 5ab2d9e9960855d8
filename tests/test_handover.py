"""Keys and values change hands: between the devices of the phases, through files, from any configuration to any."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest

import edgert
from edgert.backends.base import Array
from edgert.backends.openvino import OpenVinoBackend, OpenVinoRunner
from edgert.device import DeviceConfig
from edgert.engine import Engine
from edgert.errors import BundleError, UsageError
from edgert.executor import Executor, SequenceRun
from edgert.kvcache import KvCache, trim
from edgert.placement import Placement, Plan
from edgert.results import Clock
from edgert.session import Model
from edgert.shapes import StaticShapes

SHAPES = StaticShapes((16,), (64, 256))
CONFIGS = ("CPU@f32", "CPU@f32+dq", "CPU@bf16", "CPU@f32+static", "SIM@f16")
EXACT = {"CPU@f32", "CPU@f32+static"}  # as the reference computes; the others round somewhere
# Each with the reference in both directions, and some pairs that know nothing of each other.
PAIRS = [
    *((name, "CPU@f32") for name in CONFIGS[1:]),
    *(("CPU@f32", name) for name in CONFIGS[1:]),
    ("CPU@f32+static", "CPU@f32+dq"),
    ("CPU@f32+dq", "CPU@f32+static"),
    ("SIM@f16", "CPU@bf16"),
]


@cache
def available() -> frozenset[str]:
    return frozenset(str(config) for info in edgert.devices() for config in info.configs)


def need(*names: str) -> None:
    for name in names:
        if name not in available():
            pytest.skip(f"{name} is not available here")


@pytest.fixture(scope="module")
def loaded(demo_path: Path, demo: Model) -> Callable[[str], Model]:
    """The demo model on one configuration, compiled once, without any cache."""
    made: dict[str, Model] = {"CPU@f32": demo}

    def make(name: str) -> Model:
        need(name)
        if name not in made:
            made[name] = edgert.load(demo_path, device=name, static_shapes=SHAPES)
        made[name].release()
        return made[name]

    return make


def same(found: Array, expected: Array, names: set[str]) -> None:
    """Logits: within rounding of f32 on the exact configurations, of the same form on the others."""
    if names <= EXACT:
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)
    else:
        assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] >= 0.999


def conversation(model: Model, tokens: list[int]) -> Array:
    """Logits of a prompt, of single tokens, of a further prompt, and of single tokens after it: 70 tokens."""
    run = model._engine.executor.open()
    logits: list[Array] = []
    for part in (tokens[:40], *([t] for t in tokens[40:46]), tokens[46:66], *([t] for t in tokens[66:70])):
        found = run.forward(part) if len(part) == 1 else run.prefill(part, chunk=16)
        assert found is not None
        logits.append(found.copy())
    assert run.tokens == tokens[:70]
    return np.concatenate(logits)


@pytest.fixture(scope="module")
def expected(demo: Model, book: list[int]) -> Array:
    return conversation(demo, book)


@pytest.mark.parametrize(("prefill", "decode"), PAIRS)
def test_prefill_here_and_decode_there(
    demo_path: Path, demo: Model, book: list[int], expected: Array, prefill: str, decode: str
) -> None:
    """There, and back for the second prompt, and there again; over a bucket's end where there are buckets."""
    need(prefill, decode)
    model = edgert.load(demo_path, place=f"prefill:*={prefill},decode:*={decode}", static_shapes=SHAPES)
    same(conversation(model, book), expected, {prefill, decode})
    first = model.generate(book[:40], max_tokens=8)
    assert first.timings.handover_us > 0
    assert first.timings.reused_tokens == 0
    second_prompt = [*book[:40], *first.tokens, *book[100:120]]
    second = model.generate(second_prompt, max_tokens=8)
    assert second.timings.handover_us > 0
    assert second.timings.reused_tokens == 47  # the last token of the first answer was never run
    if {prefill, decode} <= EXACT:
        assert first.tokens == demo.generate(book[:40], max_tokens=8).tokens
        assert second.tokens == demo.generate(second_prompt, max_tokens=8).tokens


def test_blocks_of_a_phase_may_be_apart(demo_path: Path, book: list[int], expected: Array) -> None:
    """Submodels with other limits in either phase."""
    place = "prefill:*=CPU@f32,prefill:attention=CPU@f32+static,decode:*=SIM@f32,decode:3-6=CPU@f32+static"
    model = edgert.load(demo_path, place=place, static_shapes=SHAPES)
    same(conversation(model, book), expected, EXACT)


def test_one_placement_hands_nothing_over(demo: Model, book: list[int]) -> None:
    assert demo.generate(book[:30], max_tokens=4).timings.handover_us == 0


# What both phases have in common.


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, set[str]]]:
    """What OpenVINO's runners were asked to give and to take, by name."""
    seen: list[tuple[str, set[str]]] = []
    read, write = OpenVinoRunner.read_states, OpenVinoRunner.write_states

    def watched_read(self: OpenVinoRunner, names: Collection[str] | None = None) -> dict[str, Array]:
        states = read(self, names)
        seen.append(("read", set(states)))
        return states

    def watched_write(self: OpenVinoRunner, states: Mapping[str, Array]) -> None:
        own = {state.name for state in self._request.query_state()}
        seen.append(("write", own & set(states)))
        write(self, states)

    monkeypatch.setattr(OpenVinoRunner, "read_states", watched_read)
    monkeypatch.setattr(OpenVinoRunner, "write_states", watched_write)
    return seen


def test_a_common_stage_keeps_its_cache(
    demo_path: Path, book: list[int], expected: Array, moved: list[tuple[str, set[str]]]
) -> None:
    """The attention is on the same configuration in both phases: nothing moves."""
    model = edgert.load(demo_path, place="*=CPU@f32,prefill:ffn=SIM@f32")
    same(conversation(model, book), expected, EXACT)
    assert moved == []
    run = model._engine.executor.open()
    prefill, decode = (chain.runners for chain in run._chains)
    common = [runner for runner in prefill if any(runner is other for other in decode)]
    assert len(common) == 5  # embedding and first attention, three times attention, head
    assert len({id(runner) for runner in (*prefill, *decode)}) == 13


def test_only_what_is_not_common_moves(
    demo_path: Path, demo: Model, book: list[int], expected: Array, moved: list[tuple[str, set[str]]]
) -> None:
    assert demo.bundle.graph is not None
    states = {state for block in demo.bundle.graph.blocks[:5] for state in block.states}
    model = edgert.load(demo_path, place="*=CPU@f32,prefill:0-4=SIM@f32")
    same(conversation(model, book), expected, EXACT)
    assert len(states) == 4  # layers 0 and 1
    assert len(moved) == 3 * 2 * len(states)  # there, back, and there again, one after the other
    for (reads, read), (writes, written) in zip(moved[::2], moved[1::2], strict=True):
        assert (reads, writes) == ("read", "write")
        assert read == written
    assert {name for _, names in moved for name in names} == states


def test_what_both_phases_share_is_compiled_once(demo_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    compile_ = OpenVinoBackend.compile

    def counted(self: OpenVinoBackend, model: Any, config: DeviceConfig, blocks: Any = ()) -> Any:
        compiled.append((config, [block.index for block in blocks]))
        return compile_(self, model, config, blocks)

    monkeypatch.setattr(OpenVinoBackend, "compile", counted)
    bundle = edgert.Bundle.open(demo_path)
    assert bundle.graph is not None
    plan = Plan.explicit(bundle.graph, "*=CPU@f32,prefill:3-4=CPU@f32+dq")
    executor = Executor(bundle, plan)
    prefill, decode = executor.chains
    assert [(s.placement.first, s.placement.last) for s in prefill] == [(0, 2), (3, 4), (5, 9)]
    assert [(s.placement.first, s.placement.last) for s in decode] == [(0, 2), (3, 4), (5, 9)]
    assert [a is b for a, b in zip(prefill, decode, strict=True)] == [True, False, True]
    assert len(compiled) == 4


def test_groups(demo: Model) -> None:
    graph = demo.bundle.graph
    assert graph is not None
    cpu, dq, static = (DeviceConfig("CPU", variant) for variant in ("f32", "f32+dq", "f32+static"))

    def limits(plan: Plan) -> list[list[tuple[int, int, str]]]:
        return [[(p.first, p.last, p.config.variant) for p in phase] for phase in plan.submodels(graph)]

    # One phase is not cut further, nor where the configurations have nothing in common.
    assert limits(Plan.single(graph, cpu)) == [[(0, 9, "f32")]]
    apart = Plan((Placement(0, 9, cpu),), "test", decode=(Placement(0, 4, dq), Placement(5, 9, dq)))
    assert limits(apart) == [[(0, 9, "f32")], [(0, 4, "f32+dq"), (5, 9, "f32+dq")]]
    # Where they have, each phase is cut at the other's limits.
    common = Plan(
        (Placement(0, 5, cpu), Placement(6, 9, dq)), "test", decode=(Placement(0, 2, dq), Placement(3, 9, cpu))
    )
    assert limits(common) == [
        [(0, 2, "f32"), (3, 5, "f32"), (6, 9, "f32+dq")],
        [(0, 2, "f32+dq"), (3, 5, "f32"), (6, 9, "f32")],
    ]
    # The head with static shapes stands alone.
    assert limits(Plan.single(graph, static)) == [[(0, 0, "f32"), (1, 8, "f32+static"), (9, 9, "f32+static")]]


# Out of a device, through a file, into another.


def advance(model: Model, tokens: list[int]) -> tuple[int, Array]:
    """How many tokens came from a cache, and the logits after all of them."""
    engine: Engine = model._engine
    run = engine.take(tokens)
    reused = run.past
    run, logits = engine.advance(run, tokens, Clock("measured"))
    assert logits is not None
    logits = logits.copy()
    engine.give_back(run)
    return reused, logits


@pytest.fixture(scope="module")
def parked(
    loaded: Callable[[str], Model], book: list[int], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """The cache of 50 tokens from one configuration, in a file."""
    folder = tmp_path_factory.mktemp("parked")

    def make(name: str) -> Path:
        path = folder / f"{name}.kv"
        if not path.exists():
            loaded(name).export_cache(book[:50]).save(path)
        return path

    return make


@pytest.mark.parametrize("target", CONFIGS)
@pytest.mark.parametrize("source", CONFIGS)
def test_a_cache_goes_from_any_to_any(
    loaded: Callable[[str], Model], parked: Callable[[str], Path], demo: Model, book: list[int],
    source: str, target: str,
) -> None:  # fmt: skip
    need(source, target)
    path = parked(source)
    demo.release()
    cache = KvCache.load(path)
    assert cache.tokens == tuple(book[:50])
    model = loaded(target)
    model.import_cache(cache)
    expected = [advance(demo, book[:n])[1] for n in (60, 61, 62)]
    demo.release()
    model.import_cache(cache) if model is demo else None
    (reused, first), *rest = [advance(model, book[:n]) for n in (60, 61, 62)]
    assert reused == 50
    same(np.concatenate([first, *(logits for _, logits in rest)]), np.concatenate(expected), {source, target})
    if {source, target} <= EXACT:
        answer = model.generate(book[:62], max_tokens=8)
        assert answer.timings.reused_tokens == 61
        model.release()
        assert answer.tokens == demo.generate(book[:62], max_tokens=8).tokens


def test_half_the_size(loaded: Callable[[str], Model], demo: Model, book: list[int], tmp_path: Path) -> None:
    demo.release()
    cache = demo.export_cache(book[:50])
    half = cache.to("f16")
    assert half.bytes * 2 == cache.bytes == 50 * 4 * 2 * 2 * 64 * 4  # layers, keys and values, heads, sizes, f32
    assert (half.model, half.tokens) == (cache.model, cache.tokens)
    assert {rows.dtype for rows in half.states.values()} == {np.dtype(np.float16)}
    assert half.to("f32").bytes == cache.bytes
    half.save(tmp_path / "half.kv")
    assert (tmp_path / "half.kv").stat().st_size < 0.6 * cache.bytes
    expected = advance(demo, book[:60])[1]
    for name in EXACT:
        model = loaded(name)
        model.import_cache(KvCache.load(tmp_path / "half.kv"))
        reused, logits = advance(model, book[:60])
        assert reused == 50
        assert np.corrcoef(logits.ravel(), expected.ravel())[0, 1] >= 0.9999
    with pytest.raises(UsageError, match="precision 'u8', expected one of f16, f32"):
        cache.to("u8")  # type: ignore[arg-type]


def test_an_export_is_a_copy(demo: Model, book: list[int]) -> None:
    """Of the tokens that were asked for, whatever else is in the cache, and untouched by what follows."""
    demo.release()
    answer = demo.generate(book[:50], max_tokens=8)
    cache = demo.export_cache(book[:50])
    assert {rows.shape[2] for rows in cache.states.values()} == {50}
    before = {name: rows.copy() for name, rows in cache.states.items()}
    demo.generate([*book[:20], *book[200:240]], max_tokens=4)
    assert demo.generate(book[:50], max_tokens=8).tokens == answer.tokens
    for name, rows in cache.states.items():
        np.testing.assert_array_equal(rows, before[name])


def test_a_cache_serves_prompts_that_leave_it_early(
    loaded: Callable[[str], Model], demo: Model, book: list[int]
) -> None:
    demo.release()
    cache = demo.export_cache(book[:50])
    prompt = [*book[:35], *book[300:320]]
    expected = demo.generate(prompt, max_tokens=6).tokens
    model = loaded("CPU@f32+static")
    model.import_cache(cache)
    found = model.generate(prompt, max_tokens=6)
    assert (found.timings.reused_tokens, found.tokens) == (35, expected)


def test_a_phase_split_plan_takes_and_gives_caches(demo_path: Path, demo: Model, book: list[int]) -> None:
    demo.release()
    cache = demo.export_cache(book[:50])
    expected = demo.generate(book[:55], max_tokens=6).tokens
    model = edgert.load(demo_path, place="prefill:*=CPU@f32,decode:*=CPU@f32+static", static_shapes=SHAPES)
    model.import_cache(cache)
    found = model.generate(book[:55], max_tokens=6)
    assert (found.timings.reused_tokens, found.tokens) == (50, expected)
    again = model.export_cache([*book[:55], *found.tokens])  # from the device that decodes
    for name, rows in demo.export_cache([*book[:55], *found.tokens]).states.items():
        np.testing.assert_allclose(again.states[name], rows, rtol=1e-3, atol=1e-3)


# What does not fit.


@pytest.fixture(scope="module")
def small(demo: Model, book: list[int]) -> KvCache:
    demo.release()
    return demo.export_cache(book[:5])


def test_the_cache_of_another_model(demo: Model, small: KvCache) -> None:
    with pytest.raises(UsageError, match="KV cache: it belongs to model 0123, this one is"):
        demo.import_cache(replace(small, model="0123"))


def test_a_cache_beyond_the_context(demo_path: Path, demo: Model, book: list[int]) -> None:
    demo.release()
    cache = demo.export_cache(book[:70])
    model = edgert.load(demo_path, device="CPU@f32+static", static_shapes=StaticShapes((16,), (64,)))
    with pytest.raises(UsageError, match="holds 70 tokens, expected 1 to 64"):
        model.import_cache(cache)
    with pytest.raises(UsageError, match="holds 0 tokens"):
        model.import_cache(replace(cache, tokens=()))


@pytest.mark.parametrize("device", ["CPU@f32", "CPU@f32+static", "SIM@f32"])
@pytest.mark.parametrize(
    ("heads", "tokens", "size", "batch"),
    [(1, 5, 64, 1), (4, 5, 64, 1), (2, 5, 32, 1), (2, 4, 64, 1), (2, 6, 64, 1), (2, 5, 64, 2), (0, 5, 64, 1),
     (1, 5, 1, 1)],
)  # fmt: skip
def test_rows_of_another_shape(
    loaded: Callable[[str], Model], small: KvCache, device: str, heads: int, tokens: int, size: int, batch: int
) -> None:
    model = loaded(device)
    rows = np.zeros((batch, heads, tokens, size), np.float32)
    with pytest.raises(BundleError, match="KV cache: "):
        model.import_cache(replace(small, states=dict.fromkeys(small.states, rows)))
    assert not model._engine._idle


def test_rows_of_the_right_number_in_another_order(loaded: Callable[[str], Model], small: KvCache) -> None:
    rows = np.zeros((1, 4, 5, 32), np.float32)
    with pytest.raises(BundleError, match="KV cache: it does not fit the model"):
        loaded("CPU@f32+static").import_cache(replace(small, states=dict.fromkeys(small.states, rows)))


def test_a_wrong_number_of_states(demo: Model, small: KvCache) -> None:
    names = list(small.states)
    fewer = {name: small.states[name] for name in names[1:]}
    for states in (fewer, {}, {**small.states, "another": small.states[names[0]]}):
        with pytest.raises(BundleError, match=f"KV cache: holds {len(states)} states, the model has 8"):
            demo.import_cache(replace(small, states=states))
    with pytest.raises(BundleError, match="holds 8 states, the model has 8"):
        demo.import_cache(replace(small, states={**fewer, "another": small.states[names[0]]}))


def test_recurrent_models_give_no_cache(demo: Model, small: KvCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo._engine.executor, "recurrent", True)
    with pytest.raises(UsageError, match="cannot be exported, the model is recurrent"):
        demo.export_cache([1, 2, 3])
    with pytest.raises(UsageError, match="cannot be imported, the model is recurrent"):
        demo.import_cache(small)


def test_trim() -> None:
    rows = np.arange(24, dtype=np.float32).reshape(1, 2, 3, 4)
    kept = trim({"a": rows}, 2)
    assert kept is not None
    np.testing.assert_array_equal(kept["a"], rows[:, :, :2])
    assert trim({"a": rows}, 4) is None  # a window that has lost its first tokens
    assert trim({"a": rows, "b": rows[0]}, 2) is None  # no cache at all


# Files that somebody else wrote.

TINY = KvCache("model", (7, 8, 9), {"a": np.arange(24, dtype=np.float32).reshape(1, 2, 3, 4),
                                    "b": np.ones((1, 1, 3, 2), np.float16)})  # fmt: skip
INDEX = {"version": 1, "model": "model", "tokens": [7, 8, 9], "states": ["a", "b"]}


def npy(shape: str, dtype: str = "'<f4'", body: bytes = bytes(96)) -> bytes:
    header = f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + body


def archive(path: Path, index: object = INDEX, first: bytes | None = None, *, deflated: bool = False) -> Path:
    """A file as `save` makes it, with something in it replaced."""
    TINY.save(path)
    with zipfile.ZipFile(path) as old:
        entries = {name: old.read(name) for name in old.namelist()}
    entries["index.json"] = index if isinstance(index, bytes) else json.dumps(index).encode()
    if first is not None:
        entries["0.npy"] = first
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if deflated else zipfile.ZIP_STORED) as new:
        for name, data in entries.items():
            new.writestr(name, data)
    return path


def test_save_and_load(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.kv")  # what follows differs from it in one thing each
    TINY.save(tmp_path / "b.kv")
    for file in (path, tmp_path / "b.kv"):
        found = KvCache.load(file)
        assert (found.model, found.tokens, list(found.states)) == ("model", (7, 8, 9), ["a", "b"])
        for name, rows in TINY.states.items():
            assert found.states[name].dtype == rows.dtype
            np.testing.assert_array_equal(found.states[name], rows)
    assert KvCache.load(archive(path, first=npy("(1, 2, 3, 4)"))).states["a"].sum() == 0


@pytest.mark.parametrize(
    ("index", "told"),
    [
        ({**INDEX, "version": 2}, "not of version 1"),
        ({**INDEX, "version": None}, "not of version 1"),
        ([INDEX], "not of version 1"),
        ({"version": 1, "model": "model", "tokens": [7, 8, 9]}, "states"),
        ({"version": 1, "tokens": [7, 8, 9], "states": ["a", "b"]}, "model"),
        ({**INDEX, "states": ["a", "b", "c"]}, "2.npy"),
        ({**INDEX, "tokens": [7, 8]}, "for 2 tokens"),
        ({**INDEX, "tokens": ["x", 8, 9]}, "invalid literal"),
        ({**INDEX, "tokens": None}, "not iterable"),
        ({**INDEX, "states": 2}, "not iterable"),
        (b'{"version": 1, "model": "m", "tokens": [Infinity], "states": []}', "infinity"),
        (b'{"version": 1', "delimiter"),
        (b"\xff\xfe{", "decode"),
        (b"[" * 200_000, "recursion"),
    ],
)
def test_an_index_that_makes_no_sense(tmp_path: Path, index: object, told: str) -> None:
    with pytest.raises(BundleError, match=r"KV cache .*a\.kv: cannot be read: .*" + told):
        KvCache.load(archive(tmp_path / "a.kv", index))


@pytest.mark.filterwarnings("ignore:invalid value encountered in reduce:RuntimeWarning")
@pytest.mark.parametrize(
    ("first", "told"),
    [
        (npy("(1, 2, 3, 4)", "'<f8'", bytes(192)), "is float64"),
        (npy("(1, 2, 3, 4)", "'>f4'"), "is >f4"),
        (npy("(1, 2, 3, 4)", "'<i4'"), "is int32"),
        (npy("(1, 2, 3, 4)", "'|O'"), "Object arrays cannot be loaded"),
        (npy("(1, 3, 2, 4)"), "for 3 tokens"),
        (npy("(2, 3, 4)"), "for 3 tokens"),
        (npy("(1, 2, 3, 5)"), "EOF"),
        (npy("(1, -2, 3, -4)"), ""),
        (npy("(1, 2, 3, 1" + "0" * 13 + ")"), ""),  # 218 TB, which are not there
        (npy("(1, 1" + "0" * 19 + ", 3, 4)"), ""),
        (npy("(1, 2, 3, 4"), ""),
        (npy("(1, 2, 3, 04)"), ""),
        (npy("(1, 2, 3, 4)" + " " * 60_000), ""),
        (npy("(" * 3000 + ")" * 3000), ""),
        (b"\x93NUMPY\x01\x00\xff\xff{", ""),
        (b"\x93NUMPY\x09\x00", ""),
        (b"PK\x03\x04", ""),
        (b"", ""),
    ],
)  # fmt: skip
def test_rows_that_make_no_sense(tmp_path: Path, first: bytes, told: str) -> None:
    with pytest.raises(BundleError, match=r"(?s)KV cache .*a\.kv: cannot be read: .*" + told) as caught:
        KvCache.load(archive(tmp_path / "a.kv", first=first))
    assert "\n" not in f"{caught.value}"


def test_a_bomb(tmp_path: Path) -> None:
    """A file of kilobytes that claims megabytes: the rows are not compressed, so nothing has to be."""
    path = archive(tmp_path / "a.kv", first=npy("(1, 2, 3, 1000000)", body=bytes(24_000_000)), deflated=True)
    assert path.stat().st_size < 100_000
    with pytest.raises(BundleError, match="it is compressed"):
        KvCache.load(path)


def test_no_archive_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a.kv"
    for data in (b"", b"no archive", bytes(100_000)):
        path.write_bytes(data)
        with pytest.raises(BundleError, match="cannot be read"):
            KvCache.load(path)
    for missing in (tmp_path / "none.kv", tmp_path):
        with pytest.raises(BundleError, match="cannot be read"):
            KvCache.load(missing)
    with zipfile.ZipFile(path, "w") as other:
        other.writestr("other", "")
    with pytest.raises(BundleError, match=r"index\.json"):
        KvCache.load(path)


def test_damaged_files(tmp_path: Path) -> None:
    """Cut off anywhere, or with any byte changed: an error, or the same as before."""
    path = tmp_path / "a.kv"
    TINY.save(path)
    whole = path.read_bytes()
    rng = np.random.default_rng(3)
    refused = 0
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= int(rng.integers(1, 256))
        for data in (bytes(damaged), *([whole[:position]] if position % 5 == 0 else [])):
            path.write_bytes(data)
            try:
                found = KvCache.load(path)
            except BundleError:
                refused += 1
                continue
            assert len(data) == len(whole)
            for name, rows in found.states.items():
                np.testing.assert_array_equal(rows, TINY.states[name])
            assert (found.model, found.tokens, len(found.states)) == (TINY.model, TINY.tokens, 2)
    assert refused > 0.8 * len(whole)  # there is hardly a byte that does not matter


# Writing.


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """A file that was there stays as it was, and nothing else is left."""
    path = tmp_path / "a.kv"
    TINY.save(path)
    before = path.read_bytes()
    write = np.lib.format.write_array

    def fails(file: IO[bytes], rows: Array, **options: Any) -> None:
        write(file, rows, **options)
        if rows.dtype == np.float16:  # the second of the two
            raise error

    monkeypatch.setattr(np.lib.format, "write_array", fails)
    expected = UsageError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        TINY.save(path)
    assert os.listdir(tmp_path) == ["a.kv"]
    assert path.read_bytes() == before
    with pytest.raises(expected):
        TINY.save(tmp_path / "new.kv")
    assert os.listdir(tmp_path) == ["a.kv"]


def test_nowhere_to_write(tmp_path: Path) -> None:
    (tmp_path / "folder.kv").mkdir()
    for path in (tmp_path / "none" / "a.kv", tmp_path / "folder.kv"):
        with pytest.raises(UsageError, match="cannot be written"):
            TINY.save(path)
    assert os.listdir(tmp_path) == ["folder.kv"]


def test_runs_take_only_their_own(demo: Model, small: KvCache) -> None:
    """`write_states` on a sequence, without the engine: what it holds afterwards is what was written."""
    run: SequenceRun = demo._engine.executor.open()
    run.write_states(small.tokens, {**small.states, "nobody's": np.zeros((1, 1, 5, 1), np.float32)})
    assert run.tokens == list(small.tokens)
    for name, rows in run.read_states().items():
        np.testing.assert_array_equal(rows, small.states[name])
