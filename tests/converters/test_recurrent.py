"""Layers that keep a state instead of keys and values: what is kept, and that any number of tokens goes on from it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import openvino as ov
import pytest
import torch
import torch.nn.functional as F
from edgert.converters import onnx_bundle, quality
from edgert.converters.general import recurrent, states
from edgert.converters.general.states import State
from tiny_models import VOCAB_SIZE, exported, tiny

from edgert.errors import ConversionError

MAMBA = ["0.conv", "0.recurrent", "2.key", "2.value", "3.conv", "3.recurrent"]


def state_names(model: ov.Model) -> list[str]:
    """`N.part` of each; OpenVINO puts the name of the input before that of the output."""
    ids = (sink.get_variable_id() for sink in model.get_sinks())
    return sorted(name.partition("present.")[0].removeprefix("past_key_values.") for name in ids)


@pytest.mark.parametrize(
    ("family", "expected", "kinds"),
    [
        ("qwen3_5", ["0.conv", "0.recurrent", "1.key", "1.value"], {"GatedDeltaNet": 1, "TensorIterator": 0}),
        ("nemotron_h", MAMBA, {"TensorIterator": 0}),
        ("falcon_mamba", ["0.conv", "0.recurrent", "1.conv", "1.recurrent"], {"TensorIterator": 2}),
    ],
)
def test_decoder(family: str, expected: list[str], kinds: dict[str, int]) -> None:
    source, model = exported(family)
    assert state_names(model) == expected
    compiled = ov.Core().compile_model(model, "CPU", quality.EXACT)
    found = Counter(str(n.get_rt_info()["layerType"].astype(str)) for n in compiled.get_runtime_model().get_ops())
    assert {kind: found[kind] for kind in kinds} == kinds
    row = quality.check_decoder(
        quality.openvino_decoder(model),
        quality.torch_decoder(source),
        vocab_size=VOCAB_SIZE,
        window=None,
        against=quality.transformers_name(),
    )
    assert row["relative_error"] < 1e-4


@pytest.mark.parametrize("family", ["qwen3_5", "nemotron_h"])
def test_batch_and_beams(family: str) -> None:
    """Two sequences at once, which change places between two calls; then a new sequence begins from nothing."""
    source, model = exported(family)
    request = ov.Core().compile_model(model, "CPU", quality.EXACT).create_infer_request()
    ids = torch.randint(3, VOCAB_SIZE, (2, 9), generator=torch.Generator().manual_seed(0))

    def call(tokens: torch.Tensor, past: int, beams: list[int]) -> np.ndarray:
        inputs = {name: value.repeat(2, 0) for name, value in quality.decoder_inputs(tokens[:1].numpy(), past).items()}
        logits = request.infer({**inputs, "input_ids": tokens.numpy(), "beam_idx": np.array(beams, np.int32)})["logits"]
        return np.array(logits)

    with torch.no_grad(), recurrent.one_chunk(source, 9):
        expected = source(ids).logits.numpy()
    for _ in range(2):
        call(ids[:, :5], 0, [0, 1])
        found = call(ids[[1, 0], 5:], 5, [1, 0])
        assert abs(found - expected[[1, 0], 5:]).max() < 1e-4 * abs(expected).max()
        request.reset_state()


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("lfm2", ["0.conv", "1.key", "1.value"]),
        ("granitemoehybrid", ["0.conv", "0.recurrent", "1.key", "1.value"]),
        ("falcon_h1", [f"{layer}.{part}" for layer in range(2) for part in ("key", "value", "conv", "recurrent")]),
    ],
)
def test_what_layers_keep(family: str, expected: list[str]) -> None:
    layout = states.layout(tiny(family), batch=2, past=5)
    assert [state.name for state in layout.states] == expected
    assert layout.recurrent
    assert {state.example.shape[2] for state in layout.states if state.grows} == {5}


def mamba_2(x: torch.Tensor, dt: torch.Tensor, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """Token by token, as the recurrence is defined, from an empty state; heads share b and c in groups."""
    groups = x.shape[2] // b.shape[2]
    b, c = b.repeat_interleave(groups, 2), c.repeat_interleave(groups, 2)
    memory, out = torch.zeros(*x.shape[:1], *x.shape[2:], b.shape[-1]), []
    for t in range(x.shape[1]):
        news = (dt[:, t, :, None] * x[:, t])[..., None] * b[:, t, :, None]
        memory = memory * torch.exp(dt[:, t] * a)[..., None, None] + news
        out.append((memory * c[:, t, :, None]).sum(-1))
    return torch.stack(out, 1)


def layer(**tensors: torch.Tensor) -> object:
    """The recurrent layer that is in turn, with these states."""
    names = {"conv": "conv_states", "recurrent": "recurrent_states"}
    kept = tuple(State(0, part, tensor) for part, tensor in tensors.items())
    cache = states.build_cache(states.Layout(kept, ((False, True),)), list(tensors.values()))
    cache.update_conv_state(torch.zeros(1), 0)
    assert all(getattr(cache.layers[0], names[part]) is tensor for part, tensor in tensors.items())
    return cache.layers[0]


def chunked(run: Callable[[slice], torch.Tensor], tokens: int) -> torch.Tensor:
    """What `run` gives for 1, 4 and the remaining tokens."""
    return torch.cat([run(part) for part in (slice(0, 1), slice(1, 5), slice(5, tokens))], dim=1)


def test_mamba_2_in_pieces() -> None:
    generator = torch.Generator().manual_seed(0)
    x, b, c = (torch.randn(2, 12, *size, generator=generator) for size in ((4, 3), (2, 5), (2, 5)))
    dt = torch.rand(2, 12, 4, generator=generator) * 20  # strong decays: sums of them are far from each other
    a = -torch.rand(4, generator=generator) * 16
    current = layer(recurrent=torch.zeros(2, 4, 3, 5))

    def run(part: slice) -> torch.Tensor:
        out, after = recurrent.mamba_chunk_scan_combined(x[:, part], dt[:, part], a, b[:, part], c[:, part], 8)
        current.recurrent_states = after  # type: ignore[attr-defined]
        return out

    expected = mamba_2(x, dt, a, b, c)
    assert (chunked(run, 12) - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("kept", [3, 4])
def test_short_convolution_in_pieces(kept: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*size, generator=generator) for size in ((2, 9, 6), (6, 4), (6,)))
    layer(conv=torch.zeros(2, 6, kept))
    found = chunked(lambda part: recurrent.causal_conv1d_fn(x[:, part].mT, weight, bias, "silu").mT, 9)
    expected = F.silu(F.conv1d(F.pad(x.mT, (3, 0)), weight[:, None], bias, groups=6)).mT
    torch.testing.assert_close(found, expected)


def test_a_state_that_is_not_continued_is_noticed() -> None:
    kept = states.Layout((State(3, "recurrent", torch.zeros(2, 4)),), ((False, True),) * 4)
    tensors = [torch.zeros(2, 4)]
    with pytest.raises(ConversionError, match=r"state 3\.recurrent is not continued"):
        states.read_cache(kept, states.build_cache(kept, tensors), tensors)


def test_onnx_refuses_states(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    source = tiny("lfm2")
    monkeypatch.setattr(onnx_bundle, "trace_decoder", lambda model: (None, states.layout(model, 2, 5)))
    with pytest.raises(ConversionError, match=r"lfm2: its layers keep states \(conv\) .*; the OpenVINO format can"):
        onnx_bundle._export(source, "decoder", tmp_path / "model.onnx")  # type: ignore[operator]
