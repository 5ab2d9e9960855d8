"""edgert: language models on small Intel machines, placed by measurement.

    model = edgert.load("demo.edge")
    print(model.generate("Once upon a time", max_tokens=64).text)

Everything below is imported when it is first used, so `import edgert` costs next to nothing and never pulls in what
only `compile` needs.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

# OpenVINO reports every import to its maker's web analytics unless the reporter is missing. Whoever runs a model on
# their own machine has not asked for that; with this name taken, OpenVINO and NNCF use their own stubs instead.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]

if TYPE_CHECKING:
    from edgert.backends import devices as devices
    from edgert.bundle import Bundle as Bundle
    from edgert.converters import compile as compile
    from edgert.device import DeviceConfig as DeviceConfig
    from edgert.device import DeviceInfo as DeviceInfo
    from edgert.diffusion import Denoiser as Denoiser
    from edgert.diffusion import load_denoiser as load_denoiser
    from edgert.errors import EdgertError as EdgertError
    from edgert.evaluation import Evaluation as Evaluation
    from edgert.graph import BlockGraph as BlockGraph
    from edgert.kvcache import KvCache as KvCache
    from edgert.placement import Plan as Plan
    from edgert.results import Event as Event
    from edgert.results import Piece as Piece
    from edgert.results import Result as Result
    from edgert.sampling import SamplingParams as SamplingParams
    from edgert.service.client import AsyncClient as AsyncClient
    from edgert.service.client import Client as Client
    from edgert.session import Model as Model
    from edgert.session import load as load
    from edgert.shapes import StaticShapes as StaticShapes
    from edgert.subjects import evaluate as evaluate

__version__ = "0.1.0"

_PUBLIC = {
    "AsyncClient": "edgert.service.client",
    "BlockGraph": "edgert.graph",
    "Bundle": "edgert.bundle",
    "Client": "edgert.service.client",
    "Denoiser": "edgert.diffusion",
    "DeviceConfig": "edgert.device",
    "DeviceInfo": "edgert.device",
    "EdgertError": "edgert.errors",
    "Evaluation": "edgert.evaluation",
    "Event": "edgert.results",
    "KvCache": "edgert.kvcache",
    "Model": "edgert.session",
    "Piece": "edgert.results",
    "Plan": "edgert.placement",
    "Result": "edgert.results",
    "SamplingParams": "edgert.sampling",
    "StaticShapes": "edgert.shapes",
    "compile": "edgert.converters",
    "devices": "edgert.backends",
    "evaluate": "edgert.subjects",
    "load": "edgert.session",
    "load_denoiser": "edgert.diffusion",
}

__all__ = [*sorted(_PUBLIC)]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'edgert' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
