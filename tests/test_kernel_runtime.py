"""`CPU@kernels` as a configuration like any other: the same text, alone and beside others; its cache changes hands.

Whether the kernels compute the right thing is for test_kernels, test_kernel_attention and test_kernel_lowering.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import edgert
from edgert import native
from edgert.backends import info_of
from edgert.backends.base import Array
from edgert.backends.simulated import Fault, SimulatedBackend
from edgert.device import DeviceConfig
from edgert.errors import ContextOverflowError
from edgert.inplace import KernelRunner
from edgert.kvcache import KvCache
from edgert.kvlayout import BLOCK_TOKENS, KvLayout
from edgert.placement import Plan
from edgert.session import Model

INT8, F16, EXACT = "CPU@kernels", "CPU@kernels+f16", "CPU@f32"
PROMPT = "It was a dark night, and the old man"
# Largest error of a logit over the largest logit, against CPU@f32 with the same weights. The demo's weights are f16, so
# that nothing but keys and values is rounded; the other bundle's activations are, to INT8, and its logits are off by
# about 1e-2 in whatever configuration does that.
LIMITS = {F16: 5e-4, INT8: 3e-3}
QUANTIZED_LIMIT = 3e-2

needs_kernels = pytest.mark.skipif(not native.status().loads, reason="the native kernels do not load here")


@pytest.fixture(scope="module")
def loaded(demo_path: Path) -> Callable[[str], Model]:
    """The demo model by placement; without any idle sequence."""
    made: dict[str, Model] = {}

    def make(place: str) -> Model:
        if place not in made:
            made[place] = edgert.load(demo_path, place=place)
        made[place].release()
        return made[place]

    return make


@pytest.fixture(scope="module")
def prompt(demo: Model) -> list[int]:
    return demo.tokenizer.encode(f"{PROMPT} " * 12)[:100]


def conversation(model: Model, tokens: list[int]) -> Array:
    """Logits of a prompt, single tokens, a further prompt, single tokens again: over the ends of blocks and rooms."""
    run = model._engine.executor.open()
    logits: list[Array] = []
    for part in (tokens[:40], *([t] for t in tokens[40:60]), tokens[60:290], *([t] for t in tokens[290:300])):
        found = run.forward(part) if len(part) == 1 else run.prefill(part, chunk=64)
        assert found is not None
        logits.append(found.copy())
    assert run.tokens == tokens[:300]
    return np.concatenate(logits)


@pytest.fixture(scope="module")
def expected(demo: Model, book: list[int]) -> Array:
    return conversation(demo, book)


def error(found: Array, exact: Array) -> float:
    return float(np.abs(found - exact).max() / np.abs(exact).max())


# Alone, and beside others.


@needs_kernels
@pytest.mark.parametrize("name", [F16, INT8])
def test_the_same_text(loaded: Callable[[str], Model], demo: Model, name: str) -> None:
    model = loaded(f"*={name}")
    assert isinstance(model._engine.executor.open()._home.runners[0], KernelRunner)
    result = model.generate(PROMPT, max_tokens=48)
    assert result.tokens == demo.generate(PROMPT, max_tokens=48).tokens
    assert result.timings.provenance == "measured"


@needs_kernels
def test_compressed_weights(packed_path: Path, book: list[int], caplog: pytest.LogCaptureFixture) -> None:
    exact = conversation(edgert.load(packed_path, device=EXACT), book)
    with caplog.at_level(logging.WARNING, "edgert"):
        for name in (F16, INT8):
            assert error(conversation(edgert.load(packed_path, device=name), book), exact) <= QUANTIZED_LIMIT
    assert not [record for record in caplog.records if record.name == "edgert"]


@needs_kernels
@pytest.mark.parametrize(
    "place",
    [
        f"*={F16}",
        f"*={INT8}",
        f"*={EXACT},attention={F16}",
        f"*={EXACT},ffn={F16}",
        f"*={F16},3-5={EXACT}",
        f"*={INT8},attention=CPU@f32+dq",
        f"*={EXACT},2-6={INT8},4=SIM@f32",
        f"prefill:*={EXACT},decode:*={F16}",
        f"prefill:*={F16},decode:*={EXACT}",
        f"prefill:*={INT8},decode:*={EXACT}",
        f"prefill:*={INT8},decode:*={F16}",
        f"prefill:*=CPU@f32+dq,decode:*={INT8}",
        f"prefill:*=CPU@f32+static,prefill:0=CPU@f32,decode:*={F16}",
        f"prefill:*={F16},decode:*=CPU@f32+static,decode:0=CPU@f32",
    ],
)
def test_beside_others_and_in_either_phase(
    loaded: Callable[[str], Model], book: list[int], expected: Array, place: str
) -> None:
    rounded = INT8 in place.replace(F16, "") or "+dq" in place
    assert error(conversation(loaded(place), book), expected) <= (4 * LIMITS[INT8] if rounded else LIMITS[F16])


@needs_kernels
def test_prefill_in_bf16(demo_path: Path, book: list[int], expected: Array) -> None:
    if DeviceConfig.parse("CPU@bf16") not in info_of(DeviceConfig.parse(EXACT)).configs:
        pytest.skip("CPU@bf16 is not available here")
    model = edgert.load(demo_path, place=f"prefill:*=CPU@bf16,decode:*={INT8}")
    assert np.corrcoef(conversation(model, book).ravel(), expected.ravel())[0, 1] >= 0.999


@needs_kernels
@pytest.mark.parametrize("compressed", [False, True])
def test_cut_at_every_boundary(
    demo_path: Path, packed_path: Path, book: list[int], expected: Array, compressed: bool
) -> None:
    path = packed_path if compressed else demo_path
    graph = edgert.Bundle.open(path).graph
    assert graph is not None
    config = DeviceConfig.parse(F16)
    plan = Plan.from_configs([config] * len(graph.blocks), "every boundary", merge=False)
    found = conversation(edgert.load(path, plan=plan), book)
    whole = conversation(edgert.load(path, device=F16), book)
    assert error(found, whole) <= (QUANTIZED_LIMIT if compressed else LIMITS[F16])


@needs_kernels
def test_the_uncut_model_is_not_changed_for_the_other_phase(demo_path: Path, demo: Model) -> None:
    """Prefill compiles it with kernels first; decode wants it as it was."""
    executor = edgert.load(demo_path, place=f"prefill:*={F16},decode:*={EXACT}")._engine.executor
    assert [len(chain) for chain in executor.chains] == [1, 1]
    assert executor.chains[1][0].compiled.inputs == demo._engine.executor.chains[0][0].compiled.inputs


# The cache changes hands.


@needs_kernels
@pytest.mark.parametrize("name", [F16, INT8])
def test_parked_and_taken_up_elsewhere(
    loaded: Callable[[str], Model], demo: Model, prompt: list[int], tmp_path: Path, name: str
) -> None:
    model = loaded(f"*={name}")
    text = demo.generate(prompt, max_tokens=16).tokens
    assert model.generate(prompt, max_tokens=16).tokens == text
    for source, target in ((model, demo), (demo, model), (model, model)):
        source.export_cache(prompt).save(tmp_path / "cache")
        target.release()
        target.import_cache(KvCache.load(tmp_path / "cache"))
        result = target.generate(prompt, max_tokens=16)
        assert result.timings.reused_tokens == len(prompt) - 1
        assert result.tokens == text


@needs_kernels
def test_going_back_moves_no_row(
    loaded: Callable[[str], Model], prompt: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loaded(f"*={INT8}")
    other = [*prompt[:70], *reversed(prompt)]
    fresh = model.generate(other, max_tokens=8)
    model.release()
    model.generate(prompt, max_tokens=8)
    for name in ("read_keys", "read_values", "write_keys", "write_values"):
        monkeypatch.setattr(KvLayout, name, None)
    again = model.generate(other, max_tokens=8)
    assert again.timings.reused_tokens == 70
    assert again.tokens == fresh.tokens


@needs_kernels
def test_going_back_where_only_some_caches_are_in_place(
    loaded: Callable[[str], Model], demo: Model, prompt: list[int]
) -> None:
    model = loaded(f"*={EXACT},1-4={F16}")
    demo.release()
    other = [*prompt[:70], *reversed(prompt)]
    model.generate(prompt, max_tokens=8)
    again = model.generate(other, max_tokens=8)
    assert again.timings.reused_tokens == 70
    assert again.tokens == demo.generate(other, max_tokens=8).tokens


@needs_kernels
def test_room_grows_up_to_the_context(loaded: Callable[[str], Model], demo: Model, book: list[int]) -> None:
    model = loaded(f"*={F16}")
    limit = model.context_length
    run, exact = model._engine.executor.open(), demo._engine.executor.open()
    rooms = []
    for start in range(0, limit, 60):
        part = book[start : min(start + 60, limit)]
        found, wanted = run.forward(part, keep=len(part)), exact.forward(part, keep=len(part))
        assert error(found, wanted) <= LIMITS[F16]
        rooms.append(run._home.runners[0]._room)  # type: ignore[attr-defined]
    assert list(dict.fromkeys(rooms)) == [16 * BLOCK_TOKENS, 32 * BLOCK_TOKENS, limit]
    with pytest.raises(ContextOverflowError):
        model.generate(book[:limit], max_tokens=1)


@needs_kernels
def test_sequences_do_not_meet(loaded: Callable[[str], Model], prompt: list[int]) -> None:
    model = loaded(f"*={INT8}")
    prompts = [prompt[start : start + 40] for start in (0, 20, 40, 60)]
    alone = []
    for tokens in prompts:
        model.release()
        alone.append(model.generate(tokens, max_tokens=12).tokens)
    model.release()
    with ThreadPoolExecutor(4) as pool:
        together = pool.map(lambda tokens: model.generate(tokens, max_tokens=12).tokens, prompts)
    assert list(together) == alone


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Simulated devices fail at the seventh call: the prompt is four, and then a few tokens come through."""
    backend, load = SimulatedBackend(Fault(6)), edgert.backends._load
    monkeypatch.setattr("edgert.backends._load", lambda module: backend if module == "simulated" else load(module))
    yield
    backend.released.set()


@needs_kernels
@pytest.mark.usefixtures("failing")
@pytest.mark.parametrize(
    ("place", "fallback", "done"),
    [
        ("*=SIM@f32", F16, "the tokens are prefilled again"),
        (f"*={F16},ffn=SIM@f32", EXACT, "keys and values were moved"),
        (f"*={F16},ffn=SIM@f32", F16, "keys and values were moved"),
        (f"*={EXACT},ffn=SIM@f32", F16, "keys and values were moved"),
        ("*=SIM@f32+static,0=CPU@f32", F16, "keys and values were moved"),
    ],
)
def test_a_device_fails(demo_path: Path, demo: Model, prompt: list[int], place: str, fallback: str, done: str) -> None:
    shapes = edgert.StaticShapes((25,), (128, 256))
    model = edgert.load(demo_path, place=place, fallback=fallback, prefill_chunk=25, static_shapes=shapes)
    result = model.generate(prompt, max_tokens=12)
    (event,) = result.events
    assert event.detail.endswith(done)
    assert event.tokens > len(prompt)
    assert {str(config) for config in model.plan.configs} <= {F16, EXACT}
    assert result.tokens == demo.generate(prompt, max_tokens=12).tokens
