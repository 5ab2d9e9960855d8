"""A shape in several precisions, among them the mix that a search chose for another, trained model.

A search for a mix needs a model that has learnt something. How fast the outcome is depends on sizes and formats alone,
and can be measured at the size of a model that is not at hand: each matrix of the shape gets the format that its
nearest relative in the trained model has. Codes are found by rounding to the nearest, as values do not matter.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import openvino as ov
from edgert.converters import quality
from edgert.converters.build import save
from edgert.converters.compress import compress
from edgert.converters.kernels import add_kernels
from edgert.converters.mixed.matrices import find_matrices
from edgert.converters.mixed.variants import Variants

import edgert
from edgert import native
from edgert.bundle import MANIFEST, Bundle, Report, create, sha256
from edgert.cutting import cut
from edgert.partition import annotate
from edgert.precision.formats import CHANNEL, FORMATS, Format, named

RECORD = "quality.json"


@dataclass(frozen=True)
class Slot:
    """A matrix in a model: its name, `BLOCK/OPERATION`, its role, and its shape `[out, in]`."""

    name: str
    role: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Donor:
    """A trained model whose mix is taken over.

    Attributes:
        name: the model's.
        slots: its matrices, in the order in which they are read.
        formats: of each of them.
        quality: what the mix costs it: `budget`, `increase`, `bound` and `bits`.
    """

    name: str
    slots: tuple[Slot, ...]
    formats: tuple[Format, ...]
    quality: Mapping[str, float]


@dataclass(frozen=True)
class Form:
    """A bundle of the shape.

    Attributes:
        key: `f16`, `int8`, `int4`, or `mix-` and the donor's name.
        path: the bundle.
        bits: of a weight on average, with scales and zero points, without norms.
        bytes: of all weights, tied ones once.
        formats: shares of the weights by type and group.
        donor: whose mix it has.
    """

    key: str
    path: Path
    bits: float
    bytes: int
    formats: Mapping[str, float]
    donor: Donor | None = None


def read_donor(path: Path) -> Donor:
    """The mix in a quality.json, or in a bundle that has one.

    Raises:
        ValueError: it is none.
    """
    file = path / RECORD if path.is_dir() else path
    try:
        record = json.loads(file.read_text("utf-8"))
        result, layers = record["result"], record["layers"]
        slots = tuple(Slot(layer["name"], layer["role"], tuple(layer["shape"])) for layer in layers)
        quality = {"budget": record["budget"], "increase": result["increase"], "bound": result["bound"]}
        quality["bits"] = result["bits_per_weight"]
        found = Donor(record["model"], slots, tuple(named(layer["format"]) for layer in layers), quality)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{file}: is no record of a mix: {type(error).__name__}: {error}") from error
    if not slots:
        raise ValueError(f"{file}: is a record of a mix of no matrices")
    return found


def transfer(donor: Donor, slots: Sequence[Slot]) -> dict[str, Format]:
    """A format for each of a model's matrices, by name: that of the donor's nearest, or one like it that fits.

    The nearest has the same role, lies in a block of the same kind, at the same place among the block's products, and
    at the nearest depth, counted from 0 to 1 over the blocks of that kind; where not all can be had, the first of these
    counts most.
    """
    there = list(zip(donor.slots, _spots(donor.slots), donor.formats, strict=True))
    found = {}
    for slot, spot in zip(slots, _spots(slots), strict=True):

        def distance(other: tuple[Slot, _Spot, Format], slot: Slot = slot, spot: _Spot = spot) -> tuple[float, ...]:
            theirs, where, _ = other
            roles = len({*slot.role.split("+")} ^ {*theirs.role.split("+")})
            no_head = "head" not in theirs.role  # what is both table and head is used more as a head
            return roles, no_head, where.kind != spot.kind, abs(where.place - spot.place), abs(where.depth - spot.depth)

        found[slot.name] = fitting(min(there, key=distance)[2], slot.shape)
    return found


def fitting(format: Format, shape: Sequence[int]) -> Format:
    """A format, or what is nearest to it in group size of those that a shape can be stored in; else INT8."""

    def group(one: Format) -> int:
        return shape[-1] if one.group_size in (None, CHANNEL) else one.group_size

    def distance(other: Format) -> tuple[float, int]:
        return abs(math.log(group(other) / group(format))), group(other)

    if format.fits(shape):
        return format
    alike = [f for f in FORMATS if (f.bits, f.symmetric) == (format.bits, format.symmetric) and f.fits(shape)]
    return min(alike, key=distance, default=named("int8"))


@dataclass(frozen=True)
class _Spot:
    kind: str
    place: int
    depth: float


def _spots(slots: Sequence[Slot]) -> list[_Spot]:
    """Where matrices lie: kind of block, place among its matrices, and depth."""
    blocks, operations = [], []
    deepest: dict[str, int] = {}
    for slot in slots:
        block, _, operation = slot.name.partition("/")
        kind, _, number = block.partition(".")
        blocks.append((kind, int(number or 0)))
        operations.append(int("0" + operation[len(operation.rstrip("0123456789")) :]))
        deepest[kind] = max(deepest.get(kind, 1), blocks[-1][1])
    # Operations are numbered as the source's code comes to them; those that may run in any order, such as queries, keys
    # and values, are not always met in the same one.
    places, before = dict[int, int](), Counter[tuple[str, int]]()
    for index in sorted(range(len(slots)), key=operations.__getitem__):
        places[index] = before[blocks[index]]
        before[blocks[index]] += 1
    return [_Spot(kind, places[index], number / deepest[kind]) for index, (kind, number) in enumerate(blocks)]


class Forms:
    """Bundles of a shape, each made once as long as nothing that it depends on changes.

    Args:
        shape: a model as transformers writes it, or an f16 bundle.
        folder: where they are kept.
        progress: is told what is being done.

    Raises:
        ValueError: (`f16`) the bundle's weights are not f16.
    """

    def __init__(self, shape: Path, folder: Path, progress: Callable[[str], None]) -> None:
        self._shape, self._folder, self._progress = shape, folder, progress
        self._tools = [edgert.__version__, *(version(name) for name in ("openvino", "nncf"))]
        folder.mkdir(parents=True, exist_ok=True)

    def f16(self) -> Form:
        if (self._shape / MANIFEST).is_file():
            found = Bundle.open(self._shape)
            if found.facts.weights != "fp16":
                raise ValueError(f"{self._shape}: is a bundle with weights {found.facts.weights}, expected fp16")
            return _form("f16", self._shape)
        files = [self._shape / "config.json", *sorted(self._shape.glob("*.safetensors"))]
        tools = [version(name) for name in ("torch", "transformers")]

        def make(out: Path) -> None:
            edgert.compile(self._shape, out, weights="fp16", progress=self._progress)

        return _form("f16", self._once("f16", [*map(sha256, files), *tools], make))

    def uniform(self, weights: Literal["int8", "int4"]) -> Form:
        """As `edgert compile --weights` makes it."""
        base = self.f16().path
        basis = [Bundle.open(base).fingerprint]
        return _form(weights, self._once(weights, basis, lambda out: _derive(
            base, out, weights, lambda model, scratch: compress(model, weights)
        )))  # fmt: skip

    def mixed(self, donor: Donor) -> Form:
        base, key = self.f16().path, f"mix-{donor.name}"
        mix = [[slot.name, slot.role, kind.name] for slot, kind in zip(donor.slots, donor.formats, strict=True)]
        basis = [Bundle.open(base).fingerprint, mix, sha256(Path(__file__))]

        def change(model: ov.Model, scratch: Path) -> ov.Model:
            return _mix(model, donor, scratch, self._progress)

        path = self._once(key, basis, lambda out: _derive(base, out, "mixed", change))
        return replace(_form(key, path), donor=donor)

    def _once(self, key: str, basis: list[Any], make: Callable[[Path], None]) -> Path:
        """The bundle of a form. Its name has a hash of what it depends on; what was made of something else goes."""
        digest = hashlib.sha256(json.dumps([basis, self._tools, native.status().loads]).encode()).hexdigest()
        path = self._folder / f"{key}.{digest[:12]}.edge"
        if not (path / MANIFEST).is_file():
            for old in self._folder.glob(f"{key}.*.edge"):
                shutil.rmtree(old)
            self._progress(f"make {key} of {self._shape.name}")
            make(path)
        return path


def _derive(base: Path, out: Path, weights: str, change: Callable[[ov.Model, Path], ov.Model]) -> None:
    """A bundle like another one, with other weights.

    Args:
        change: makes them; it may write to the folder that it gets.
    """
    bundle = Bundle.open(base)
    with tempfile.TemporaryDirectory(dir=out.parent, ignore_cleanup_errors=True) as scratch, create(out) as draft:
        shutil.copytree(bundle.tokenizer_path, draft.path / bundle.tokenizer_path.name)
        model = change(ov.Core().read_model(bundle.model_path), Path(scratch))
        checks: list[dict[str, Any]] = []
        gate = partial(quality.check_cut, task="decoder", vocab_size=bundle.facts.vocab_size)
        rows, graph = save(model, draft, checks, gate)
        del model
        if native.status().loads:
            checks += add_kernels(draft.path, vocab_size=bundle.facts.vocab_size, window=None)
        report = Report(bundle.report.source, bundle.report.tools, rows, checks)
        draft.finish(replace(bundle.facts, weights=weights), report, graph)


def _mix(model: ov.Model, donor: Donor, scratch: Path, progress: Callable[[str], None]) -> ov.Model:
    graph = annotate(model)
    submodels = cut(model, graph, [(block.index, block.index) for block in graph.blocks])
    matrices = find_matrices(graph, submodels)
    formats = transfer(donor, [Slot(matrix.name, matrix.role, matrix.shape) for matrix in matrices])
    variants = Variants(scratch, submodels, matrices, kept_bytes=0)
    for matrix in matrices:
        if (kind := formats[matrix.name]).group_size is not None:
            progress(f"{matrix.name}: {kind.name}")
            variants.make(matrix.blocks[-1], kind, "rtn", tuple)
    variants.put(model, {name: (kind, "rtn") for name, kind in formats.items()})
    return model


def _form(key: str, path: Path) -> Form:
    rows = [row for row in Bundle.open(path).report.precisions if row["role"] != "norms+other"]
    elements, size = (sum(row[column] for row in rows) for column in ("elements", "bytes"))
    shares: Counter[str] = Counter()
    for row in rows:
        group = row["group_size"]
        name = row["precision"] + ("" if group is None else " per channel" if group == CHANNEL else f" group {group}")
        shares[name] += row["elements"] / elements
    return Form(key, path, 8 * size / elements, size, dict(shares.most_common()))
