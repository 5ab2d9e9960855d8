"""Two parts of a text that share no document: one to calibrate with, one to judge by."""

from __future__ import annotations

from pathlib import Path

from edgert.likelihood import END_OF_TEXT, documents

SLACK = 1 / 4  # of a half in which a line may end that a single document is cut at


def halves(text: str, limit: int) -> tuple[str, str]:
    """Cut a text in two near its middle, between documents, or between lines where it is a single one.

    Args:
        limit: characters of the text that are used, from its beginning; a document that goes beyond is left out, but
            for a single one, which is cut at a line.

    Raises:
        ValueError: it is too short for that.
    """
    parts = documents(text)
    if len(parts) > 1:
        while len(parts) > 2 and sum(map(len, parts)) > limit:
            parts.pop()
        half, first = sum(map(len, parts)) / 2, [parts.pop(0)]
        while len(parts) > 1 and sum(map(len, first)) + len(parts[0]) / 2 < half:
            first.append(parts.pop(0))
        return _joined(first), _joined(parts)
    single = parts[0] if parts else ""
    single = single[: _line(single, limit)]
    middle = _line(single, len(single) // 2)
    if not 0 < middle < len(single):
        raise ValueError(f"a text of {len(single)} characters cannot be cut in two")
    return _joined([single[:middle]]), _joined([single[middle:]])


def write_halves(source: Path, folder: Path, limit: int) -> tuple[Path, Path]:
    """Write both parts of a file as `calibration.txt` and `judged.txt`; a file that is right already is left."""
    found = []
    for name, part in zip(("calibration", "judged"), halves(source.read_text("utf-8"), limit), strict=True):
        path = folder / f"{name}.txt"
        if not path.exists() or path.read_text("utf-8") != part:
            path.write_text(part, "utf-8")
        found.append(path)
    return found[0], found[1]


def _joined(parts: list[str]) -> str:
    return "".join(f"{part.strip()}\n{END_OF_TEXT}\n" for part in parts)


def _line(text: str, at: int) -> int:
    """Where the line before a place begins, if that is near enough; else the place itself."""
    if at >= len(text):
        return len(text)
    found = text.rfind("\n", int(at * (1 - SLACK)), at)
    return at if found < 0 else found + 1
