"""Towers and `media.json` in a bundle in the making."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import openvino as ov
from edgert.converters.compress import Weights, compress, precision_table, to_fp16
from edgert.converters.quality import EXACT

from edgert.bundle import MEDIA, TOWERS
from edgert.errors import BundleError, cause
from edgert.graph import Block, BlockKind
from edgert.irgraph import make_names_unique
from edgert.partition import whole

if TYPE_CHECKING:  # which brings torch and transformers
    from edgert.converters.media.check import Arrays
    from edgert.converters.media.compiling import Media

TOWER_LIMIT = 1e-2  # relative error of INT8 weights against f16; a tower that exceeds it stays f16


def write_media(media: Media, folder: Path, weights: Weights) -> list[dict[str, Any]]:
    """Write `media.json` and the towers into a bundle in the making; gives rows of the table of precisions.

    Weights become INT8 where the language model's are compressed, if the tower then still says what it said.

    Raises:
        BundleError: the disk did not take it.
    """
    rows = []
    for name, tower in media.towers.items():
        to_fp16(tower)
        written = tower if weights == "fp16" else _compressed(tower, media.samples[name])
        make_names_unique(written)
        target = folder / TOWERS / name
        try:
            target.mkdir(parents=True)
            ov.save_model(written, target / "model.xml", compress_to_fp16=False)
        except (OSError, RuntimeError) as error:
            raise BundleError(f"{TOWERS}/{name}: cannot be written: {cause(error)}") from error
        rows += [{**row, "role": f"{name} tower"} for row in _merged(precision_table(written))]
    text = json.dumps(media.spec.to_json(), indent=1)
    try:
        (folder / MEDIA).write_text(text + "\n", "utf-8")
    except OSError as error:
        raise BundleError(f"{MEDIA}: cannot be written: {error.strerror}") from error
    return rows


def _compressed(tower: ov.Model, sample: Arrays) -> ov.Model:
    """The tower in INT8, or as it is where that would change its rows by more than `TOWER_LIMIT`."""
    small = compress(tower.clone(), "int8")
    exact, found = (
        np.array(ov.Core().compile_model(model, "CPU", EXACT)(sample)["features"]) for model in (tower, small)
    )
    error = float(np.max(np.abs(found - exact)) / np.max(np.abs(exact)))
    return small if error <= TOWER_LIMIT else tower


def _merged(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a precision; the roles that a tower's weights have for a language model mean nothing."""
    merged: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        key = row["precision"], row.get("group_size")
        known = merged.setdefault(key, {**row, "tensors": 0, "elements": 0, "bytes": 0})
        for count in ("tensors", "elements", "bytes"):
            known[count] += row[count]
    return [*merged.values()]


def tower_blocks(media: Media, folder: Path) -> tuple[Block, ...]:
    """What `BlockGraph.towers` says of the towers that `write_media` wrote."""
    blocks = []
    for index, name in enumerate(media.towers):
        block = whole(ov.Core().read_model(folder / TOWERS / name / "model.xml"), "").blocks[0]
        blocks.append(
            Block(index, BlockKind.TOWER, name, None, "features", (), block.weight_bytes, block.flops_per_token, 0, 0)
        )
    return tuple(blocks)
