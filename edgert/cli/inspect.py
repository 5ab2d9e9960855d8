"""`edgert inspect`: what is in a bundle."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.table import Table

from edgert.bundle import Bundle
from edgert.cli.compile import print_report
from edgert.cli.options import Subparsers, console, print_json
from edgert.npu.blobs import Blob, BlobStore
from edgert.page import size
from edgert.quality_page import QUALITY_PAGE, summary_lines

if TYPE_CHECKING:
    from rich.console import Console


def add_parser(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser("inspect", help="show what is in a bundle, and whether it is whole")
    parser.add_argument("bundle", metavar="BUNDLE")
    parser.add_argument("--verify", action="store_true", help="compare every file with its hash")
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    bundle = Bundle.open(options.bundle, verify=options.verify)
    blobs = BlobStore(bundle.path).blobs()
    if options.json:
        graph = bundle.graph.to_json() if bundle.graph else None
        facts, report = asdict(bundle.facts), asdict(bundle.report)
        npu = {"blobs": [asdict(blob) for blob in blobs], "weight_copy_bytes": _weight_copies(bundle, blobs)}
        media = bundle.media.to_json() if bundle.media else None
        print_json(
            {"model": facts, "report": report, "files": bundle.files, "graph": graph, "media": media, "npu": npu}
        )
        return 0
    out = console()
    out.print(str(bundle.path), soft_wrap=True)  # a title would be wrapped at the table's width
    table = Table("fact", "value")
    for name, value in {**asdict(bundle.facts), "source": bundle.report.source, **bundle.report.tools}.items():
        table.add_row(name, ", ".join(map(str, value)) if isinstance(value, tuple) else str(value))
    if bundle.graph:
        table.add_row(
            "blocks", str(len(bundle.graph.blocks)) + (f" ({bundle.graph.reason})" if bundle.graph.reason else "")
        )
    for name, text in _media(bundle):
        table.add_row(name, text)
    out.print(table)
    print_report(out, bundle)
    if bundle.report.quality is not None:
        _print_quality(out, bundle, bundle.report.quality)
    if blobs:
        _print_blobs(out, bundle, blobs)
    files = Table("file", "size", "sha256", title="files (hashes verified)" if options.verify else "files")
    for name, entry in bundle.files.items():
        files.add_row(name, size(entry["bytes"]), entry["sha256"][:12])
    out.print(files)
    return 0


def _media(bundle: Bundle) -> list[tuple[str, str]]:
    """What it takes beside text, in words."""
    if bundle.media is None:
        return []
    image, audio, found = bundle.media.image, bundle.media.audio, []
    if image is not None:
        how = f"tower {image.tower}, {image.height} × {image.width} pixels ({image.fit})"
        found.append(("images", f"{how}, {image.tokens} tokens a picture"))
    if audio is not None:
        most = audio.tokens(audio.frames) * audio.max_pieces
        found.append(("sound", f"tower {audio.tower}, up to {audio.seconds:g} s, at most {most} tokens"))
    return found


def _print_quality(out: Console, bundle: Bundle, quality: Mapping[str, Any]) -> None:
    table = Table("what", "value", title="quality")
    for name, value in summary_lines(quality):
        table.add_row(name, value)
    out.print(table)
    if QUALITY_PAGE in bundle.files:
        out.print(f"{bundle.path / QUALITY_PAGE} has every layer, the front, and how it was measured", soft_wrap=True)


def _print_blobs(out: Console, bundle: Bundle, blobs: Sequence[Blob]) -> None:
    table = Table("platform", "blocks", "shape", "size", "compiled in", "a call, estimated", title="NPU submodels")
    for blob in sorted(blobs, key=lambda b: (b.identity.platform, b.first, b.shape)):
        blocks = str(blob.first) if blob.first == blob.last else f"{blob.first}-{blob.last}"
        estimate = "" if blob.estimated_us is None else f"{blob.estimated_us:.0f} µs"
        platform = " ".join([blob.identity.platform, *(f"{k}={v}" for k, v in blob.identity.properties.items())])
        table.add_row(platform, blocks, str(blob.shape), size(blob.bytes), f"{blob.compile_s:.1f} s", estimate)
    out.print(table)
    files = {blob.file: blob.bytes for blob in blobs}
    copies = size(_weight_copies(bundle, blobs))
    out.print(
        f"{len(files)} blobs, {size(sum(files.values()))}; about {copies} of it are weights that the model holds too. "
        "Estimates are the compiler's, nothing was measured."
    )


def _weight_copies(bundle: Bundle, blobs: Sequence[Blob]) -> int:
    """Bytes of weights in the blobs, at the model's own precision: every blob has those of its blocks."""
    if bundle.graph is None:
        return 0
    held = [block.total_weight_bytes for block in bundle.graph.blocks]
    return sum(min(b.bytes, sum(held[b.first : b.last + 1])) for b in {b.file: b for b in blobs}.values())
