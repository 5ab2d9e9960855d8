"""Pages of their own: they load nothing from elsewhere; their tables; and how figures are written for people."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from html import escape

from edgert.charts import STYLE

_PAGE = (
    ":root{color-scheme:light dark}body{font-family:system-ui,sans-serif;margin:2em auto;max-width:64em;padding:0 1em}"
    "table{border-collapse:collapse;display:block;overflow-x:auto}svg{max-width:100%;height:auto}"
    "td,th{padding:.2em .8em;text-align:left;border-bottom:1px solid #8884}.n{text-align:right}"
    "tr.chosen{font-weight:600}tr.out{opacity:.6}"
)


def size(count: int) -> str:
    """Bytes for people, e.g. `3.4 MB` (decimal)."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def duration(us: float) -> str:
    """Microseconds for people, e.g. `1.24 s`."""
    for unit, each in (("s", 1e6), ("ms", 1e3)):
        if us >= each:
            return f"{us / each:.3g} {unit}" if us < 1000 * each else f"{us / each:.0f} {unit}"
    return f"{us:.3g} µs"


def table(cells: Sequence[Sequence[str]], *, numbers: Collection[int] = (), kinds: Sequence[str] = ()) -> str:
    """An HTML table; its first row is the heading.

    Args:
        numbers: columns that are set to the right.
        kinds: of each row but the heading: `chosen`, `out`, or empty.
    """
    shown = []
    for i, row in enumerate(cells):
        tag, kind = ("td", kinds[i - 1] if kinds else "") if i else ("th", "")
        start = f'<tr class="{kind}">' if kind else "<tr>"
        marks = (f"<{tag}{' class=n' if j in numbers else ''}>{escape(cell)}" for j, cell in enumerate(row))
        shown.append(start + "".join(marks))
    return "<table>" + "\n".join(shown) + "</table>\n"


def page(title: str, body: Iterable[str]) -> str:
    """A page.

    Args:
        body: its parts, as HTML.
    """
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>\n'
        f"<style>{_PAGE}{STYLE}</style></head><body>\n" + "\n".join(body) + "</body></html>\n"
    )
