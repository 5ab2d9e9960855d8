"""The gate: a converted model must compute what its source computes, before any compression, or there is no bundle.

Source and conversion see the same tokens, random ones and where there is a tokenizer those of a text: a prompt longer
than any attention window, then single tokens, then several after them, so that the cache, the positions and the mask
are exercised the way a session uses them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from edgert.bundle import Bundle
from edgert.cutting import cut
from edgert.device import DeviceConfig
from edgert.errors import ConversionError, ParityError, PlanError
from edgert.executor import Executor
from edgert.features import Taken
from edgert.graph import BlockGraph
from edgert.placement import Plan
from edgert.shapes import StaticShapes

LIMIT = 1e-3  # f32 round-off of real exports is 1e-7 to 1e-5; a wrong one is off by 1e-2 and more
CUT_LIMIT = 1e-5  # the same arithmetic in the same order: what differs is a mistake
PROMPT = 16
STEPS = 8
MORE = (7, 1, 5)  # tokens of the calls that follow the steps: not divisors of the chunks of any implementation
CHUNK = 256  # tokens at once, which bounds the logits in memory
COMPARED = 32  # last positions that are compared

# Exact arithmetic on OpenVINO's CPU plugin, whose defaults round to bf16, quantize activations and store u8 keys.
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}

Row = dict[str, Any]
Tokens = NDArray[np.int64]
Floats = NDArray[np.float32]
Decoder = Callable[[Tokens], Floats]
"""Takes the next tokens [1, query] of one sequence, remembers them, and gives logits [1, query, vocabulary]."""
Encoder = Callable[[Mapping[str, Tokens]], Floats]
"""Takes `input_ids`, `attention_mask`, `token_type_ids` [batch, tokens]; gives hidden states [batch, tokens, width]."""


def openvino_decoder(model: ov.Model, properties: Mapping[str, str] = EXACT) -> Decoder:
    """A canonical decoder on the CPU, by default in f32."""
    request = ov.Core().compile_model(model, "CPU", dict(properties)).create_infer_request()
    past, taken = 0, Taken.of(model)

    def step(ids: Tokens) -> Floats:
        nonlocal past
        inputs = decoder_inputs(ids, past, taken)
        past += ids.shape[1]
        return np.array(request.infer({**inputs, "beam_idx": np.zeros(1, np.int32)})["logits"])

    return step


def openvino_encoder(model: ov.Model) -> Encoder:
    """A canonical encoder on the CPU, in f32."""
    compiled = ov.Core().compile_model(model, "CPU", EXACT)
    names = [port.any_name for port in model.inputs]
    return lambda inputs: np.array(compiled({name: inputs[name] for name in names})["last_hidden_state"])


def torch_decoder(model: Any) -> Decoder:
    """A causal language model of transformers with its own kind of cache.

    One with recurrent states computes every call from the first token on: going on from a state with several tokens,
    transformers 5.5 forgets the state (gated delta rule) or fails (Mamba).
    """
    import torch
    from edgert.converters.general.recurrent import one_chunk
    from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin

    cache: dict[str, Any] = {}
    seen = np.zeros((1, 0), np.int64)

    def step(ids: Tokens) -> Floats:
        nonlocal seen
        seen = np.concatenate([seen, ids], axis=1)
        new = ids if cache else seen
        with torch.no_grad(), one_chunk(model, new.shape[1]):
            output = model(input_ids=torch.from_numpy(new), use_cache=True, **cache)
        kept = getattr(output, "past_key_values", None)
        layers = getattr(kept, "layers", ())
        plain = [isinstance(t, CacheLayerMixin) and not isinstance(t, LinearAttentionCacheLayerMixin) for t in layers]
        if plain and all(plain):
            cache["past_key_values"] = kept
        logits: Floats = output.logits[:, -ids.shape[1] :].float().numpy()
        return logits

    return step


def torch_encoder(model: Any) -> Encoder:
    """A bare encoder of transformers."""
    import inspect

    import torch

    accepted = inspect.signature(model.forward).parameters

    def run(inputs: Mapping[str, Tokens]) -> Floats:
        with torch.no_grad():
            output = model(**{name: torch.from_numpy(value) for name, value in inputs.items() if name in accepted})
        hidden: Floats = output.last_hidden_state.float().numpy()
        return hidden

    return run


def onnx_session(path: Path) -> Any:
    """An onnxruntime session on its CPU provider.

    Raises:
        ConversionError: onnxruntime does not take the file.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # classes of its C++ module, without a common base
        raise ConversionError(f"{path.name}: onnxruntime refuses it: {str(error).splitlines()[0]}") from error


def onnx_decoder(path: Path, pairs: Mapping[str, str], names: Mapping[str, str]) -> Decoder:
    """An ONNX decoder in onnxruntime.

    Args:
        pairs: for each cache input the output that continues it.
        names: what the file calls `logits` and, where it has them, the canonical inputs.
    """
    session = onnx_session(path)
    ports = {port.name: port for port in session.get_inputs()}
    kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
    cache = {
        name: np.zeros([1, ports[name].shape[1], 0, ports[name].shape[3]], kinds[ports[name].type]) for name in pairs
    }
    past = 0

    def step(ids: Tokens) -> Floats:
        nonlocal past
        inputs = {names[name]: value for name, value in decoder_inputs(ids, past).items() if name in names}
        past += ids.shape[1]
        first, *presents = session.run([names["logits"], *pairs.values()], {**inputs, **cache})
        cache.update(zip(pairs, presents, strict=True))
        return np.asarray(first, np.float32)

    return step


def onnx_encoder(path: Path, names: Mapping[str, str]) -> Encoder:
    """An ONNX encoder in onnxruntime; `names` is what the file calls `last_hidden_state` and the canonical inputs."""
    session = onnx_session(path)
    output = names["last_hidden_state"]

    def run(inputs: Mapping[str, Tokens]) -> Floats:
        values = {names[name]: value for name, value in inputs.items() if name in names}
        return np.asarray(session.run([output], values)[0], np.float32)

    return run


def decoder_inputs(ids: Tokens, past: int, taken: Taken | None = None) -> dict[str, NDArray[Any]]:
    """The canonical inputs, but for beam_idx, of `ids` [1, query] after `past` tokens; `taken`: what else there is."""
    end = past + ids.shape[1]
    positions = np.arange(past, end, dtype=np.int64)[None]
    inputs = {"input_ids": ids, "attention_mask": np.ones((1, end), np.int64), "position_ids": positions}
    if taken is None:
        return inputs
    if taken.axes:
        inputs["position_ids"] = np.broadcast_to(positions, (taken.axes, *positions.shape))
    return {**inputs, **taken.zeros(ids.shape[1])}


def check_decoder(
    candidate: Decoder,
    reference: Decoder,
    *,
    vocab_size: int,
    window: int | None,
    against: str,
    limit: float = LIMIT,
    text: Sequence[int] | None = None,
) -> Row:
    """Compare a prefill, `STEPS` single tokens and several at once after them; both decoders must be new.

    Args:
        vocab_size: tokens are drawn below it.
        window: the sliding attention window in tokens, which the prompt then exceeds.
        against: what `reference` is, for the report.
        text: tokens of a text, repeated as often as needed, to compare with in place of random ones.

    Returns:
        a row of `edgert.bundle.Report.checks`.

    Raises:
        ParityError: max |a - b| / max |b| is above `limit`, or not a number.
    """
    prompt = max(PROMPT, (window or 0) + PROMPT // 2)
    after = [1] * STEPS + list(MORE)
    shape = (1, prompt + sum(after))
    ids = _tokens(shape, vocab_size) if text is None else np.resize(np.array(text, np.int64), shape)
    chunks = [min(CHUNK, prompt - start) for start in range(0, prompt, CHUNK)] + after
    kind = "random tokens" if text is None else "tokens of a text"
    name = f"logits of {kind}: a prefill of {prompt}, {STEPS} decode steps, then {' + '.join(map(str, MORE))} tokens"
    return compared(name, _run(candidate, ids, chunks), _run(reference, ids, chunks), against, limit)


def check_cut(path: Path, graph: BlockGraph, *, task: str, vocab_size: int) -> Row:
    """Compare the model cut at every boundary of its block graph with the uncut one.

    Raises:
        ParityError, PlanError: it cannot be cut there without changing what it says.
    """
    core = ov.Core()
    name, against = "cut at every boundary", "the uncut model"
    boundaries = [(block.index, block.index) for block in graph.blocks]
    if task == "encoder":
        inputs = _padded(vocab_size)
        real = inputs["attention_mask"].astype(bool)
        expected = openvino_encoder(core.read_model(path))(inputs)[real]
        chain = chained(cut(core.read_model(path), graph, boundaries))
        return compared(name, chain(dict(inputs))[real], expected, against, CUT_LIMIT)
    ids, chunks = _tokens((1, PROMPT + STEPS), vocab_size), [PROMPT] + [1] * STEPS
    expected = _run(openvino_decoder(core.read_model(path)), ids, chunks)
    taken = Taken.of(uncut := core.read_model(path))
    chain = chained(cut(uncut, graph, boundaries))
    past = 0

    def step(tokens: Tokens) -> Floats:
        nonlocal past
        inputs = decoder_inputs(tokens, past, taken)
        past += tokens.shape[1]
        return chain({**inputs, "beam_idx": np.zeros(1, np.int32)})

    return compared(name, _run(step, ids, chunks), expected, against, CUT_LIMIT)


def check_static(bundle: Bundle, limit: float = LIMIT) -> Row:
    """Compare a decoder with its static submodels as an NPU gets them, run by the CPU: padding, buckets and all.

    Args:
        bundle: may be unfinished: only the model, its facts and its block graph are looked at.

    Raises:
        ParityError: as `check_decoder`.
        PlanError: the model cannot have static shapes.
    """
    assert bundle.graph is not None
    ids = _tokens((1, PROMPT + STEPS), bundle.facts.vocab_size)
    shapes = StaticShapes(chunks=(PROMPT + 3,), buckets=(PROMPT + 3, PROMPT + STEPS + 3))
    logits = []
    for variant in ("f32+static", "f32"):
        plan = Plan.single(bundle.graph, DeviceConfig("CPU", variant))
        logits.append(_run(_sequence(Executor(bundle, plan, shapes=shapes)), ids, [PROMPT] + [1] * STEPS))
    found, expected = logits
    return compared("logits with static shapes", found, expected, "the dynamic model", limit)


def _sequence(executor: Executor) -> Decoder:
    run = executor.open()

    def step(ids: Tokens) -> Floats:
        return np.array(run.forward(ids[0].tolist(), keep=ids.shape[1])[None])

    return step


def chained(submodels: list[ov.Model]) -> Callable[[dict[str, Any]], Floats]:
    """Submodels one after the other, each output an input of later ones, and kept in what is given.

    Gives the first output of the last one.

    Raises:
        PlanError: when it is called, a submodel wants what none before it gives.
    """
    core = ov.Core()
    stages = [
        (
            core.compile_model(submodel, "CPU", EXACT).create_infer_request(),
            [port.any_name for port in submodel.outputs],
        )
        for submodel in submodels
    ]

    def run(values: dict[str, Any]) -> Floats:
        for request, outputs in stages:
            names = [port.any_name for port in request.model_inputs]
            if unknown := [name for name in names if name not in values]:
                raise PlanError(f"a submodel wants {unknown[0]!r}, which none before it gives")
            results = request.infer({name: values[name] for name in names}).to_tuple()
            values |= dict(zip(outputs, results, strict=True))
        last: Floats = results[0]
        return last

    return run


def check_states(new: Callable[[], Decoder], *, vocab_size: int, limit: float = LIMIT) -> Row:
    """Where there is no second implementation to compare with: token by token against all at once.

    This shows that caches, positions and mask are wired rightly, not that the weights are.

    Raises:
        ParityError: as `check_decoder`.
    """
    ids = _tokens((1, PROMPT + STEPS), vocab_size)
    stepwise = _run(new(), ids, [PROMPT] + [1] * STEPS)
    return compared(
        "logits step by step", stepwise, _run(new(), ids, [PROMPT + STEPS]), "the same model in one pass", limit
    )


def check_encoder(
    candidate: Encoder, reference: Encoder, *, vocab_size: int, against: str, limit: float = LIMIT
) -> Row:
    """Compare hidden states of two sequences, one of them padded to half.

    Raises:
        ParityError: as `check_decoder`.
    """
    inputs = _padded(vocab_size)
    real = inputs["attention_mask"].astype(bool)
    return compared("hidden states, with padding", candidate(inputs)[real], reference(inputs)[real], against, limit)


def transformers_name() -> str:
    """What to call transformers as the other side of a check."""
    return f"transformers {version('transformers')} in f32"


def attention_window(config: Mapping[str, Any]) -> int | None:
    """The sliding window or attention chunk in a config.json, in tokens; of the language model if there is more.

    None where no layer has one or none is ever reached.
    """
    nested = config.get("text_config") or config.get("llm_config") or config.get("language_config")
    text = {**config, **nested} if isinstance(nested, Mapping) else dict(config)
    context, kinds = text.get("max_position_embeddings"), text.get("layer_types")
    windows = [
        int(text[key])
        for key, kind in (("sliding_window", "sliding_attention"), ("attention_chunk_size", "chunked_attention"))
        if text.get(key) and kind in (kinds or [kind])
    ]
    longest = max(windows, default=None)
    room = PROMPT + STEPS + sum(MORE)
    return None if longest is None or (context and longest + room > context) else longest


def _padded(vocab_size: int) -> dict[str, Tokens]:
    """Inputs of an encoder: two sequences, one of them padded to half."""
    shape = (2, PROMPT)
    mask = np.ones(shape, np.int64)
    mask[1, PROMPT // 2 :] = 0
    return {
        "input_ids": _tokens(shape, vocab_size),
        "attention_mask": mask,
        "token_type_ids": np.zeros(shape, np.int64),
    }


def _tokens(shape: tuple[int, int], vocab_size: int) -> Tokens:
    return np.random.default_rng(0).integers(0, vocab_size, shape, dtype=np.int64)


def _run(decoder: Decoder, ids: Tokens, chunks: list[int]) -> Floats:
    """Feed `ids` in `chunks`; logits of the last `COMPARED` positions."""
    kept: list[Floats] = []
    start = 0
    for chunk in chunks:
        logits = decoder(ids[:, start : start + chunk])
        start += chunk
        first = max(0, ids.shape[1] - COMPARED - (start - chunk))
        kept.append(logits[0, first:])
    return np.concatenate(kept)


def compared(name: str, found: Floats, expected: Floats, against: str, limit: float) -> Row:
    """A row of `edgert.bundle.Report.checks`; raises `ParityError` where max |a - b| / max |b| is above `limit`."""
    if found.shape != expected.shape:
        raise ParityError(
            f"{name}: shape {found.shape}, {against} gives {expected.shape}", relative_error=float("inf"), limit=limit
        )
    error = float(np.max(np.abs(found - expected)) / np.max(np.abs(expected)))
    if not error <= limit:  # also for NaN
        raise ParityError(
            f"{name}: relative error {error:.2e} against {against}, at most {limit:.0e} allowed; no bundle is written",
            relative_error=error,
            limit=limit,
        )
    return {"check": name, "relative_error": error, "limit": limit, "against": against}
