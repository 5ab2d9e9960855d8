"""From an f16 model to one of mixed precision: puts the parts of this folder together."""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import openvino as ov
from edgert.converters.kernels import pack
from edgert.converters.mixed.chain import Chain, from_empty
from edgert.converters.mixed.journal import Journal
from edgert.converters.mixed.matrices import find_matrices
from edgert.converters.mixed.measure import Measurements, Quality
from edgert.converters.mixed.search import Proposal, Search, Target
from edgert.converters.mixed.texts import Texts, read_texts, write_texts
from edgert.converters.mixed.variants import Variants

import edgert
from edgert.backends import devices_of
from edgert.bundle import Bundle, ModelFacts, Report, sha256
from edgert.cost import Workload
from edgert.cutting import cut
from edgert.device import DeviceConfig, DeviceKind
from edgert.errors import BundleError, cause
from edgert.irgraph import make_names_unique
from edgert.partition import annotate
from edgert.placement import Plan
from edgert.scorers import bundle_scorer
from edgert.text import Tokenizer

DEFAULT = DeviceConfig.parse("CPU")
KERNELS = (DeviceConfig("CPU", "kernels"), DeviceConfig("CPU", "kernels+f16"))
_KV_BYTES = {"kernels": 1, "kernels+f16": 2}  # of an element
# Of matrices in f32, where a model is smaller: with fewer bytes than a whole mix has, none is found again.
_KEPT_BYTES = 2**28
_ROUNDS = 3  # of choosing again with what configurations take of the budget


@dataclass(frozen=True)
class MixedOptions:
    """What a mix shall keep.

    Attributes:
        max_increase: of perplexity, relative, above 0.
        calibration: a UTF-8 text, or a folder of them; None for what the model writes itself.
        target: the machine it is for; None for the fewest bytes.
        seed: of all that is drawn.
    """

    max_increase: float
    calibration: Path | None = None
    target: Target | None = None
    seed: int = 0


@dataclass(frozen=True)
class Mixed:
    """What came of it.

    Attributes:
        model: the mixed model; its weights lie in the search's folder until it is saved.
        record: the content of quality.json.
        worst: the bound of the increase on the configurations that have to keep the budget.
    """

    model: ov.Model
    record: dict[str, Any]
    worst: float


def save_f16(model: ov.Model, folder: Path) -> Path:
    """Write a model to a new folder as the search wants it; the path of its .xml.

    Raises:
        BundleError: the disk did not take it.
    """
    make_names_unique(model)
    folder.mkdir()
    try:
        ov.save_model(model, folder / "model.xml", compress_to_fp16=False)
    except RuntimeError as error:
        raise BundleError(f"{folder}: the f16 model cannot be written: {cause(error)}") from error
    return folder / "model.xml"


class Mixing:
    """A search for one model; what it measures is kept beside the bundle to be, where an interrupted one goes on.

    Args:
        path: of a canonical decoder, f16, as `save_f16` wrote it; its folder is moved away.
        folder: where that is kept.
        tokenizer: a tokenizer folder.
        kernels: whether the bundle will hold weights for the CPU kernels.
        stage, advance: are told what begins, and the share of it that is done.

    Raises:
        UsageError: the text is too short or no text, or the folder cannot be written.
    """

    def __init__(
        self,
        path: Path,
        folder: Path,
        tokenizer: Path,
        facts: ModelFacts,
        options: MixedOptions,
        *,
        kernels: bool,
        stage: Callable[[str], None],
        advance: Callable[[float], None],
    ) -> None:
        self._facts, self._options, self._kernels, self._advance = facts, options, kernels, advance
        self._report, self._running, self._seconds = stage, ("", 0.0), dict[str, float]()
        self._core = ov.Core()
        self._texts = texts = self._read(path, Tokenizer.open(tokenizer))
        key = {
            "model": sha256(path.with_suffix(".bin")), "text": texts.sha256, "seed": options.seed,
            "windows": [len(part) for part in (texts.calibration, texts.search, texts.verify)],
            "edgert": edgert.__version__, **{name: version(name) for name in ("nncf", "openvino")},
        }  # fmt: skip
        self._journal = Journal(folder, key)
        self._path = folder / path.name
        for suffix in (".bin", ".xml"):
            path.with_suffix(suffix).replace(self._path.with_suffix(suffix))
        path.parent.rmdir()

    def run(self) -> Mixed:
        """Search, and measure the outcome on the configurations of this machine.

        Raises:
            ConversionError: the model gives no finite loss, or NNCF cannot compress it.
        """
        model = self._core.read_model(self._path)
        graph = annotate(model)
        ranges = [(block.index, block.index) for block in graph.blocks]
        submodels = [from_empty(submodel) for submodel in cut(model, graph, ranges)]
        matrices = find_matrices(graph, submodels)
        kept = max(_KEPT_BYTES, sum(matrix.elements for matrix in matrices))  # or half of what the f16 model takes
        variants = Variants(self._journal.folder / "variants", submodels, matrices, kept_bytes=kept)
        measurements = Measurements(Chain(submodels, matrices), variants, self._texts, self._journal)
        budget = self._options.max_increase
        search = Search(
            measurements, graph, budget, self._options.target,
            seed=self._options.seed, stage=self._stage, advance=self._advance,
        )  # fmt: skip
        search.prepare()
        proposal, reserve = search.best(), 0.0
        for last in (*[False] * (_ROUNDS - 1), True):
            rows = self._measured(search, proposal, measurements)
            used = self._used(search, proposal, rows)
            worst = max((rows[config].bound for config in used), default=proposal.quality.bound)
            if worst <= budget or last:
                break
            # What these configurations take of the budget; a little more, so that noise does not make this go on.
            reserve = 1.05 * max(reserve, worst - proposal.quality.bound)
            proposal = search.best(reserve) if reserve < budget else search.most_exact()
        record = search.record(proposal)
        if record["target"]:
            record["target"]["npu_price"] = search.price_of_recipe()
        self._stage("")
        record |= {
            "met": worst <= budget,
            "protocol": self._protocol(),
            "configs": [{"config": str(c), **asdict(q), "bound": q.bound, "used": c in used} for c, q in rows.items()],
            "seconds": self._seconds,
        }
        return Mixed(search.model(self._core.read_model(self._path), proposal), record, worst)

    def close(self) -> None:
        """Keep what was measured."""
        self._journal.close()

    def remove(self) -> None:
        """Remove what was measured; nothing may use the model of the result any more."""
        gc.collect()  # Windows removes no file that is still memory-mapped
        self._journal.remove()

    def _read(self, path: Path, tokenizer: Tokenizer) -> Texts:
        facts, options = self._facts, self._options
        if options.calibration is not None:
            return read_texts(options.calibration, tokenizer, facts.vocab_size, facts.context_length, options.seed)
        self._stage("let the model write a text")
        bos, model = tokenizer.prefix(), self._core.read_model(path)
        return write_texts(model, bos, facts.vocab_size, facts.context_length, options.seed, self._advance)

    def _measured(self, search: Search, proposal: Proposal, measurements: Measurements) -> dict[DeviceConfig, Quality]:
        """What the mixed model loses on configurations that run here."""
        self._stage("measure the configurations of this machine")
        plan = proposal.solution.plan
        wanted = (DEFAULT, *(KERNELS if self._kernels else ())) if plan is None else plan.configs
        lacking = {variant for info in devices_of(DeviceKind.CPU) for variant in info.lacking}
        found = {}
        with tempfile.TemporaryDirectory(dir=self._journal.folder, ignore_cleanup_errors=True) as folder:
            path = Path(folder) / "model.xml"
            mixed = search.model(self._core.read_model(self._path), proposal)
            make_names_unique(mixed)
            ov.save_model(mixed, path, compress_to_fp16=False)
            graph = annotate(self._core.read_model(path))
            if self._kernels:
                pack(path.parent)
            bundle = Bundle(path.parent, self._facts, Report("", {}), graph, {})
            for config in dict.fromkeys(wanted):
                if config.kind is DeviceKind.CPU and config.variant not in lacking:
                    found[config] = measurements.quality_of(bundle_scorer(bundle, Plan.single(graph, config)))
                    self._advance(len(found) / len(wanted))
            gc.collect()
        return found

    def _used(self, search: Search, proposal: Proposal, rows: Mapping[DeviceConfig, Quality]) -> list[DeviceConfig]:
        """The configurations that have to keep the budget: the plan's, or the default and one of the kernels'.

        Keys and values in f16 lose less than in INT8, which leaves more of the budget to the weights. Of the two that
        is taken which reads fewer bytes a token in all.
        """
        kernels = [config for config in KERNELS if config in rows]
        if proposal.solution.plan is not None or not kernels:
            return list(rows)
        load = Workload.fitting(self._facts.context_length)
        elements = sum(block.kv_bytes_per_token for block in search.graph.blocks) // 4  # they are counted at f32

        def read_bytes(config: DeviceConfig) -> float:
            taken = max(0.0, rows[config].increase - proposal.quality.increase)
            weights = search.bytes_within(proposal, max(0.0, 1 - taken / self._options.max_increase))
            return weights + _KV_BYTES[config.variant] * elements * (load.prompt_tokens + load.new_tokens)

        return [min(kernels, key=read_bytes), DEFAULT]

    def _protocol(self) -> dict[str, Any]:
        texts = self._texts
        sizes = {
            f"{name}_tokens": sum(len(window.tokens) for window in part)
            for name, part in (("calibration", texts.calibration), ("search", texts.search), ("verify", texts.verify))
        }
        return {
            "text": texts.name, "sha256": texts.sha256, "generated": texts.generated, "seed": self._options.seed,
            "window": texts.window, "stride": texts.window - 1, "bos": texts.bos, **sizes,
        }  # fmt: skip

    def _stage(self, name: str) -> None:
        """Say what begins, and note how long what went before took; an empty name ends the last stage."""
        before, since = self._running
        self._running = (name, now := time.perf_counter())
        if before:
            self._seconds[before] = self._seconds.get(before, 0.0) + now - since
        if name:
            self._report(name)
