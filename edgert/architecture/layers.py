"""What each family puts between the embedding and the head."""

from __future__ import annotations

from collections.abc import Iterable

from edgert.architecture.config import (
    BIASED,
    FOUR_NORMS,
    HYBRID_QWEN,
    LATENT,
    MAX_CONTEXT,
    MAX_EXPERTS,
    PARALLEL,
    QK_NORMS,
    Fields,
)
from edgert.architecture.parts import Matrix, Part
from edgert.errors import UsageError
from edgert.graph import BlockKind


def layers(f: Fields) -> Iterable[Part]:
    """The blocks between embedding and head."""
    if f.family == "nemotron_h":
        yield from _nemotron(f)
        return
    kinds = f.layer_kinds()
    for index, kind in enumerate(kinds):
        attention = _mixer(f, kind, index)
        ffn = _ffn(f, index)
        if f.family in PARALLEL and f.flag("use_parallel_residual", default=True):
            norms = f.hidden if f.family == "cohere2" else 0  # one norm serves both halves there
            attention.kind = BlockKind.BLOCK
            attention.matrices += ffn.matrices
            attention.vectors += ffn.vectors - norms
            yield attention
        else:
            yield attention
            yield ffn


def _mixer(f: Fields, kind: str, index: int) -> Part:
    """What mixes tokens: an attention of one kind or another, or a recurrence."""
    if kind == "linear_attention":
        return _delta_net(f)
    if f.family in LATENT:
        return _latent_attention(f)
    hidden = f.hidden
    heads = f.size("num_attention_heads", "n_head")
    kv_heads = f.size("num_key_value_heads", default=heads)
    dim = f.size("head_dim", default=max(1, hidden // heads))
    window = None
    if kind != "full_attention":
        name = "attention_chunk_size" if kind == "chunked_attention" else "sliding_window"
        window = f.size(name, most=MAX_CONTEXT) if name in f.data else None
    own_values = own_keys = True
    if f.family == "gemma4_text":
        if kind == "full_attention":
            dim = f.size("global_head_dim", default=dim)
            if f.flag("attention_k_eq_v", default=False):
                own_values, kv_heads = False, f.size("num_global_key_value_heads", default=kv_heads)
        first_shared = f.layers - f.size("num_kv_shared_layers", default=0, least=0, most=f.layers)
        own_keys = not index >= first_shared > 0
    if heads % kv_heads:
        raise UsageError(f"model configuration: num_attention_heads is {heads}, no multiple of {kv_heads} key heads")
    queries, keys = heads * dim, kv_heads * dim
    gated = f.family in HYBRID_QWEN  # its queries bring a gate of the output along
    matrices = [Matrix(queries * (2 if gated else 1), hidden), Matrix(hidden, queries)]
    if own_keys:
        matrices += [Matrix(keys, hidden)] * (2 if own_values else 1)
    norms = 2 if f.family in FOUR_NORMS else 1
    vectors = hidden * norms * f.norm_width
    biased = f.family in BIASED or f.flag("attention_bias", default=f.family == "gpt_oss")
    if biased or f.family == "qwen2":
        vectors += queries + 2 * keys + (hidden if biased else 0)
    if f.family == "gpt_oss":
        vectors += heads  # sinks
    if f.family in QK_NORMS:
        vectors += 2 * dim if own_keys else dim
    elif f.family == "olmo2":
        vectors += queries + keys
    return Part(
        BlockKind.ATTENTION, matrices, vectors, kv=2 * keys if own_keys else 0, score_flops=4 * queries, window=window
    )


def _latent_attention(f: Fields) -> Part:
    """Keys and values from a narrow latent (MLA); the cache holds them in full, as transformers keeps them."""
    hidden, heads = f.hidden, f.size("num_attention_heads")
    nope, rope, value = (f.size(name) for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    latent, queries = f.size("kv_lora_rank"), heads * (nope + rope)
    matrices = [
        Matrix(latent + rope, hidden), Matrix(heads * (nope + value), latent), Matrix(hidden, heads * value),
    ]  # fmt: skip
    narrow = f.size("q_lora_rank", default=0, least=0)
    matrices += [Matrix(narrow, hidden), Matrix(queries, narrow)] if narrow else [Matrix(queries, hidden)]
    kept = queries + heads * value
    return Part(BlockKind.ATTENTION, matrices, hidden + latent + narrow, kv=kept, score_flops=2 * kept)


def _delta_net(f: Fields) -> Part:
    """Qwen's gated delta net: a short convolution and a state `[heads, key, value]`."""
    key_dim, value_dim = f.size("linear_key_head_dim"), f.size("linear_value_head_dim")
    key_heads, heads = f.size("linear_num_key_heads"), f.size("linear_num_value_heads")
    kernel, values = f.size("linear_conv_kernel_dim", default=4), heads * value_dim
    mixed = 2 * key_heads * key_dim + values
    matrices = [
        Matrix(mixed, f.hidden), Matrix(values, f.hidden), Matrix(heads, f.hidden), Matrix(heads, f.hidden),
        Matrix(f.hidden, values), Matrix(mixed, kernel),
    ]  # fmt: skip
    recurrent = heads * key_dim * value_dim + mixed * kernel
    return Part(BlockKind.SSM, matrices, f.hidden + 2 * heads + value_dim, recurrent=recurrent)


def _ffn(f: Fields, index: int) -> Part:
    """A dense FFN or a mixture of experts, whichever layer `index` has."""
    norms = 2 if f.family in FOUR_NORMS else 1
    part = Part(BlockKind.FFN, [], f.hidden * norms * f.norm_width)
    if side := f.size("hidden_size_per_layer_input", default=0, least=0):
        part.matrices += [Matrix(side, f.hidden), Matrix(f.hidden, side)]
        part.vectors += f.hidden
    experts = _expert_count(f) if _has_experts(f, index) else 0
    if experts:
        _add_experts(f, part, experts)
    if not experts or f.family == "gemma4_text":  # Gemma 4 has both, side by side
        width = f.size("intermediate_size", "n_inner", default=4 * f.hidden if f.family == "gpt2" else None)
        if f.family == "llama4_text":
            width = f.size("intermediate_size_mlp")
        shared = f.layers - f.size("num_kv_shared_layers", default=0, least=0, most=f.layers)
        if f.flag("use_double_wide_mlp", default=False) and index >= shared > 0:
            width *= 2
        part.matrices += _dense(f.hidden, width, gated=f.family not in BIASED)
        if f.family in BIASED:
            part.vectors += width + f.hidden
    return part


def _dense(hidden: int, width: int, *, gated: bool = True) -> list[Matrix]:
    return [Matrix(width, hidden)] * (2 if gated else 1) + [Matrix(hidden, width)]


def _expert_count(f: Fields) -> int:
    return f.size("num_experts", "num_local_experts", "n_routed_experts", default=0, least=0, most=MAX_EXPERTS)


def _has_experts(f: Fields, index: int) -> bool:
    if f.family == "gemma4_text":
        return f.flag("enable_moe_block", default=False)
    if f.family == "llama4_text":
        step = f.size("interleave_moe_layer_step", default=1)
        return index in f.indices("moe_layers") if "moe_layers" in f.data else (index + 1) % step == 0
    sparse = (index + 1) % f.size("decoder_sparse_step", default=1) == 0
    dense = f.size("first_k_dense_replace", default=0, least=0)
    return sparse and index >= dense and index not in f.indices("mlp_only_layers")


def _add_experts(f: Fields, part: Part, count: int, *, gated: bool = True) -> None:
    """A router, `count` experts and those that every token uses."""
    part.kind = BlockKind.MOE
    used = f.size("num_experts_per_tok", "top_k_experts", most=count)
    inner = f.size("moe_intermediate_size", "intermediate_size")
    width = f.size("moe_latent_size", default=f.hidden)  # Nemotron's experts may work on a narrower stream
    part.matrices += [
        Matrix(count, f.hidden),
        Matrix(inner * (2 if gated else 1), width, count, used, "expert"),
        Matrix(width, inner, count, used, "expert"),
    ]
    if width != f.hidden:
        part.matrices += [Matrix(width, f.hidden), Matrix(f.hidden, width)]
    shared = inner * f.size("n_shared_experts", default=0, least=0)
    shared = f.size("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size", default=shared, least=0)
    if f.family == "llama4_text":
        shared = inner
    if shared:
        part.matrices += _dense(f.hidden, shared, gated=gated)
    if f.family in {"qwen2_moe", *HYBRID_QWEN}:
        part.matrices.append(Matrix(1, f.hidden))  # how much of the shared expert
    elif f.family == "gpt_oss":
        part.matrices += [Matrix(1, width, count, used, "table") for width in (2 * inner, f.hidden)]  # biases
        part.vectors += count
    elif f.family == "gemma4_text":
        part.vectors += 4 * f.hidden + count  # norms of the two halves, scales of the router


def _nemotron(f: Fields) -> Iterable[Part]:
    """Nemotron-H: every layer is a Mamba-2 mixer, an attention, a mixture of experts or an FFN, without gates."""
    letters = {"M": "mamba", "*": "attention", "E": "moe", "-": "mlp"}
    if not f.pattern:
        raise UsageError("model configuration (nemotron_h): it has no field 'hybrid_override_pattern'")
    for index, layer in enumerate(letters.get(item, item) for item in f.pattern):
        if layer == "mamba":
            yield _mamba(f)
        elif layer == "attention":
            yield _mixer(f, "full_attention", index)
        elif layer in {"moe", "mlp"}:
            part = Part(BlockKind.FFN, [], f.hidden)
            if layer == "moe":
                _add_experts(f, part, _expert_count(f), gated=False)
            else:
                part.matrices += _dense(f.hidden, f.size("intermediate_size"), gated=False)
            yield part
        else:
            raise UsageError(f"model configuration: layer {index} is {layer!r}, expected M, *, E or -")


def _mamba(f: Fields) -> Part:
    """A Mamba-2 mixer: a short convolution and a state `[heads, head, state]`."""
    heads, dim, state = f.size("mamba_num_heads"), f.size("mamba_head_dim"), f.size("ssm_state_size")
    inner = heads * dim
    mixed = inner + 2 * f.size("n_groups", "mamba_n_groups", default=8) * state
    kernel = f.size("conv_kernel", "mamba_d_conv", default=4)
    matrices = [Matrix(inner + mixed + heads, f.hidden), Matrix(f.hidden, inner), Matrix(mixed, kernel)]
    vectors = f.hidden + mixed + 3 * heads + inner
    return Part(BlockKind.SSM, matrices, vectors, recurrent=inner * state + mixed * kernel)
