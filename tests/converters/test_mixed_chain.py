"""A chain of blocks whose weights are inputs computes what the whole model does."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from edgert.converters.compress import weight_uses
from edgert.converters.mixed.chain import Array, Chain, Weights
from edgert.converters.mixed.matrices import Matrix
from mixed_models import F16, WINDOWS, Parts, logits_of, model_of, parts_of

Ready = tuple[Parts, Chain, Weights]
FAMILIES = ("small", "llama", "gemma3", "gpt2", "qwen3_moe", "cohere2")


@pytest.fixture(scope="module")
def chain_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Ready]:
    @cache
    def make(family: str) -> Ready:
        folder = tmp_path_factory.mktemp(family)
        parts = parts_of(model_of(family), folder)
        variants = parts.variants(folder / "variants")
        return parts, parts.chain(), lambda matrix: variants.weights(matrix, F16, "rtn")

    return make


def run(chain: Chain, weights: Weights) -> list[Array]:
    return [state["logits"][0] for state in chain.through(0, chain.blocks - 1, chain.start(WINDOWS), weights)]


def with_noise(exact: Weights, changed: Matrix) -> Weights:
    """One matrix is another one."""
    noise = np.random.default_rng(0).normal(0, 0.05, changed.shape).astype(np.float32)
    return lambda matrix: exact(matrix) + noise if matrix == changed else exact(matrix)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_whole_model(family: str, chain_of: Callable[[str], Ready]) -> None:
    parts, chain, exact = chain_of(family)
    assert chain.blocks == len(parts.graph.blocks) > 2
    expected = logits_of(parts.model())
    for found, right in zip(run(chain, exact), expected, strict=True):
        np.testing.assert_allclose(found, right, atol=1e-5 * np.abs(right).max())
    assert not np.allclose(expected[0][:5], expected[1])  # so windows do matter


@pytest.mark.parametrize("family", ["small", "gemma3", "gpt2", "qwen3_moe"])
def test_a_matrix_is_changed_from_its_block_on(family: str, chain_of: Callable[[str], Ready]) -> None:
    _, chain, exact = chain_of(family)
    before = run(chain, exact)
    changed = [chain.matrices[0], chain.matrices[2], max(chain.matrices, key=lambda matrix: len(matrix.shape))]
    for matrix in dict.fromkeys(changed):
        other = with_noise(exact, matrix)
        everything = run(chain, other)
        first = matrix.blocks[0]
        states = chain.start(WINDOWS)
        states = list(chain.through(0, first - 1, states, exact)) if first else states
        for _ in range(2):  # states are not used up
            found = [state["logits"][0] for state in chain.through(first, chain.blocks - 1, states, other)]
            for own, right, exactly in zip(found, everything, before, strict=True):
                np.testing.assert_array_equal(own, right)
                assert np.abs(own - exactly).max() > 1e-3
    for own, right in zip(run(chain, exact), before, strict=True):  # and nothing of it stays
        np.testing.assert_array_equal(own, right)


def test_a_tied_table_is_one_matrix_of_two_blocks(chain_of: Callable[[str], Ready]) -> None:
    parts, chain, exact = chain_of("small")
    table, *others = parts.matrices
    assert (table.name, table.role, table.blocks, table.shape) == (
        "embed/embedding", "embedding+head", (0, 3), (256, 64)
    )  # fmt: skip
    assert {matrix.role for matrix in others} == {"linear"}
    assert [matrix.blocks for matrix in others] == [(1,)] * 4 + [(2,)] * 3
    # The two halves by hand: lookup of one table, product with the other one, is neither of the two whole changes.
    other = with_noise(exact, table)
    states = list(chain.through(0, 2, chain.start(WINDOWS), other))
    half = [state["logits"][0] for state in chain.run(3, states, exact)]
    assert all(np.abs(a - b).max() > 1e-3 for a, b in zip(half, run(chain, other), strict=True))


def test_untied_tables_and_experts_are_matrices_of_their_own(
    chain_of: Callable[[str], Ready],
) -> None:
    roles = {matrix.role: matrix.blocks for matrix in chain_of("llama")[0].matrices}
    assert roles == {"embedding": (0,), "linear": (4,), "head": (5,)}
    experts = [matrix.shape for matrix in chain_of("qwen3_moe")[0].matrices if len(matrix.shape) == 3]
    assert experts == [(4, 64, 64)] * 3 * 2  # gate, up and down of two layers
    for family in FAMILIES:
        names = [matrix.name for matrix in chain_of(family)[0].matrices]
        assert len(names) == len(set(names))


def test_names_differ_where_operations_have_paths(tmp_path: Path) -> None:
    """As those of ONNX models do: `/model/layers.0/mlp/up_proj/MatMul`."""
    model = model_of("small")
    for number, use in enumerate(weight_uses(model)):
        use.node.set_friendly_name(f"/model/{number}/MatMul")
    names = [matrix.name for matrix in parts_of(model, tmp_path).matrices]
    assert len(set(names)) == len(names) == 8
    assert names[1].startswith("attention.0/model/")


def test_two_runs_of_a_block_may_alternate(chain_of: Callable[[str], Ready]) -> None:
    """One compiled block serves both: neither may see the other's weights or keys."""
    _, chain, exact = chain_of("small")
    states = list(chain.through(0, 0, chain.start(WINDOWS), exact))
    other = with_noise(exact, next(matrix for matrix in chain.matrices if matrix.blocks == (1,)))
    apart = [[state["hidden"] for state in chain.run(1, states, weights)] for weights in (exact, other)]
    pairs = zip(chain.run(1, states, exact), chain.run(1, states, other), strict=True)
    together = [[first["hidden"], second["hidden"]] for first, second in pairs]
    for window, (first, second) in enumerate(together):
        np.testing.assert_array_equal(first, apart[0][window])
        np.testing.assert_array_equal(second, apart[1][window])
        assert np.abs(first - second).max() > 1e-3


def test_what_is_behind_is_not_kept(chain_of: Callable[[str], Ready]) -> None:
    _, chain, exact = chain_of("llama")
    states = chain.start(WINDOWS[:1])
    names = []
    for block in range(chain.blocks):
        states = list(chain.run(block, states, exact))
        names.append(set(states[0]))
    assert names[-1] == {"logits"}
    assert all("hidden" in kept for kept in names[:-1])
    assert "beam_idx" in names[2]  # the second layer's attention reads it, and nothing behind that
    assert not any("beam_idx" in kept for kept in names[3:])


def test_weights_of_the_wrong_shape_are_refused(chain_of: Callable[[str], Ready]) -> None:
    _, chain, exact = chain_of("small")
    with pytest.raises(RuntimeError):
        list(chain.run(0, chain.start(WINDOWS), lambda matrix: exact(matrix)[:, :32]))
