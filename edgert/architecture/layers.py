"""What each family puts between the embedding and the head."""

from __future__ import annotations

from collections.abc import Iterable

from edgert.architecture.config import MAX_CONTEXT, MAX_EXPERTS, Fields
from edgert.architecture.mixers import delta_net, mamba, short_convolution
from edgert.architecture.parts import Matrix, Part
from edgert.errors import UsageError
from edgert.graph import BlockKind

_WINDOWS = {"chunked_attention": "attention_chunk_size"}


def layers(f: Fields) -> Iterable[Part]:
    """The blocks between embedding and head."""
    if f.family == "nemotron_h":
        yield from _nemotron(f)
        return
    for index, kind in enumerate(f.layer_kinds()):
        mixer, ffn = _mixer(f, kind, index), _ffn(f, index)
        if f.traits.parallel and f.flag("use_parallel_residual", default=True):
            mixer.kind = BlockKind.BLOCK
            mixer.matrices += ffn.matrices
            mixer.vectors += ffn.vectors - (f.hidden if f.traits.shared_norm else 0)
            yield mixer
        else:
            yield mixer
            yield ffn


def _mixer(f: Fields, kind: str, index: int) -> Part:
    """What mixes tokens: an attention of one kind or another, a recurrence, or both."""
    if kind == "linear_attention":
        return delta_net(f)
    if kind == "mamba":
        return mamba(f)
    if kind == "conv":
        return short_convolution(f)
    if f.traits.latent:
        return _latent_attention(f)
    attention = _attention(f, kind, index)
    if f.traits.both:
        attention.kind, beside = BlockKind.BLOCK, mamba(f)
        attention.matrices += beside.matrices
        attention.vectors += beside.vectors - f.hidden  # one norm serves both
        attention.recurrent, attention.fixed_states = beside.recurrent, beside.fixed_states
        attention.constants += beside.constants
    return attention


def _attention(f: Fields, kind: str, index: int) -> Part:
    hidden, traits = f.hidden, f.traits
    heads = f.size("num_attention_heads", "n_head")
    kv_heads = heads if traits.encoder else f.size("num_key_value_heads", default=heads)
    dim = f.size("head_dim", default=max(1, hidden // heads))
    window = None
    if kind != "full_attention":
        name = _WINDOWS.get(kind, "local_attention" if traits.encoder else "sliding_window")
        window = f.size(name, most=MAX_CONTEXT) if name in f.data else None
    own_values = own_keys = True
    if f.family == "gemma4_text":
        if kind == "full_attention":
            dim = f.size("global_head_dim", default=dim)
            if f.flag("attention_k_eq_v", default=False):
                own_values, kv_heads = False, f.size("num_global_key_value_heads", default=kv_heads)
        own_keys = not index >= _first_shared(f) > 0
    if heads % kv_heads:
        raise UsageError(f"model configuration: num_attention_heads is {heads}, no multiple of {kv_heads} key heads")
    queries, keys = heads * dim, kv_heads * dim
    matrices = [Matrix(queries * (2 if traits.query_gate else 1), hidden), Matrix(hidden, queries)]
    if own_keys:
        matrices += [Matrix(keys, hidden)] * (2 if own_values else 1)
    vectors = hidden * traits.norms * f.norm_width
    if traits.encoder and not traits.norm_bias and index == 0:
        vectors = 0  # ModernBERT's embedding has been scaled already
    biased = traits.bias == "all" or f.flag("attention_bias", default=traits.attention_bias)
    if biased or traits.bias:
        vectors += queries + 2 * keys
    if biased and (traits.output_bias or f.flag("attention_out_bias", default=False)):
        vectors += hidden
    if traits.sinks:
        vectors += heads
    if traits.qk_norm == "head" and f.flag("use_qk_norm", default=True):
        vectors += 2 * dim if own_keys else dim
    elif traits.qk_norm == "all" and f.flag("use_qk_norm", default=True):
        vectors += queries + keys
    kept = 2 * keys if own_keys and not traits.encoder else 0
    return Part(BlockKind.ATTENTION, matrices, vectors, kv=kept, score_flops=4 * queries, window=window)


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


def _ffn(f: Fields, index: int) -> Part:
    """A dense FFN or a mixture of experts, whichever layer `index` has."""
    part = Part(BlockKind.FFN, [], f.hidden * f.traits.norms * f.norm_width)
    if side := f.size("hidden_size_per_layer_input", default=0, least=0):
        part.matrices += [Matrix(side, f.hidden), Matrix(f.hidden, side)]
        part.vectors += f.hidden
    experts = _expert_count(f) if _has_experts(f, index) else 0
    if experts:
        _add_experts(f, part, experts)
    if not experts or f.family == "gemma4_text":  # Gemma 4 has both, side by side
        width = _ffn_width(f, index)
        gated = f.traits.gated
        part.matrices += _dense(f.hidden, width, gated=gated)
        if f.traits.bias == "all" or f.flag("mlp_bias", default=False):
            part.vectors += width * (2 if gated else 1) + f.hidden
    return part


def _ffn_width(f: Fields, index: int) -> int:
    if f.family == "llama4_text":
        return f.size("intermediate_size_mlp")
    if f.family == "granitemoehybrid":
        return f.size("shared_intermediate_size")
    width = f.size("intermediate_size", "n_inner", default=4 * f.hidden if f.family == "gpt2" else None)
    if f.family == "lfm2" and f.flag("block_auto_adjust_ff_dim", default=True):
        step = f.size("block_multiple_of", default=256)
        width = -(-int(f.number("block_ffn_dim_multiplier", default=1.0) * (2 * width // 3)) // step) * step
    if f.flag("use_double_wide_mlp", default=False) and index >= _first_shared(f) > 0:
        width *= 2
    return width


def _first_shared(f: Fields) -> int:
    """The first of the layers that use the keys and values of earlier ones; the number of layers where none do."""
    return f.layers - f.size("num_kv_shared_layers", default=0, least=0, most=f.layers)


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
    sparse = (index + 1) % f.size("decoder_sparse_step", "moe_layer_interval", default=1) == 0
    dense = f.size("first_k_dense_replace", default=0, least=0)
    last = f.size("moe_layer_end_index", default=f.layers - 1, least=-1)
    last = f.layers - 1 if last == -1 else last
    return sparse and dense <= index <= last and index not in f.indices("mlp_only_layers")


def _add_experts(f: Fields, part: Part, count: int) -> None:
    """A router, `count` experts and those that every token uses."""
    part.kind, traits = BlockKind.MOE, f.traits
    used = f.size("num_experts_per_tok", "top_k_experts", most=count)
    inner = f.size("moe_intermediate_size", "intermediate_size")
    width = f.size("moe_latent_size", default=f.hidden)  # Nemotron's experts may work on a narrower stream
    part.matrices += [
        Matrix(count, f.hidden, role="router"),
        Matrix(inner * (2 if traits.experts_gated else 1), width, count, used),
        Matrix(width, inner, count, used),
    ]
    if width != f.hidden:
        part.matrices += [Matrix(width, f.hidden), Matrix(f.hidden, width)]
    shared = inner * f.size("n_shared_experts", default=0, least=0)
    names = ("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size", "shared_intermediate_size")
    shared = f.size(*names, default=shared, least=0)
    if f.family == "llama4_text":
        shared = inner
    if shared:
        part.matrices += _dense(f.hidden, shared, gated=traits.experts_gated)
    if traits.shared_gate:
        part.matrices.append(Matrix(1, f.hidden))
    if traits.expert_bias:
        part.vectors += count * (2 * inner + f.hidden)
    part.vectors += count if traits.router_bias else 0
    part.constants += count if traits.corrected else 0
    if f.family == "gemma4_text":
        part.vectors += 4 * f.hidden  # norms of the two halves, scales of the router
        part.matrices.append(Matrix(count, 1, role="table"))  # a scale an expert, looked up


def _nemotron(f: Fields) -> Iterable[Part]:
    """Nemotron-H: every layer is a Mamba-2 mixer, an attention, a mixture of experts or an FFN, without gates."""
    letters = {"M": "mamba", "*": "attention", "E": "moe", "-": "mlp"}
    if not f.pattern:
        raise UsageError("model configuration (nemotron_h): it has no field 'hybrid_override_pattern'")
    for index, layer in enumerate(letters.get(item, item) for item in f.pattern):
        if layer == "mamba":
            yield mamba(f)
        elif layer == "attention":
            yield _attention(f, "full_attention", index)
        elif layer in {"moe", "mlp"}:
            part = Part(BlockKind.FFN, [], f.hidden)
            if layer == "moe":
                _add_experts(f, part, _expert_count(f))
            else:
                part.matrices += _dense(f.hidden, f.size("intermediate_size"), gated=False)
            yield part
        else:
            raise UsageError(f"model configuration: layer {index} is {layer!r}, expected M, *, E or -")
