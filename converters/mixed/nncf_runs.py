"""NNCF as a search needs it: one format for all matrices of a submodel, and its metrics of their sensitivity."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import openvino as ov

from edgert.errors import ConversionError
from edgert.precision.formats import Format, named

Method = Literal["rtn", "scale-estimation", "gptq"]
"""How codes are found: round to nearest; scales fitted to what a layer computes on data; columns one after the other,
each making up for the error of those before it (GPTQ, https://arxiv.org/abs/2210.17323)."""
METHODS: tuple[Method, ...] = ("rtn", "scale-estimation", "gptq")
_OPTIONS: dict[Method, dict[str, bool]] = {
    "rtn": {}, "scale-estimation": {"scale_estimation": True}, "gptq": {"gptq": True},
}  # fmt: skip
NEEDS_DATA = tuple(method for method, options in _OPTIONS.items() if options)
INT4 = named("int4-asym-pc")  # fits every matrix that can be INT4 at all; scores are of INT8 errors and activations
METRICS = (
    "weight_quantization_error",
    "hessian_input_activation",
    "mean_activation_variance",
    "max_activation_variance",
    "mean_activation_magnitude",
)


def compress_exactly(
    model: ov.Model,
    format: Format,
    method: Method,
    samples: list[dict[str, np.ndarray]] | None,
    ignored: Sequence[str] = (),
    **options: Any,
) -> ov.Model:
    """Compress all matrices of a model to one format with NNCF, but for those that the operations `ignored` read.

    Args:
        samples: inputs of the model, for methods that need data.
        options: more of `nncf.compress_weights`.

    Raises:
        ConversionError: NNCF cannot.
    """
    import nncf
    from nncf.parameters import CompressWeightsMode as Mode

    if format.bits == 8:
        chosen: dict[str, Any] = {"mode": Mode.INT8_ASYM}
    else:
        mode = Mode.INT4_SYM if format.symmetric else Mode.INT4_ASYM
        chosen = {"mode": mode, "group_size": format.group_size, "all_layers": True, **_OPTIONS[method]}
        if samples is not None:
            chosen |= {"dataset": nncf.Dataset(samples), "subset_size": len(samples)}
    if ignored:
        chosen["ignored_scope"] = nncf.IgnoredScope(names=list(ignored))
    with quiet():
        try:
            return nncf.compress_weights(model, **chosen, **options)
        except Exception as error:  # NNCF raises its own and the backends' classes
            raise ConversionError(f"{model.get_friendly_name()}: compression to {format.name}: {error}") from error


@contextmanager
def quiet() -> Any:
    """Keep NNCF's notices and bars from the screen."""
    import rich

    logging.getLogger("nncf").setLevel(logging.ERROR)
    console = rich.get_console()
    before, console.quiet = console.quiet, True
    try:
        yield
    finally:
        console.quiet = before


def sensitivity_metrics(
    model: ov.Model, samples: list[dict[str, np.ndarray]], ignored: Sequence[str]
) -> dict[str, dict[str, float]]:
    """NNCF's scores of each product with weights, by the operation's name and then the metric's.

    NNCF keeps the layers with high scores at INT8. It does not give them away, so its method that computes them is
    listened to while it chooses.

    Args:
        model: a model or submodel with float weights; it is changed.
        samples: its inputs.
        ignored: operations to leave out.

    Raises:
        ConversionError: NNCF cannot compress the model.
    """
    from nncf import SensitivityMetric

    found: dict[str, dict[str, float]] = {}
    for metric in METRICS:
        chosen = SensitivityMetric(metric)
        with _listening(chosen) as scores:
            compress_exactly(
                model.clone(), INT4, "rtn",
                None if metric == METRICS[0] else samples, ignored, ratio=0.5, sensitivity_metric=chosen,
            )  # fmt: skip
        for name, score in scores.items():
            found.setdefault(name, {})[metric] = score
    return found


@contextmanager
def _listening(metric: Any) -> Iterator[dict[str, float]]:
    """The scores that NNCF computes meanwhile, by the operation's name."""
    from nncf.quantization.algorithms.weight_compression.mixed_precision import MIXED_PRECISION_CRITERIA

    criterion = MIXED_PRECISION_CRITERIA.get(metric)
    original = criterion._calc_sensitivity
    scores: dict[str, float] = {}

    def listen(self: Any, model: Any, graph: Any, weight_params: Any, statistic_points: Any = None) -> list[float]:
        own: list[float] = original(self, model, graph, weight_params, statistic_points)
        scores.update((str(p.node_with_weight.node_name), float(s)) for p, s in zip(weight_params, own, strict=True))
        return own

    criterion._calc_sensitivity = listen
    try:
        yield scores
    finally:
        criterion._calc_sensitivity = original
