"""The search for the best mix of precisions whose measured perplexity stays within a budget.

`edgert.precision` proposes mixes by the losses that are predicted for single matrices; what counts is what is measured
of the mixes, on text that neither scales were fitted to nor sensitivities taken from. The first proposals are random:
they tell how far predictions can be trusted. Then proposals go as far as the measured bound of the increase allows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from math import log1p
from typing import Any

import numpy as np
import openvino as ov
from edgert.converters.mixed.matrices import Matrix
from edgert.converters.mixed.measure import F16, Chosen, Measurements, Quality, rank_correlation

from edgert.cost import Workload
from edgert.device import DeviceConfig, DeviceKind
from edgert.graph import BlockGraph
from edgert.precision import Layer, Mix, Option, Problem, Solution, fill, front, random_mixes
from edgert.precision.formats import FORMATS, Format
from edgert.precision.layers import bits_per_weight, recipe_only
from edgert.profile import Profile
from edgert.scheduler import Objective

MIXES = 32  # random ones
_PROPOSALS = 8  # at most, each measured on the text for verification
# Measured beside the mixes: one format everywhere, the first that a matrix has.
_UNIFORM = {"int8": ("int8",), "int4": ("int4-asym-g128", "int4-asym-g64", "int4-asym-g32", "int4-asym-pc", "int8")}
_NEAR = 0.03  # relative: proposals this close to the limit are as good as on it


@dataclass(frozen=True)
class Target:
    """The machine that a model is for.

    Attributes:
        profile: what its devices can do.
        objective: what is best there.
        load: prompt and continuation.
        configs: that may run blocks; None for all of the profile.
    """

    profile: Profile
    objective: Objective = "tokens_per_joule"
    load: Workload = field(default_factory=Workload)
    configs: tuple[DeviceConfig, ...] | None = None

    @property
    def npu(self) -> bool:
        """Whether blocks may run on an NPU."""
        return any(config.kind is DeviceKind.NPU for config in self.configs or self.profile.configs)


@dataclass(frozen=True)
class Proposal:
    """A mix, and what was measured of it.

    Attributes:
        name: for people.
        quality: on the text for verification.
    """

    name: str
    solution: Solution
    quality: Quality


class Search:
    """The search on one model.

    Args:
        graph: the blocks of the f16 model.
        budget: relative increase of perplexity, e.g. 0.01.
        stage: is told what begins.
        advance: is told which share of it is done.
    """

    def __init__(
        self,
        measurements: Measurements,
        graph: BlockGraph,
        budget: float,
        target: Target | None,
        *,
        seed: int,
        stage: Callable[[str], None],
        advance: Callable[[float], None],
    ) -> None:
        self.budget, self.target, self.graph = budget, target, graph
        self._measurements, self._seed = measurements, seed
        self._stage, self._advance = stage, advance
        self._rows: dict[str, dict[str, Any]] = {}
        self._searches = 0

    def prepare(self) -> None:
        """Measure the matrices, and how far predictions made of that can be trusted."""
        self._stage("measure what compressing each matrix costs")
        npu = self.target is not None and self.target.npu
        self.sensitivities = self._measurements.sensitivities(self._advance, npu=npu)
        self._matrices = {
            "+".join(m.name for m in group): group for group in _joined(self._measurements.chain.matrices)
        }
        layers = tuple(self._layer(name, group) for name, group in self._matrices.items())
        target = self.target
        self.problem = Problem(layers, self.graph) if target is None else Problem(
            layers, self.graph, target.profile, target.objective, load=target.load, configs=target.configs
        )  # fmt: skip
        self._stage("measure random mixes")
        limit = log1p(self.budget)
        mixes = random_mixes(self.problem, MIXES, self._seed, limit / 16, 32 * limit)
        rows = []
        for number, mix in enumerate(mixes):
            quality = self._measurements.quality(self._chosen(mix))
            loss = self._predicted(mix)
            self._note(f"random {number + 1}", mix, loss, quality)
            rows.append((loss, log1p(quality.increase), quality.kl))
            self._advance((number + 1) / len(mixes))
        predicted, measured, divergences = zip(*rows, strict=True) if rows else ((), (), ())
        # Of all mixes together, as the small ones are mostly noise.
        self._slope = max(sum(measured) / max(sum(predicted), 1e-9), 0.1) if rows else 1.0
        self._proxy = {
            "mixes": len(rows), "slope": self._slope,
            "rank_correlation": rank_correlation(predicted, measured),
            "kl_rank_correlation": rank_correlation(predicted, divergences),
            "metrics": self._metrics(),
        }  # fmt: skip
        for name, names in _UNIFORM.items():
            mix = {
                layer.name: next(o.format for n in names for o in layer.options if o.format.name == n)
                for layer in layers
            }
            self._note(name, mix, self._predicted(mix), self._measurements.quality(self._chosen(mix), "verify"))

    def best(self, reserve: float = 0.0) -> Proposal:
        """The best mix whose increase of perplexity is, with 95 % confidence, within the budget.

        Args:
            reserve: part of the budget that something else takes; less than the budget.
        """
        self._stage("search the best mix")
        self._searches += 1
        return self._settle(self.problem, self.budget - reserve, f"search {self._searches}, candidate")

    def most_exact(self) -> Proposal:
        """The mix with all matrices as exact as can be."""
        return self._proposal("most exact", fill(self.problem, 0.0))

    def bytes_within(self, proposal: Proposal, share: float) -> int:
        """The bytes that a mix is predicted to need if it may lose only a share of what a proposal does."""
        return fill(self.problem, share * proposal.solution.loss).bytes

    def model(self, model: ov.Model, proposal: Proposal) -> ov.Model:
        """Put a proposal's compressed matrices into the f16 model, in place."""
        self._measurements.variants.put(model, self._chosen(proposal.solution.mix))
        return model

    def price_of_recipe(self) -> dict[str, Any] | None:
        """What formats for NPUs cost: the smallest mixes within the budget, with all formats and with those alone."""
        if self.target is None or not self.target.npu:
            return None
        self._stage("measure the price of the NPU's recipe")
        found: dict[str, Any] = {}
        for name, layers in (("free", self.problem.layers), ("recipe", recipe_only(self.problem.layers))):
            one = self._settle(Problem(layers, self.graph), self.budget, f"{name} mix")
            found |= {f"increase_{name}": one.quality.increase, f"bytes_{name}": one.solution.bytes}
        return found

    def record(self, proposal: Proposal) -> dict[str, Any]:
        """What was found, for `quality.json`; all but text, configurations and times."""
        layers, mix = self.problem.layers, proposal.solution.mix
        solution, quality = proposal.solution, proposal.quality
        target = self.target
        return {
            "version": 1,
            "budget": self.budget,
            "reference": {
                "what": "the model's own weights in f16, computed in f32",
                "perplexity": self._measurements.reference_perplexity("verify"),
            },
            "result": {
                **asdict(quality), "bound": quality.bound, "bytes": solution.bytes, "value": solution.value,
                "bits_per_weight": bits_per_weight(layers, mix),
                "f16_bytes": sum(2 * layer.elements for layer in layers),
            },
            "layers": [
                self._matrix_row(matrix, mix[name]) for name, group in self._matrices.items() for matrix in group
            ],
            "measured": list(self._rows.values()),
            "front": [{"predicted": s.loss, "bytes": s.bytes, "value": s.value} for s in front(self.problem)],
            "unit": solution.unit,
            "proxy": self._proxy,
            "target": target and {
                "profile": target.profile.machine, "objective": target.objective, "value": solution.value,
                "unit": solution.unit, "plan": solution.plan and solution.plan.to_json(),
            },
        }  # fmt: skip

    def _matrix_row(self, matrix: Matrix, kind: Format) -> dict[str, Any]:
        measured = self.sensitivities[matrix.name]
        return {
            "name": matrix.name, "role": matrix.role, "blocks": list(matrix.blocks), "shape": list(matrix.shape),
            "format": kind.name, "method": measured.methods.get(kind.name), "bytes": kind.total_bytes(matrix.shape),
            "loss": measured.predicted(kind), "anchor": measured.anchor, "measured": measured.kl,
            "measured_loss": measured.loss, "metrics": measured.metrics,
            "options": [
                {"format": one.name, "loss": measured.predicted(one), "bytes": one.total_bytes(matrix.shape)}
                for one in self._formats(matrix)
            ],
        }  # fmt: skip

    def _metrics(self) -> dict[str, float]:
        """How NNCF's metrics rank the products with weights, beside what was measured of each in INT4."""
        known = [one for one in self.sensitivities.values() if one.metrics]
        return {
            name: rank_correlation([one.metrics[name] for one in known], [one.kl for one in known])
            for name in (known[0].metrics if known else ())
        }

    def _settle(self, problem: Problem, limit: float, name: str) -> Proposal:
        """Proposals between one that keeps the limit and one that does not, until they are close."""
        best = self._proposal(f"{name} 0", fill(problem, 0.0))
        low, high = 0.0, np.inf
        wanted = 0.8 * log1p(limit) / self._slope
        for number in range(1, _PROPOSALS + 1):
            proposal = self._proposal(f"{name} {number}", fill(problem, wanted))
            solution, bound = proposal.solution, proposal.quality.bound
            self._advance(number / _PROPOSALS)
            if bound <= limit:
                low = wanted
                if solution.value <= best.solution.value:
                    best = proposal
            else:
                high = wanted = solution.loss  # from here to what was wanted it is the same mix
            if limit * (1 - _NEAR) <= bound <= limit or high <= low * (1 + _NEAR):
                break
            if high == np.inf and all(solution.mix[la.name] == _smallest(la) for la in problem.layers):
                break  # as small as can be, and still within
            wanted *= limit / bound if bound > limit / 4 else 4.0
            if not low < wanted < high:
                wanted = (max(low, high / 16) * high) ** 0.5 if high < np.inf else 2 * low
        return best

    def _proposal(self, name: str, solution: Solution) -> Proposal:
        quality = self._measurements.quality(self._chosen(solution.mix), "verify")
        self._note(name, solution.mix, solution.loss, quality)
        self._rows[name]["value"] = solution.value
        return Proposal(name, solution, quality)

    def _note(self, name: str, mix: Mix, predicted: float, quality: Quality) -> None:
        size = sum(mix[layer.name].total_bytes(layer.shape) for layer in self.problem.layers)
        self._rows[name] = {"name": name, "predicted": predicted, **asdict(quality), "bytes": size, "value": None}

    def _layer(self, name: str, matrices: Sequence[Matrix]) -> Layer:
        first = matrices[0]
        shape = (sum(matrix.shape[0] for matrix in matrices), *first.shape[1:])
        formats = [kind for kind in self._formats(first) if all(kind in self._formats(m) for m in matrices)]
        options = [Option(kind, sum(self.sensitivities[m.name].predicted(kind) for m in matrices)) for kind in formats]
        return Layer(name, first.role, first.blocks, shape, tuple(sorted(options, key=lambda o: o.loss)))

    def _formats(self, matrix: Matrix) -> list[Format]:
        return [kind for kind in FORMATS if kind == F16 or kind.name in self.sensitivities[matrix.name].errors]

    def _predicted(self, mix: Mix) -> float:
        return sum(
            self.sensitivities[m.name].predicted(kind) for name, kind in mix.items() for m in self._matrices[name]
        )

    def _chosen(self, mix: Mix) -> Chosen:
        return {
            matrix.name: (kind, self.sensitivities[matrix.name].methods[kind.name])
            for name, kind in mix.items()
            for matrix in self._matrices[name]
            if kind != F16
        }


def _joined(matrices: Iterable[Matrix]) -> list[list[Matrix]]:
    """Matrices that are multiplied with the same tensor, together: kernels join them if they have the same format."""
    found: dict[tuple[str, tuple[int, ...]], list[Matrix]] = {}
    for matrix in matrices:
        alone = matrix.reads is None or len(matrix.shape) != 2
        found.setdefault((matrix.name if alone else str(matrix.reads), matrix.shape[1:]), []).append(matrix)
    return list(found.values())


def _smallest(layer: Layer) -> Any:
    return min((o.format for o in layer.options), key=lambda kind: kind.total_bytes(layer.shape))
