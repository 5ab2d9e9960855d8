"""Tiny diffusion transformers with random weights: of LTX-Video, of LTX-2, and what LTX-2.3 has beside it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

# Two blocks over a stream of video (4 heads of 16) and one of sound (4 heads of 8), widths as unlike as the real ones.
_COMMON: dict[str, Any] = {
    "in_channels": 8,
    "out_channels": 8,
    "num_attention_heads": 4,
    "attention_head_dim": 16,
    "cross_attention_dim": 64,
    "audio_in_channels": 4,
    "audio_out_channels": 4,
    "audio_num_attention_heads": 4,
    "audio_attention_head_dim": 8,
    "audio_cross_attention_dim": 32,
    "num_layers": 2,
    "caption_channels": 48,
    "rope_type": "split",  # what Lightricks/LTX-2 has; the class's own default is another
}
# The transformer of Lightricks/LTX-2.3: gates on attention, modulated text, no projection of it.
_CONFIGS: dict[str, dict[str, Any]] = {
    "ltx2": {},
    "ltx2.3": {
        "gated_attn": True,
        "cross_attn_mod": True,
        "audio_gated_attn": True,
        "audio_cross_attn_mod": True,
        "use_prompt_embeddings": False,
        "perturbed_attn": True,
    },
}
_LTX = (
    "in_channels", "out_channels", "num_attention_heads", "attention_head_dim", "cross_attention_dim", "num_layers",
    "caption_channels",
)  # fmt: skip
FAMILIES: tuple[str, ...] = ("ltx", *_CONFIGS)  # the first has no sound


def tiny(family: str = "ltx2", **settings: Any) -> Any:
    """A transformer of diffusers in f32, the same weights each time."""
    from diffusers import LTX2VideoTransformer3DModel, LTXVideoTransformer3DModel

    torch.manual_seed(0)
    if family == "ltx":
        shared = {name: _COMMON[name] for name in _LTX}
        return LTXVideoTransformer3DModel(**{**shared, **settings}).eval()
    return LTX2VideoTransformer3DModel(**{**_COMMON, **_CONFIGS[family], **settings}).eval()


def save_pipeline(folder: Path, family: str = "ltx2", **settings: Any) -> Path:
    """The folder of a pipeline as far as a transformer's conversion reads it: its index and the transformer."""
    folder.mkdir(parents=True, exist_ok=True)
    model = tiny(family, **settings)
    model.save_pretrained(folder / "transformer")
    index = {"transformer": ["diffusers", type(model).__name__]}
    (folder / "model_index.json").write_text(json.dumps(index), "utf-8")
    return folder


def relative_error(found: NDArray[Any], expected: NDArray[Any]) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def check(
    folder: Path,
    *,
    families: Sequence[str] = FAMILIES,
    weights: Sequence[str] = ("fp16", "int8", "int4"),
    **settings: Any,
) -> list[dict[str, Any]]:
    """Each family through compile, with its gate, and over two placements: rows for docs/models.md.

    A row: `family`, `weights`; `parity` (f32 export against diffusers), `cut` (every boundary), `placements` (CPU@f32
    in two pieces against one), all relative errors; `blocks` by kind; `recipe`, what keeps blocks from an NPU. Or
    `error`.
    """
    from edgert.converters.diffusion import transformer

    import edgert
    from edgert.backends.openvino import core
    from edgert.errors import EdgertError
    from edgert.npu.recipe import check as recipe
    from edgert.placement import Placement

    rows = []
    for family in families:
        source = save_pipeline(folder / family, family, **settings)
        values = transformer.example(tiny(family, **settings), transformer.SIZES[0])
        inputs = {name: tensor.numpy() for name, tensor in values.items()}
        for precision in weights:
            row: dict[str, Any] = {"family": family, "weights": precision}
            rows.append(row)
            try:
                bundle = edgert.compile(source, folder / f"{family}-{precision}.edge", weights=precision, kernels=False)
                graph = bundle.graph
                assert graph is not None
                row["parity"], *cuts = (check["relative_error"] for check in bundle.report.checks)
                row["cut"] = cuts[0] if cuts else graph.reason
                kinds = [str(block.kind) for block in graph.blocks]
                row["blocks"] = {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}
                expected = edgert.load_denoiser(bundle.path).denoise(inputs)
                config, half, last = edgert.DeviceConfig("CPU", "f32"), len(kinds) // 2, len(kinds) - 1
                plan = edgert.Plan((Placement(0, half - 1, config), Placement(half, last, config)), "two pieces")
                found = edgert.load_denoiser(bundle.path, plan=plan).denoise(inputs)
                row["placements"] = max(relative_error(found[name], expected[name]) for name in expected)
                row["recipe"] = [str(finding) for finding in recipe(core().read_model(bundle.model_path), graph)]
            except EdgertError as error:
                row["error"] = str(error)
    return rows
