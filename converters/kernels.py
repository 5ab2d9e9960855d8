"""Weights packed for edgert's CPU kernels, and the check that the kernels compute what the model does."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from edgert.converters.canonical import DECODER_OUTPUT
from edgert.converters.quality import Decoder, Floats, Tokens, check_decoder, decoder_inputs, openvino_decoder

from edgert import native
from edgert.errors import ParityError
from edgert.features import Taken
from edgert.kernel_lowering import CACHE, PAST, lower, packables
from edgert.kernelfile import PackedWeights, PackedWriter, make_unusable
from edgert.kvlayout import blocks_of

# Activations in INT8 cost both OpenVINO and the kernels some exactness, and how much depends on the model. An operation
# that is wired wrongly costs all of it.
LEAST_LIMIT = 0.05
TIMES_OPENVINO = 4
_QUANTIZED = {"INFERENCE_PRECISION_HINT": "f32"}  # the rest are the plugin's defaults: activations in INT8

Row = dict[str, Any]


def add_kernels(folder: Path, *, vocab_size: int, window: int | None) -> list[Row]:
    """Pack the weights of the model in a bundle in the making; a decoder is checked where the kernels load.

    Args:
        folder: holds model.xml and model.bin; kernels.json and kernels.bin are added.
        vocab_size, window: as in `quality.check_decoder`.

    Returns:
        Rows of `edgert.bundle.Report.checks`. Where the check fails no weights are kept, and the index says why.

    Raises:
        OSError: the disk did not take them.
    """
    core = ov.Core()
    if not pack(folder) or not native.load(core).loads:
        return []
    try:
        return [_check(core, folder, vocab_size, window)]
    except ParityError as error:
        reason = f"relative error {error.relative_error:.2e} against OpenVINO in f32, at most {error.limit:.0e} allowed"
    gc.collect()  # Windows removes no file that is still memory-mapped
    make_unusable(folder, reason)
    return []


def pack(folder: Path) -> bool:
    """Add kernels.json and kernels.bin to a folder with model.xml and model.bin; tells whether that is a decoder.

    Raises:
        OSError: the disk did not take them.
    """
    model = ov.Core().read_model(folder / "model.xml")
    found = packables(model)
    with PackedWriter(folder, found.refused) as writer:
        for packable in found.packed:
            writer.add(packable.key, packable.shape, packable.content, packable.pack)
    return any(DECODER_OUTPUT in port.get_names() for port in model.outputs)


def _check(core: ov.Core, folder: Path, vocab_size: int, window: int | None) -> Row:
    """Compare the kernels, keys and values in f16, with OpenVINO in f32; raises `ParityError` as `check_decoder`."""
    path = folder / "model.xml"
    exact = _Recorded(lambda: openvino_decoder(core.read_model(path)))

    def compare(candidate: Decoder, limit: float) -> Row:
        return check_decoder(
            candidate, exact.again(), vocab_size=vocab_size, window=window, against="OpenVINO in f32", limit=limit
        )

    quantized = compare(openvino_decoder(core.read_model(path), _QUANTIZED), float("inf"))
    limit = max(LEAST_LIMIT, TIMES_OPENVINO * quantized["relative_error"])
    row = compare(_kernel_decoder(core, folder), limit)
    return {**row, "check": f"CPU kernels: {row['check']}"}


class _Recorded:
    """A decoder that runs once and can be asked for the same tokens again: in f32 it is by far the slowest."""

    def __init__(self, make: Callable[[], Decoder]) -> None:
        self._make = make
        self._decoder: Decoder | None = None
        self._logits: list[Floats] = []

    def again(self) -> Decoder:
        calls = 0

        def step(ids: Tokens) -> Floats:
            nonlocal calls
            if calls == len(self._logits):
                self._decoder = self._decoder or self._make()
                self._logits.append(self._decoder(ids))
            calls += 1
            return self._logits[calls - 1]

        return step


def _kernel_decoder(core: ov.Core, folder: Path) -> Decoder:
    """The model on the kernels, as far as they go."""
    model = core.read_model(folder / "model.xml")
    lowered = lower(model, PackedWeights.open(folder), native.factory(), precision="f16")
    compiled = core.compile_model(lowered.model, "CPU", _QUANTIZED)
    request, wanted = compiled.create_infer_request(), {port.any_name for port in compiled.inputs}
    caches = [cache.layout.empty(0) for cache in lowered.caches]
    past, taken = 0, Taken.of(model)

    def step(ids: Tokens) -> Floats:
        nonlocal past
        end = past + ids.shape[1]
        inputs: dict[str, Any] = {**decoder_inputs(ids, past, taken), "beam_idx": np.zeros(1, np.int32)}
        inputs[PAST] = np.array([past], np.int64)
        for number, cache in enumerate(lowered.caches):
            larger = cache.layout.empty(blocks_of(end))
            larger[: len(caches[number])] = caches[number]
            caches[number] = larger
            inputs[f"{CACHE}{number}"] = ov.Tensor(larger, shared_memory=True)  # the kernels write into it
        past = end
        return np.array(request.infer({name: inputs[name] for name in wanted})["logits"])

    return step
