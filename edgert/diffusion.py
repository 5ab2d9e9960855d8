"""Diffusion transformers: one step of denoising, its blocks on the devices that a plan says.

    model = edgert.load_denoiser("ltx2.edge", place="embed=CPU@f32,*=GPU")
    outputs = model.denoise(inputs)

Sampling, text encoder and VAE are the caller's: a denoiser takes latents and gives latents.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgert.backends.base import Array, as_array
from edgert.bundle import DENOISER, Bundle, read_json
from edgert.chain import Chain
from edgert.choice import choose_plan
from edgert.device import DeviceConfig
from edgert.errors import BundleError, PlanError, UsageError
from edgert.executor import DEVICE_TIMEOUT_S
from edgert.fields import build
from edgert.placement import Plan
from edgert.stages import build as compile_plan

_DIM = re.compile(r"[A-Za-z_]\w{0,63}|[1-9][0-9]{0,8}", re.ASCII)
_TYPES = {"f32": np.dtype(np.float32), "i64": np.dtype(np.int64)}


@dataclass(frozen=True)
class Port:
    """An input of a denoiser.

    Attributes:
        dims: its dimensions, outermost first: a number, or the name of a size, which all inputs of a call agree on.
        type: of its elements.
    """

    dims: tuple[str, ...]
    type: Literal["f32", "i64"]

    def __str__(self) -> str:
        return f"{self.type} [{', '.join(self.dims)}]"


@dataclass(frozen=True)
class Signature:
    """What a denoiser takes and gives: `denoiser.json` of a bundle."""

    inputs: dict[str, Port]
    outputs: tuple[str, ...]

    @classmethod
    def read(cls, bundle: Bundle) -> Signature:
        """That of a bundle.

        Raises:
            BundleError: it is missing or damaged.
            UsageError: the bundle holds no denoiser.
        """
        if bundle.facts.task != "denoiser":
            raise UsageError(f"bundle {bundle.path} holds no denoiser but a model of text; edgert.load opens it")
        try:
            signature = build(cls, read_json(bundle.path, DENOISER), DENOISER)
            for name, port in signature.inputs.items():
                wrong = next((dim for dim in port.dims if not _DIM.fullmatch(dim)), None)
                if wrong is not None:
                    raise ValueError(
                        f"{DENOISER}: inputs.{name}: a dimension is {wrong[:60]!r}, expected {_DIM.pattern}"
                    )
            return signature
        except ValueError as error:
            raise BundleError(f"bundle {bundle.path}: {error}") from error

    def check(self, inputs: Mapping[str, Array]) -> None:
        """Raise `UsageError` unless every input is there, with its type and shape, and no other."""
        if unknown := sorted(set(inputs) - set(self.inputs)):
            raise UsageError(f"input {unknown[0]!r}: no such input; there are {', '.join(self.inputs)}")
        sizes: dict[str, tuple[int, str]] = {}  # and the input that says so
        for name, port in self.inputs.items():
            if name not in inputs:
                raise UsageError(f"input {name!r} is missing: expected {port}")
            array = inputs[name]
            if not isinstance(array, np.ndarray) or array.dtype != _TYPES[port.type]:
                found = array.dtype if isinstance(array, np.ndarray) else type(array).__name__
                raise UsageError(f"input {name!r} is {found}, expected an array {port}")
            if array.ndim != len(port.dims):
                raise UsageError(f"input {name!r} has shape {list(array.shape)}, expected {port}")
            for dim, size in zip(port.dims, array.shape, strict=True):
                expected, whose = (int(dim), "") if dim.isdecimal() else sizes.setdefault(dim, (size, name))
                if size != expected or size < 1:
                    because = f"; {whose!r} has {dim} {expected}" if whose else ""
                    raise UsageError(f"input {name!r} has shape {list(array.shape)}, expected {port}{because}")


class Denoiser:
    """A loaded diffusion transformer; made by `load_denoiser`. Calls from several threads take turns.

    Attributes:
        bundle: what it was loaded from.
        plan: where its blocks run.
        signature: what it takes and gives.
    """

    def __init__(self, bundle: Bundle, plan: Plan, *, timeout_s: float = DEVICE_TIMEOUT_S) -> None:
        self.bundle = bundle
        self.plan = plan
        self.signature = Signature.read(bundle)
        self._chain = _compiled(bundle, plan, self.signature.inputs, timeout_s)
        self._lock = threading.Lock()

    def denoise(self, inputs: Mapping[str, Array]) -> dict[str, NDArray[np.float32]]:
        """One pass through the transformer.

        Args:
            inputs: by name, as `signature` says; sizes may change from call to call.

        Returns:
            The outputs by name, f32.

        Raises:
            UsageError: an input is missing, unknown, or of another type or shape; the message names it.
            DeviceFailedError: a device failed, hung or gave NaN; `unit` says which.
        """
        self.signature.check(inputs)
        values: dict[str, Any] = {name: np.ascontiguousarray(array) for name, array in inputs.items()}
        with self._lock:
            self._chain.run(values, range(len(self._chain.stages)))
            if lacking := set(self.signature.outputs) - set(values):
                raise BundleError(f"bundle {self.bundle.path}: {DENOISER}: the model has no output {min(lacking)!r}")
            return {name: np.array(as_array(values[name]), np.float32) for name in self.signature.outputs}


def _compiled(bundle: Bundle, plan: Plan, inputs: Collection[str], timeout_s: float) -> Chain:
    """A plan's submodels in order, each on its device."""
    if bundle.graph is None:
        raise BundleError(f"bundle {bundle.path}: it has no block graph")
    plan.check(bundle.graph)
    if plan.decode is not None:
        raise PlanError("plan: a denoiser has one phase, the plan tells prefill and decode apart")
    if wrong := next((config for config in plan.configs if config.kernels), None):
        raise PlanError(
            f"plan: {wrong}: edgert's kernels are for decoders; a denoiser runs on CPU@f32, CPU@bf16 or a GPU"
        )
    (stages,), _ = compile_plan(bundle, bundle.graph, plan, None, inputs, timeout_s)
    return Chain(stages, {}, timeout_s)


def load_denoiser(
    path: str | os.PathLike[str],
    *,
    plan: Plan | str | os.PathLike[str] | None = None,
    device: str | DeviceConfig | None = None,
    place: str | None = None,
    device_timeout_s: float = DEVICE_TIMEOUT_S,
    verify: bool = False,
) -> Denoiser:
    """Load a bundle that holds a diffusion transformer.

    Args:
        path: a bundle (`*.edge`).
        plan: a `Plan`, or a JSON file that holds one.
        device: everything on this device configuration; `CPU@f32` is the default.
        place: an explicit placement, e.g. `embed=CPU@f32,*=GPU@f16`; see `Plan.explicit`.
        device_timeout_s: seconds that a call into a GPU may take; ten times as many for the first one.
        verify: compare every file with its hash first.

    Raises:
        BundleError, PlanError, DeviceError: the bundle, plan or device cannot be used.
        UsageError: the bundle holds a model of text, or more than one of `plan`, `device` and `place` is given.
    """
    bundle = Bundle.open(Path(path), verify=verify)
    Signature.read(bundle)  # now, and not after a plan was looked for
    if plan is None and place is None and device is None:
        device = "CPU@f32"
    return Denoiser(bundle, choose_plan(bundle, plan=plan, device=device, place=place), timeout_s=device_timeout_s)
