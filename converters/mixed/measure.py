"""What precisions cost: the error of each matrix in each format, and the loss of the model with any mix of them.

A matrix alone in a coarse format (its anchor) tells by how much the model's predictions move, measured as the mean
Kullback-Leibler divergence from the f16 model's; on text like what the model learnt from, that is the rise of its loss.
Of other formats the error of the block's output is measured, and the divergence taken as proportional to its
square: near the optimum the loss is quadratic in small errors, and those of different matrices add up (the linearity
theorem, https://arxiv.org/abs/2411.17525). That this holds is measured too, on random mixes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from edgert.converters.mixed.chain import Array, Chain, State, Weights
from edgert.converters.mixed.journal import Journal
from edgert.converters.mixed.matrices import Matrix
from edgert.converters.mixed.nncf_runs import METHODS, Method
from edgert.converters.mixed.texts import Texts
from edgert.converters.mixed.variants import Variants

from edgert.errors import ConversionError
from edgert.evaluation import Scorer
from edgert.likelihood import Losses, Prediction, Window, increase, parts
from edgert.precision.formats import FORMATS, Format, named

F16 = named("f16")
_ANCHORS = ("int4-{}-g128", "int4-{}-g64", "int4-{}-g32", "int4-{}-pc", "int8")  # the first that fits
# A zero point for each group costs as many bits as smaller groups that lower the error by a few percent do.
_SYMMETRIC_IS_AS_GOOD = 1.05
_METRIC_WINDOWS = 4  # that NNCF's metrics are taken from
_KEPT_BYTES = 2**27  # logits of a set of windows that are kept rather than computed again
_ERROR_TOKENS = 1024  # whose blocks' outputs are compared

Chosen = Mapping[str, tuple[Format, Method]]
"""Format and method of each matrix, by its name; f16 where it is not in there."""


@dataclass(frozen=True)
class Sensitivity:
    """What was measured of a matrix.

    Attributes:
        anchor: the format it was measured in alone.
        kl: then, nats a token.
        loss: rise of the loss then, nats a token; noisier, and possibly below 0.
        methods: the best method of each format, by its name.
        errors: the squared relative error of the block's output, in each format by its name.
        metrics: NNCF's own, by their names; empty for a table that is only looked up.
    """

    anchor: str
    kl: float
    loss: float
    methods: dict[str, Method]
    errors: dict[str, float]
    metrics: dict[str, float]

    def predicted(self, format: Format) -> float:
        """The rise of the loss that a format is expected to cause, nats a token."""
        if format == F16:
            return 0.0
        return self.kl * self.errors[format.name] / max(self.errors[self.anchor], 1e-30)


@dataclass(frozen=True)
class Quality:
    """What a model says of a set of windows, beside the f16 model; numbers are as in `edgert.likelihood`."""

    perplexity: float
    increase: float
    standard_error: float
    kl: float
    agreement: float

    @property
    def bound(self) -> float:
        """What the increase is below, with 95 % confidence (one-sided, normal)."""
        return self.increase + 1.645 * self.standard_error


class Measurements:
    """Everything that is measured for a search, each of it once.

    Args:
        report: is told what share of the work on the matrices is done.

    Raises:
        ConversionError: (any method) the f16 model's losses are not finite.
    """

    def __init__(self, chain: Chain, variants: Variants, texts: Texts, journal: Journal) -> None:
        self.chain, self.variants, self.texts, self._journal = chain, variants, texts, journal
        self._references: dict[str, tuple[list[State], Losses]] = {}
        self._kept: dict[str, list[Sequence[Prediction]]] = {}

    def sensitivities(self, report: Callable[[float], None], *, npu: bool = False) -> dict[str, Sensitivity]:
        """Of every matrix, by its name; with `npu` also in the formats that NPUs take."""
        chain = self.chain
        found: dict[str, Sensitivity] = {}
        fitted, searched = chain.start(self.texts.calibration), chain.start(self.texts.search)
        for block in range(chain.blocks):
            own = [matrix for matrix in chain.matrices if matrix.blocks[-1] == block]
            if own:
                study = _Study(self, block, own, fitted, searched, npu)
                rows = self._journal.measured(f"block {block}{' npu' * npu}", study.run)
                found |= {name: Sensitivity(**row) for name, row in rows.items()}
            report((block + 1) / chain.blocks)
            if block + 1 < chain.blocks:
                fitted = list(chain.run(block, fitted, self.exact))
                searched = list(chain.run(block, searched, self.exact))
        return found

    def quality(self, chosen: Chosen, part: str = "search") -> Quality:
        """What a mix of precisions loses on a set of windows, `search` or `verify`."""
        mix = ",".join(f"{name}={format.name}/{method}" for name, (format, method) in sorted(chosen.items()))
        return Quality(**self._journal.measured(f"{part} {mix}", lambda: asdict(self._quality(chosen, part))))

    def quality_of(self, scorer: Scorer) -> Quality:
        """What something else than the chain says of the text for verification."""
        losses = Losses()
        for window, other in zip(self.texts.verify, self._exact_logits("verify"), strict=True):
            losses.add(scorer.logits(window.tokens)[window.first - 1 : -1], window.targets, other)
        return _quality(losses, self.reference("verify")[1], scorer.name)

    def reference_perplexity(self, part: str) -> float:
        """Of the f16 model, on a set of windows."""
        return float(self._journal.measured(f"{part} reference", lambda: self.reference(part)[1].perplexity))

    def _quality(self, chosen: Chosen, part: str) -> Quality:
        _, reference = self.reference(part)
        losses = self.losses(0, self.chain.start(self._windows(part)), chosen, part)
        return _quality(losses, reference, f"a mix of {len(chosen)} compressed matrices")

    def losses(self, block: int, states: Sequence[State], chosen: Chosen, part: str) -> Losses:
        """Losses of a mix, from a block on whose inputs are known."""
        chain, losses = self.chain, Losses()
        own = chain.through(block, chain.blocks - 1, states, self.weights(chosen))
        for window, state, other in zip(self._windows(part), own, self._exact_logits(part), strict=True):
            losses.add(_scored(state, window), window.targets, other)
        return losses

    def reference(self, part: str) -> tuple[list[State], Losses]:
        """What reaches the last block of the f16 model in each window, and the model's losses."""
        if part not in self._references:
            chain, windows = self.chain, self._windows(part)
            states = chain.start(windows)
            if chain.blocks > 1:
                states = list(chain.through(0, chain.blocks - 2, states, self.exact))
            losses = Losses()
            for window, state in zip(windows, chain.run(chain.blocks - 1, states, self.exact), strict=True):
                losses.add(_scored(state, window), window.targets)
            if not np.isfinite(losses.nats):
                raise ConversionError(f"the f16 model's loss is {losses.nats} on {self.texts.name}, expected a number")
            self._references[part] = states, losses
        return self._references[part]

    def _exact_logits(self, part: str) -> Iterator[Iterable[Prediction]]:
        """The f16 model's predictions in each window; kept if they are small, or else computed again each time."""
        if part in self._kept:
            yield from self._kept[part]
            return
        windows = self._windows(part)
        found: list[Sequence[Prediction]] = []
        states = self.chain.run(self.chain.blocks - 1, self.reference(part)[0], self.exact)
        for window, state in zip(windows, states, strict=True):
            logits = _scored(state, window)
            if len(windows) * logits.nbytes <= _KEPT_BYTES:
                found.append(list(parts(logits)))
                yield found[-1]
            else:
                yield parts(logits)
        if len(found) == len(windows):
            self._kept[part] = found

    def _windows(self, part: str) -> tuple[Window, ...]:
        return self.texts.search if part == "search" else self.texts.verify

    def exact(self, matrix: Matrix) -> Array:
        return self.variants.weights(matrix, F16, "rtn")

    def weights(self, chosen: Chosen) -> Weights:
        return lambda matrix: self.variants.weights(matrix, *chosen.get(matrix.name, (F16, "rtn")))


class _Study:
    """One block: what compressing it costs, by format. What is chosen for it is chosen for all its matrices."""

    def __init__(
        self,
        of: Measurements,
        block: int,
        matrices: Sequence[Matrix],
        fitted: Sequence[State],
        searched: Sequence[State],
        npu: bool,
    ) -> None:
        self._of, self._block, self._matrices, self._npu = of, block, matrices, npu
        self._fitted, self._searched = fitted, searched
        self._few = _first(searched, of.texts.search)
        self._exact = [_output(state) for state in of.chain.run(block, self._few, of.exact)]

    def run(self) -> dict[str, dict[str, Any]]:
        """A `Sensitivity` of each matrix as a dictionary, by name."""
        plain = {family: self._trial(family, "rtn") for family in ("asym", "sym")}
        family = "sym" if plain["sym"] <= _SYMMETRIC_IS_AS_GOOD * plain["asym"] else "asym"
        trials = {method: self._trial(family, method) for method in METHODS}
        best = min(METHODS, key=lambda method: trials[method])
        states = self._fitted[:_METRIC_WINDOWS]
        metrics = self._of.variants.metrics(self._block, states)
        return {
            matrix.name: asdict(self._sensitivity(matrix, family, best, metrics.get(matrix.name, {})))
            for matrix in self._matrices
        }

    def _trial(self, family: str, method: Method) -> float:
        """The sum of the errors of all matrices, each alone in its anchor; only INT4 differs by family and method."""
        return sum(
            self._error(matrix, anchor, method)
            for matrix in self._matrices
            if (anchor := _anchor(matrix, family)).bits == 4
        )

    def _sensitivity(self, matrix: Matrix, family: str, best: Method, metrics: dict[str, float]) -> Sensitivity:
        of = self._of
        formats = [
            format
            for format in FORMATS
            if format != F16
            and format.fits(matrix.shape)
            and (format.bits == 8 or family in format.name or (self._npu and format.npu))
        ]
        methods: dict[str, Method] = {format.name: best if format.bits == 4 else "rtn" for format in formats}
        errors = {format.name: self._error(matrix, format, methods[format.name]) for format in formats}
        usable = {name: value for name, value in errors.items() if np.isfinite(value)}
        anchor = _anchor(matrix, family)
        start = matrix.blocks[0]
        states: Iterable[State] = self._searched
        if start != self._block:  # a tied table is read by the first block already
            states = of.chain.start(of.texts.search)
            states = of.chain.through(0, start - 1, states, of.exact) if start else states
        alone = of.losses(start, list(states), {matrix.name: (anchor, methods[anchor.name])}, "search")
        reference = of.reference("search")[1]
        if anchor.name not in usable or not np.isfinite(alone.mean_kl):
            raise ConversionError(f"{matrix.name}: in {anchor.name} the model gives no finite loss")
        loss = (alone.nats - reference.nats) / reference.tokens
        return Sensitivity(anchor.name, max(alone.mean_kl, 0.0), loss, methods, usable, metrics)

    def _error(self, matrix: Matrix, format: Format, method: Method) -> float:
        """The squared relative error of the block's output with this matrix compressed."""
        of = self._of
        of.variants.make(self._block, format, method, lambda: self._fitted)
        changed = of.chain.run(self._block, self._few, of.weights({matrix.name: (format, method)}))
        return _squared_error([_output(state) for state in changed], self._exact)


def _anchor(matrix: Matrix, family: str) -> Format:
    formats = (named(name.format(family)) for name in _ANCHORS)
    return next(format for format in formats if format.fits(matrix.shape))


def _quality(losses: Losses, reference: Losses, name: str) -> Quality:
    above, error = increase(losses, reference)
    if not np.isfinite([above, losses.mean_kl]).all():
        raise ConversionError(f"{name}: gives no finite loss")
    return Quality(losses.perplexity, above, error, losses.mean_kl, losses.agreement)


def _scored(state: State, window: Window) -> Array:
    return state["logits"][0, window.first - 1 : -1]


def _output(state: State) -> Array:
    """What a block is for: the stream, or the logits."""
    return state["logits"] if "logits" in state else state["hidden"]


def _first(states: Sequence[State], windows: Sequence[Window]) -> list[State]:
    """The states of the first windows, as many as hold enough tokens."""

    def enough() -> Iterator[int]:
        tokens = 0
        for number, window in enumerate(windows):
            yield number
            tokens += len(window.tokens)
            if tokens >= _ERROR_TOKENS:
                return

    return [states[number] for number in enough()]


def _squared_error(found: Sequence[Array], exact: Sequence[Array]) -> float:
    pairs = list(zip(found, exact, strict=True))
    return float(sum(np.square(a - b).sum() for a, b in pairs) / sum(np.square(b).sum() for _, b in pairs))


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's, with mean ranks for ties; 0 for fewer than two pairs or where one side is constant."""

    def ranks(values: Sequence[float]) -> np.ndarray[Any, Any]:
        array = np.asarray(values, np.float64)
        return (array[:, None] > array).sum(axis=1) + ((array[:, None] == array).sum(axis=1) - 1) / 2

    a, b = ranks(first), ranks(second)
    if len(a) < 2 or not a.std() or not b.std():
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])
