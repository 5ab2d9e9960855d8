"""What mixes tokens by a state of fixed size: delta nets, Mamba-2, short convolutions."""

from __future__ import annotations

from edgert.architecture.config import Fields
from edgert.architecture.parts import Matrix, Part
from edgert.graph import BlockKind


def delta_net(f: Fields) -> Part:
    """Qwen's gated delta net: a short convolution and a state `[heads, key, value]`."""
    key_dim, value_dim = f.size("linear_key_head_dim"), f.size("linear_value_head_dim")
    key_heads, heads = f.size("linear_num_key_heads"), f.size("linear_num_value_heads")
    kernel, values = f.size("linear_conv_kernel_dim", default=4), heads * value_dim
    mixed = 2 * key_heads * key_dim + values
    matrices = [
        Matrix(mixed, f.hidden), Matrix(values, f.hidden), Matrix(heads, f.hidden), Matrix(heads, f.hidden),
        Matrix(f.hidden, values), Matrix(mixed, kernel, role="conv"),
    ]  # fmt: skip
    kept = heads * key_dim * value_dim + mixed * kernel
    vectors = f.hidden + 2 * heads + value_dim
    return Part(BlockKind.SSM, matrices, vectors, recurrent=kept, fixed_states=("conv", "recurrent"))


def mamba(f: Fields) -> Part:
    """A Mamba-2 mixer: a short convolution and a state `[heads, head, state]`."""
    heads = f.size("mamba_num_heads", "mamba_n_heads")
    if f.data.get("mamba_d_head") == "auto":
        dim = f.size("mamba_expand", default=2) * f.hidden // heads
    else:
        dim = f.size("mamba_head_dim", "mamba_d_head")
    state = f.size("ssm_state_size", "mamba_d_state")
    inner = heads * dim
    mixed = inner + 2 * f.size("n_groups", "mamba_n_groups", default=8) * state
    kernel = f.size("conv_kernel", "mamba_d_conv", default=4)
    matrices = [
        Matrix(inner + mixed + heads, f.hidden), Matrix(f.hidden, inner), Matrix(mixed, kernel, role="conv"),
    ]  # fmt: skip
    vectors = f.hidden + 3 * heads
    if f.flag("use_conv_bias", default=f.flag("mamba_conv_bias", default=True)):
        vectors += mixed
    if f.flag("mamba_proj_bias", default=False):
        vectors += inner + mixed + heads + f.hidden
    if f.flag("mamba_rms_norm", default=f.traits.gated_norm):
        vectors += inner
    kept = inner * state + mixed * kernel
    return Part(BlockKind.SSM, matrices, vectors, recurrent=kept, fixed_states=("conv", "recurrent"))


def short_convolution(f: Fields) -> Part:
    """LFM2's gated short convolution; its state is the last inputs `[hidden, kernel]`."""
    kernel, hidden = f.size("conv_L_cache", default=3), f.hidden
    matrices = [Matrix(3 * hidden, hidden), Matrix(hidden, hidden), Matrix(hidden, kernel, role="conv")]
    vectors = hidden + (5 * hidden if f.flag("conv_bias", default=False) else 0)
    return Part(BlockKind.SSM, matrices, vectors, recurrent=hidden * kernel, fixed_states=("conv",))
