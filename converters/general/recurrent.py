"""Recurrences over tokens that go on from a state with any number of tokens.

transformers has each of them twice: for a whole prompt from an empty state, and for one token from a state. A session
needs both in one graph. Its layers leave the work to functions with the interface of the libraries `causal-conv1d`,
`mamba-ssm` and `flash-linear-attention`; what is here has the same interface, and takes and leaves the state of the
layer in the cache:

    short convolution   the last inputs are put before the new ones, then comes an ordinary depthwise convolution
    Mamba-2             its closed form over the new tokens (state space duality, arXiv 2405.21060, section 6): an
                        attention whose weights are products of decays, plus what the state before adds. Matrix products
                        only, static where the number of tokens is; memory heads * tokens * tokens
    gated delta rule    a Loop over tokens in the form that OpenVINO's pass GatedDeltaNetFusion makes one operation of
    Mamba-1             a Loop over tokens: a decay for each channel and state leaves no cheaper closed form

The bodies of the Loop follow `optimum/exporters/openvino/_ov_ops.py` of optimum-intel 2.2 (Apache-2.0).
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import openvino as ov
import torch
import torch.nn.functional as F
from edgert.converters.general.adaptation import Adaptation, replaced
from edgert.converters.general.states import current_layer
from openvino import opset13 as ops
from openvino.frontend.pytorch import ConversionExtension
from transformers import PreTrainedModel

# Operations that exist for the trace only: the conversion below says what they compute.
_LIBRARY = torch.library.Library("edgert", "FRAGMENT")
_LIBRARY.define("gated_delta_rule(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor state) -> Tensor")
_LIBRARY.define("selective_scan(Tensor dt, Tensor x, Tensor b, Tensor c, Tensor a, Tensor state) -> Tensor")
_LIBRARY.define("last_state(Tensor scanned, Tensor state) -> Tensor")


@torch.library.register_fake("edgert::gated_delta_rule", lib=_LIBRARY)
def _(q: Any, k: Any, v: torch.Tensor, g: Any, beta: Any, state: Any) -> torch.Tensor:
    return torch.empty_like(v)


@torch.library.register_fake("edgert::selective_scan", lib=_LIBRARY)
def _(dt: Any, x: torch.Tensor, b: Any, c: Any, a: Any, state: Any) -> torch.Tensor:
    return torch.empty_like(x)


@torch.library.register_fake("edgert::last_state", lib=_LIBRARY)
def _(scanned: Any, state: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(state)


def causal_conv1d_fn(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, activation: str | None = None, **_: Any
) -> torch.Tensor:
    """Depthwise convolution of `x` [batch, channels, tokens] with `weight` [channels, kernel]; same shape as `x`.

    Written as a sum over the kernel: what comes next takes a GroupConvolution apart for heads, and OpenVINO's GPU
    plugin (2026.4.1) reads it at the wrong places when there is one token.
    """
    layer = current_layer()
    kept, kernel, tokens = layer.conv_states.shape[-1], weight.shape[-1], x.shape[-1]
    inputs = torch.cat([layer.conv_states, x.to(layer.conv_states.dtype)], dim=-1)
    layer.conv_states = inputs[..., -kept:]
    rows = inputs[..., kept - kernel + 1 :].transpose(1, 2).to(x.dtype)
    out = rows[:, :tokens] * weight[:, 0]
    for place in range(1, kernel):
        out = out + rows[:, place : place + tokens] * weight[:, place]
    out = out if bias is None else out + bias
    return (F.silu(out) if activation in ("silu", "swish") else out).transpose(1, 2)


def chunk_gated_delta_rule(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    use_qk_l2norm_in_kernel: bool = False,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of `query`, `key`, `value` [batch, tokens, heads, size], decays `g`, strengths `beta` [batch, tokens, heads]."""
    layer = current_layer()
    if use_qk_l2norm_in_kernel:
        query, key = (t * torch.rsqrt((t * t).sum(dim=-1, keepdim=True) + 1e-6) for t in (query, key))
    inputs = [t.transpose(1, 2).contiguous().float() for t in (query, key, value, g, beta)]
    state = layer.recurrent_states.float()
    out = torch.ops.edgert.gated_delta_rule(*inputs, state)
    after = torch.ops.edgert.last_state(out, state).to(layer.recurrent_states.dtype)
    return out.transpose(1, 2).contiguous().to(query.dtype), after


def mamba_chunk_scan_combined(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    chunk_size: int,
    D: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mamba-2 of `x` [batch, tokens, heads, size], `dt` [batch, tokens, heads], `A` [heads], `B`, `C` [batch, tokens,
    groups, states]; the state is [batch, heads, size, states].
    """
    layer = current_layer()
    state = layer.recurrent_states.float()
    tokens, heads = x.shape[1:3]
    dt = _time_steps(dt, dt_bias, dt_softplus, dt_limit).transpose(1, 2)  # [batch, heads, tokens]
    b, c = (_per_head(t.float(), heads) for t in (B, C))  # [batch, heads, tokens, states]
    values = x.float().transpose(1, 2)  # [batch, heads, tokens, size]

    decay = dt * A.float()[:, None]  # logarithms
    place = torch.arange(tokens, device=x.device)
    later, seen = place[:, None] > place, place[:, None] >= place
    # Sums of decays from one token to another. A difference of two sums from the first token would lose the small ones.
    between = torch.cumsum(decay.unsqueeze(-1) * later.to(decay.dtype), dim=-2).exp() * seen.to(decay.dtype)
    weights = torch.matmul(c, b.transpose(2, 3)) * between * dt.unsqueeze(-2)
    since_start = torch.cumsum(decay, dim=-1).exp().unsqueeze(-1)  # [batch, heads, tokens, 1]
    out = torch.matmul(weights, values) + torch.matmul(c, state.transpose(2, 3)) * since_start
    to_end = (between[..., -1, :] * dt).unsqueeze(-1)
    after = state * since_start[..., -1:, :] + torch.matmul((values * to_end).transpose(2, 3), b)
    if D is not None:
        out = out + values * D.float()[:, None, None]
    return out.transpose(1, 2).contiguous().to(x.dtype), after.to(layer.recurrent_states.dtype)


def selective_scan_fn(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mamba-1 of `u`, `delta`, gate `z` [batch, channels, tokens], `A` [channels, states], `B`, `C` [batch, states,
    tokens]; the state is [batch, channels, states].
    """
    layer = current_layer()
    dt = _time_steps(delta.transpose(1, 2), delta_bias, delta_softplus, (0.0, float("inf")))
    state = layer.recurrent_states.float()
    inputs = [t.transpose(1, 2).float().contiguous() for t in (u, B, C)]
    scanned = torch.ops.edgert.selective_scan(dt, *inputs, A.float(), state)
    after = torch.ops.edgert.last_state(scanned, state).to(layer.recurrent_states.dtype)
    out = scanned.transpose(1, 2)
    if D is not None:
        out = out + u.float() * D.float()[:, None]
    if z is not None:
        out = out * F.silu(z.float())
    return out.to(u.dtype), after


def _time_steps(
    dt: torch.Tensor, bias: torch.Tensor | None, softplus: bool, limit: tuple[float, float]
) -> torch.Tensor:
    dt = dt.float() if bias is None else dt.float() + bias.float()
    dt = F.softplus(dt) if softplus else dt
    low, high = limit
    if low > 0 or high < float("inf"):  # softplus is above 0 anyway; OpenVINO's Clamp takes no infinity
        dt = torch.clamp(dt, min=low) if high == float("inf") else torch.clamp(dt, low, high)
    return dt


def _per_head(grouped: torch.Tensor, heads: int) -> torch.Tensor:
    """[batch, tokens, groups, states] of groups of heads to [batch, heads, tokens, states]."""
    batch, tokens, groups, size = grouped.shape
    spread = grouped.transpose(1, 2).unsqueeze(2).expand(batch, groups, heads // groups, tokens, size)
    return spread.reshape(batch, heads, tokens, size)


def _convert_gated_delta_rule(context: Any) -> list[ov.Output]:
    """The Loop that GatedDeltaNetFusion looks for, operation by operation: all tensors [batch, heads, tokens, ...]."""
    query, key, value, g, beta, state = (context.get_input(i) for i in range(6))
    # The pass wants the scale of the queries like this, not as a number.
    size = ops.convert(ops.gather(ops.shape_of(query), ops.constant(3), ops.constant(0)), "f32")
    query = ops.divide(query, ops.power(size, ops.constant(np.float32(0.5)))).output(0)

    step = ops.parameter([], np.int32)
    q, k, v = (ops.parameter([-1, -1, 1, -1], np.float32) for _ in range(3))
    decay, strength = (ops.parameter([-1, -1, 1], np.float32) for _ in range(2))
    memory, out = (ops.parameter([-1, -1, -1, -1], np.float32) for _ in range(2))
    last, before_last, tokens = ops.constant(np.int32(-1)), ops.constant(np.int32(-2)), ops.constant(np.int32(2))
    q_column, k_column = (ops.unsqueeze(ops.squeeze(t, tokens), last) for t in (q, k))
    kept = ops.multiply(memory, ops.unsqueeze(ops.exp(decay), last))
    known = ops.reduce_sum(ops.multiply(kept, k_column), before_last, False)
    news = ops.multiply(ops.subtract(ops.squeeze(v, tokens), known), strength)
    written = ops.add(kept, ops.multiply(k_column, ops.unsqueeze(news, before_last)))
    read = ops.reduce_sum(ops.multiply(written, q_column), before_last, True)
    index = ops.unsqueeze(step, ops.constant(np.int32(0)))
    filled = ops.scatter_update(out, index, read, tokens)
    results = [ops.constant([True], dtype=bool), written, filled]
    body = ov.Model(results, [step, q, k, v, decay, strength, memory, out], "gated_delta_rule")

    shape = ops.shape_of(value)
    loop = ops.loop(_length(shape, 2), ops.constant(True, dtype="bool"))
    loop.set_function(body)
    for parameter, whole in zip((q, k, v, decay, strength), (query, key, value, g, beta), strict=True):
        loop.set_sliced_input(parameter, whole, 0, 1, 1, -1, 2)
    loop.set_merged_input(memory, state, written.output(0))
    loop.set_merged_input(out, ops.broadcast(ops.constant(np.float32(0)), shape).output(0), filled.output(0))
    loop.set_special_body_ports([0, 0])
    scanned = loop.get_iter_value(filled.output(0), -1)
    loop.get_iter_value(written.output(0), -1)
    return [scanned]


def _convert_selective_scan(context: Any) -> list[ov.Output]:
    """A Loop over axis 1 of `dt`, `x` [batch, tokens, channels] and `b`, `c` [batch, tokens, states]."""
    dt, x, b, c, a, state = (context.get_input(i) for i in range(6))
    dt_t, x_t, b_t, c_t = (ops.parameter([-1, 1, -1], np.float32) for _ in range(4))
    rates = ops.parameter([-1, -1], np.float32)
    memory = ops.parameter([-1, -1, -1], np.float32)
    tokens, last = ops.constant(np.int32(1)), ops.constant(np.int32(-1))
    dt_column, x_column = (ops.unsqueeze(ops.squeeze(t, tokens), last) for t in (dt_t, x_t))  # [batch, channels, 1]
    kept = ops.multiply(memory, ops.exp(ops.multiply(dt_column, rates)))
    written = ops.add(kept, ops.multiply(ops.multiply(dt_column, x_column), b_t))
    read = ops.unsqueeze(ops.reduce_sum(ops.multiply(written, c_t), last, False), tokens)
    results = [ops.constant([True], dtype=bool), written, read]
    body = ov.Model(results, [dt_t, x_t, b_t, c_t, rates, memory], "selective_scan")

    loop = ops.loop(_length(ops.shape_of(x), 1), ops.constant(True, dtype="bool"))
    loop.set_function(body)
    for parameter, whole in zip((dt_t, x_t, b_t, c_t), (dt, x, b, c), strict=True):
        loop.set_sliced_input(parameter, whole, 0, 1, 1, -1, 1)
    loop.set_invariant_input(rates, a)
    loop.set_merged_input(memory, state, written.output(0))
    loop.set_special_body_ports([-1, 0])
    scanned = loop.get_concatenated_slices(read.output(0), 0, 1, 1, -1, 1)
    loop.get_iter_value(written.output(0), -1)
    return [scanned]


def _convert_last_state(context: Any) -> list[ov.Output]:
    """The second output of the Loop whose first is given."""
    return [context.get_input(0).get_node().output(1)]


def _length(shape: ov.Node, axis: int) -> ov.Node:
    return ops.convert(ops.gather(shape, ops.constant(np.int32(axis)), ops.constant(np.int32(0))), "i32")


RECURRENT_EXTENSIONS: tuple[ConversionExtension, ...] = (
    ConversionExtension("edgert.gated_delta_rule.default", _convert_gated_delta_rule),
    ConversionExtension("edgert.selective_scan.default", _convert_selective_scan),
    ConversionExtension("edgert.last_state.default", _convert_last_state),
)
"""What `openvino.convert_model` needs for a trace in which `RECURRENCES` were in force."""

_KERNELS: dict[str, Callable[..., Any]] = {
    "causal_conv1d_fn": causal_conv1d_fn,
    "chunk_gated_delta_rule": chunk_gated_delta_rule,
    "mamba_chunk_scan_combined": mamba_chunk_scan_combined,
    "selective_scan_fn": selective_scan_fn,
}


def _mixers(model: PreTrainedModel) -> list[torch.nn.Module]:
    """Layers that would call the kernels of those libraries."""
    return [m for m in model.modules() if hasattr(m, "cuda_kernels_forward") or hasattr(m, "chunk_gated_delta_rule")]


def _use_kernels(model: PreTrainedModel) -> AbstractContextManager[None]:
    changes: list[tuple[Any, str, Any]] = []
    for mixer in _mixers(model):
        module = sys.modules[type(mixer).__module__]
        changes += [(mixer, "forward", _without_mask(mixer)), (module, "torch", _TorchWithoutCuda())]
        if hasattr(mixer, "dt_layernorm"):
            changes.append((mixer, "dt_proj", _WithoutBias(mixer.dt_proj)))
        for owner in (mixer, module):
            changes += [(owner, name, kernel) for name, kernel in _KERNELS.items() if hasattr(owner, name)]
    return replaced(*changes)


class _WithoutBias(torch.nn.Module):
    """A projection whose bias is data only: Jamba takes it away for the call and gives it to the kernel."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.bias = SimpleNamespace(data=linear.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.linear.weight)


class _TorchWithoutCuda:
    """`torch` for code that asks for the CUDA device of a tensor before it calls a kernel (Falcon-H1)."""

    cuda = SimpleNamespace(device=lambda device: nullcontext())

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _without_mask(mixer: torch.nn.Module) -> Callable[..., Any]:
    """The forward of `mixer` that calls kernels, without the mask.

    The mask is there for tokens to the left of a prompt. A session has none, and a state keeps nothing to mask later.
    """
    forward = getattr(mixer, "cuda_kernels_forward", mixer.forward)
    accepted = list(inspect.signature(forward).parameters)

    def run(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        values = {**dict(zip(accepted[1:], args, strict=False)), **kwargs, "attention_mask": None}
        return forward(hidden_states, **{name: value for name, value in values.items() if name in accepted})

    return run


def one_chunk(model: PreTrainedModel, tokens: int) -> AbstractContextManager[None]:
    """Settings with which transformers' own code computes `tokens` tokens of Mamba-2 rightly, to compare with it.

    Without kernels it loses the state from one chunk of tokens to the next and clips time steps that the kernels do not
    (Zamba2 and Nemotron-H up to 5.13, https://github.com/huggingface/transformers/issues/47246): so one chunk, and the
    limits of the kernels.
    """
    changes: list[tuple[Any, str, Any]] = []
    for mixer in _mixers(model):
        changes += [(mixer, "chunk_size", tokens)] * hasattr(mixer, "chunk_size")
        if hasattr(mixer, "time_step_min") and hasattr(mixer, "time_step_limit"):
            changes.append((mixer, "time_step_min", (mixer.time_step_limit or (0.0,))[0]))
    return replaced(*changes)


@contextmanager
def _plain_buffers(model: PreTrainedModel) -> Iterator[None]:
    odd = [
        (m._buffers, n, b) for m in model.modules() for n, b in m._buffers.items() if isinstance(b, torch.nn.Parameter)
    ]
    for buffers, name, buffer in odd:
        buffers[name] = buffer.detach()
    try:
        yield
    finally:
        for buffers, name, buffer in odd:
            buffers[name] = buffer


RECURRENCES: tuple[Adaptation, ...] = (
    Adaptation(
        name="recurrences",
        reason="for many tokens after earlier ones, transformers forgets the state (gated delta rule), squeezes away "
        "the tokens (Mamba) or loops over a number of tokens that is fixed while tracing",
        until="transformers continues a prompt from a state (its chunked prefill of hybrid models)",
        applies=lambda model: bool(_mixers(model)),
        apply=_use_kernels,
    ),
    Adaptation(
        name="buffers that are parameters",
        reason="falcon_mamba: `attribute 'b_c_rms' already exists` from torch.export, which registers it as both",
        until="transformers registers the weights of ones of Falcon Mamba as plain tensors",
        applies=lambda model: any(isinstance(buffer, torch.nn.Parameter) for buffer in model.buffers()),
        apply=_plain_buffers,
    ),
)
