"""The matrices of a model as NNCF compresses them: one small IR for each block, format and method, kept on disk.

Blocks are compressed one at a time, with what reaches them in the f16 model as data, so that no more than a block is in
memory, and an interrupted search finds what it had.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import openvino as ov
import openvino.opset13 as ops
from edgert.converters.compress import WeightUse, routers, weight_uses
from edgert.converters.mixed.chain import Array, State
from edgert.converters.mixed.matrices import Matrix, choosable
from edgert.converters.mixed.nncf_runs import INT4, NEEDS_DATA, Method, compress_exactly, sensitivity_metrics
from edgert.converters.quality import EXACT

from edgert.errors import ConversionError, cause
from edgert.irgraph import make_names_unique
from edgert.precision.formats import Format


class Variants:
    """Compressed matrices of a model.

    Args:
        folder: where they are kept.
        submodels: of the f16 model, one for each block; not changed.
        kept_bytes: of matrices in f32 that are kept in memory; the oldest make room.
    """

    def __init__(
        self, folder: Path, submodels: Sequence[ov.Model], matrices: Sequence[Matrix], *, kept_bytes: int
    ) -> None:
        self._folder, self._submodels, self._kept_bytes = folder, submodels, kept_bytes
        self._kept: OrderedDict[tuple[str, str, str], Array] = OrderedDict()
        self._by_constant = {matrix.constant: matrix for matrix in matrices}
        self._core = ov.Core()
        folder.mkdir(parents=True, exist_ok=True)

    def make(self, block: int, format: Format, method: Method, samples: Callable[[], Sequence[State]]) -> list[Matrix]:
        """Compress the matrices of a block to a format, if that was not done before.

        A table that is tied to the head is compressed with the head.

        Args:
            samples: what reaches the block, asked for where the method needs data.

        Returns:
            those that the format fits.

        Raises:
            ConversionError: NNCF cannot compress them.
        """
        submodel = self._submodels[block]
        chosen: list[tuple[Matrix, WeightUse]] = []
        left_out: list[tuple[Matrix, WeightUse]] = []
        for use in choosable(submodel):
            matrix = self._matrix(use)
            fits = matrix.blocks[-1] == block and format.fits(matrix.shape)
            (chosen if fits else left_out).append((matrix, use))
        path = self._path(block, format, method)
        if chosen and not path.exists():
            ignored = [str(use.node.get_friendly_name()) for _, use in left_out] + sorted(routers(submodel))
            data = _samples(submodel, samples()) if method in NEEDS_DATA else None
            _save(compress_exactly(submodel.clone(), format, method, data, ignored), path)
        return [matrix for matrix, _ in chosen]

    def metrics(self, block: int, states: Sequence[State]) -> dict[str, dict[str, float]]:
        """NNCF's sensitivity metrics of the products in a block, by the matrix' name and the metric's."""
        submodel = self._submodels[block]
        products = [
            use
            for use in choosable(submodel)
            if use.role != "embedding" and self._matrix(use).blocks[-1] == block and INT4.fits(self._matrix(use).shape)
        ]
        plain = {str(use.node.get_friendly_name()): self._matrix(use) for use in products}
        if not plain:
            return {}
        ignored = [str(use.node.get_friendly_name()) for use in weight_uses(submodel)]
        ignored = [name for name in ignored if name not in plain]
        found = sensitivity_metrics(submodel.clone(), _samples(submodel, states), ignored)
        return {plain[name].name: scores for name, scores in found.items() if name in plain}

    def weights(self, matrix: Matrix, format: Format, method: Method) -> Array:
        """A matrix in a format, as f32 `[out, in]`; not to be changed."""
        key = (matrix.name, format.name, method)
        if key not in self._kept:
            if format.group_size is None:
                constants = (use.constants[0] for use in choosable(self._submodels[matrix.blocks[0]]))
                found = next(c for c in constants if c.get_friendly_name() == matrix.constant)
                value = np.asarray(found.data, np.float32)
            else:
                value = self._decompressed(matrix, format, method)
            while self._kept and sum(a.nbytes for a in self._kept.values()) + value.nbytes > self._kept_bytes:
                self._kept.popitem(last=False)
            self._kept[key] = value
        self._kept.move_to_end(key)
        return self._kept[key]

    def put(self, model: ov.Model, chosen: Mapping[str, tuple[Format, Method]]) -> None:
        """Let a copy of the f16 model read its matrices in other formats, by their names; in place. The others stay."""
        sources: dict[str, ov.Output] = {}
        for use in choosable(model):
            matrix = self._matrix(use)
            choice = chosen.get(matrix.name)
            if choice is None or choice[0].group_size is None:
                continue
            if matrix.name not in sources:
                sources[matrix.name] = self._source(matrix, *choice)[0]
            use.port.replace_source_output(sources[matrix.name])
        model.validate_nodes_and_infer_types()

    def _matrix(self, use: WeightUse) -> Matrix:
        return self._by_constant[use.constants[0].get_friendly_name()]

    def _path(self, block: int, format: Format, method: Method) -> Path:
        return self._folder / f"{block:03}-{format.name}-{method}.xml"

    def _source(self, matrix: Matrix, format: Format, method: Method) -> tuple[ov.Output, list[ov.Node]]:
        """What computes a matrix, f32, in the file that has it, and from which constants."""
        block = matrix.blocks[-1]
        operations = {
            (use.node.get_friendly_name(), use.port.get_index())
            for use in choosable(self._submodels[block])
            if self._matrix(use) == matrix
        }
        variant = self._core.read_model(self._path(block, format, method))
        for use in choosable(variant):
            if (use.node.get_friendly_name(), use.port.get_index()) in operations:
                return use.port.get_source_output(), use.constants  # not the port: it does not keep its node
        raise ConversionError(f"{matrix.name}: NNCF lost it in compressing it to {format.name}")

    def _decompressed(self, matrix: Matrix, format: Format, method: Method) -> Array:
        """In f32 throughout, as a product computes it; the file's own operations, run alone, would round it to f16."""
        weight, *others = self._source(matrix, format, method)[1]
        value = ops.convert(weight, ov.Type.f32)
        for other in sorted(others, key=lambda constant: constant.get_output_element_type(0).is_real()):
            combine = ops.multiply if other.get_output_element_type(0).is_real() else ops.subtract
            value = combine(value, ops.convert(other, ov.Type.f32))
        alone = ov.Model([ops.result(value)], [], "weights")
        return np.array(self._core.compile_model(alone, "CPU", EXACT)({})[0], np.float32).reshape(matrix.shape)


def _samples(submodel: ov.Model, states: Sequence[State]) -> list[dict[str, np.ndarray]]:
    names = [port.any_name for port in submodel.inputs]
    return [{name: state[name] for name in names} for state in states]


def _save(model: ov.Model, path: Path) -> None:
    """Write an IR so that the .xml is there only when all of it is."""
    partial = path.with_suffix(".partial.xml")
    make_names_unique(model)
    try:
        ov.save_model(model, partial, compress_to_fp16=False)
        partial.with_suffix(".bin").replace(path.with_suffix(".bin"))
        partial.replace(path)
    except (OSError, RuntimeError) as error:
        raise ConversionError(f"{path}: cannot be written: {cause(error)}") from error
