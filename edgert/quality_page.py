"""How a model's precisions were chosen for a quality budget: quality.json as a page of its own, and as lines.

`record`, everywhere here, is what quality.json holds. Losses are nats a token; increases, budgets and bounds are
relative, 0.01 for 1 %. `version`, `budget`, `met`, `result`, `layers`, `measured`, `front`, `unit` are there always;
`model`, `reference`, `protocol`, `proxy`, `configs`, `target`, `seconds` may be missing or None, as may what a row of
theirs holds besides its name.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from edgert.page import duration, page, size, table
from edgert.quality_charts import (
    FORMAT_COLOURS,
    block_names,
    front_svg,
    layers_svg,
    percent,
    plan_of,
    proxy_svg,
)

QUALITY, QUALITY_PAGE = "quality.json", "quality.html"  # in a bundle
_AIMS = {"tokens_per_joule": "energy", "latency": "time in all", "throughput": "time of the decode"}
_PROTOCOL = {
    "text": "text", "sha256": "SHA-256 of its tokens", "generated": "written by the model", "seed": "seed",
    "window": "tokens of a window", "stride": "stride of the windows", "bos": "token that begins a window",
    "calibration_tokens": "tokens that scales were fitted to",
    "search_tokens": "tokens of sensitivities and random mixes", "verify_tokens": "tokens of the verification",
}  # fmt: skip


def quality_html(record: Mapping[str, Any]) -> str:
    """A page with every matrix, the front of quality against size and speed, the tests of predictions, the protocol."""
    sections = {
        "Layers": _layers(record),
        "Quality against size" if record["unit"] == "bytes" else "Quality against size and speed": _front(record),
        "How far predictions can be trusted": _proxy(record),
        "Every layer": _layer_tables(record),
        "On each configuration": _configs(record),
        "Target": _target(record),
        "Protocol": _protocol(record),
    }
    name = str(record.get("model") or "model")
    lines = [list(line) for line in quality_lines(record)]
    return page(
        f"{name}: quality",
        [
            f"<h1>{escape(name)}</h1>{_paragraph(headline(record))}",
            table([("", ""), *lines]),
            *(f"<h2>{title}</h2>\n{body}" for title, body in sections.items() if body),
        ],
    )


def headline(record: Mapping[str, Any]) -> str:
    """What was reached, in one line, e.g. `+0.83 % perplexity ± 0.1 (at most 1 % asked), 4.9 bits a weight, 2.3 MB`."""
    result = record["result"]
    kept = "" if record["met"] else ", NOT kept"
    return (
        f"{increased(result['increase'], result.get('standard_error'), 'perplexity')} (at most "
        f"{100 * record['budget']:g} % asked{kept}), {figure(result.get('bits_per_weight'))} bits a weight, "
        f"{size(result['bytes'])} (f16: {size(_f16_bytes(record))})"
    )


def quality_lines(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The main results for people: what a number is, and the number."""
    result, reference, proxy = record["result"], record.get("reference") or {}, record.get("proxy") or {}
    lines = [
        ("budget", _asked(record["budget"], record["met"])),
        ("perplexity", _beside(result.get("perplexity"), reference.get("perplexity"))),
        ("increase", increased(result["increase"], result.get("standard_error"))),
        ("with 95 % confidence", f"at most {increased(result.get('bound'))}"),
        ("divergence from the source", f"{figure(result.get('kl'))} nats a token, the same first choice for "
         f"{_share(result.get('agreement'))} of tokens"),
        ("weights", f"{size(result['bytes'])}, {figure(result.get('bits_per_weight'))} bits a weight "
         f"(f16: {size(_f16_bytes(record))})"),
        ("formats", _formats(record["layers"])),
    ]  # fmt: skip
    if record["unit"] != "bytes":
        lines.append((_aim(record), value_text(result.get("value"), record["unit"])))
    if proxy:
        lines.append(("rank correlation of predictions", f"{figure(proxy.get('rank_correlation'))} over "
                      f"{figure(proxy.get('mixes'))} random mixes"))  # fmt: skip
    price = _npu_price(record)
    if price:
        lines.append(("price of the NPU's recipe", price))
    return lines


def summary_lines(quality: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The same of a manifest's `report.quality` (`edgert.bundle.QUALITY_COLUMNS`)."""
    return [
        ("budget", _asked(quality["budget"], quality["met"])),
        ("increase", increased(quality["increase"], quality["standard_error"])),
        ("with 95 % confidence", f"at most {increased(quality['bound'])}"),
        ("perplexity", _beside(quality["perplexity"], quality["reference"])),
        ("measured on", f"{quality['config']}, {quality['tokens']} tokens of {quality['text']} "
         f"({quality['sha256'][:12]}…)"),
    ]  # fmt: skip


def increased(increase: Any, error: Any = None, of: str = "") -> str:
    """A relative increase with its standard error in percent, e.g. `+0.83 % ± 0.1`."""
    about = f" ± {figure(100 * error, 2)}" if _known(error) else ""
    amount = f"{100 * increase:+.3g}" if _known(increase) else "?"
    return f"{amount} %{f' {of}' if of else ''}{about}"


def figure(value: Any, digits: int = 3) -> str:
    """A number with at least so many digits; `?` where it is not known."""
    if isinstance(value, bool) or not _known(value):
        return "?"
    return str(value) if isinstance(value, int) else f"{value:.{digits}g}" if abs(value) < 1000 else f"{value:.0f}"


def value_text(value: Any, unit: str) -> str:
    """A value of the objective for people; `?` where it is not known."""
    if not _known(value):
        return "?"
    if unit == "bytes":
        return size(int(value))
    if unit == "us":
        return duration(value)
    return f"{value / 1e6:.3g} J" if unit == "uJ" else f"{value:.4g} {unit}"


def _known(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _share(value: Any) -> str:
    return f"{100 * value:.1f} %" if _known(value) else "? %"


def _asked(budget: float, met: bool) -> str:
    return f"at most {100 * budget:g} % more perplexity, {'kept' if met else 'NOT kept'}"


def _beside(perplexity: Any, reference: Any) -> str:
    return f"{figure(perplexity, 4)}, of the source {figure(reference, 4)}"


def _paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>\n"


def _details(summary: str, body: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>\n{body}</details>\n"


def _f16_bytes(record: Mapping[str, Any]) -> int:
    given = record["result"].get("f16_bytes")
    return int(given) if _known(given) else sum(2 * math.prod(layer["shape"]) for layer in record["layers"])


def _formats(layers: Iterable[Mapping[str, Any]]) -> str:
    """Which share of the weights has which format, e.g. `62 % int4-asym-g64, 38 % int8`."""
    elements: dict[str, int] = {}
    for layer in layers:
        elements[layer["format"]] = elements.get(layer["format"], 0) + math.prod(layer["shape"])
    total = sum(elements.values())
    ordered = sorted(elements.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{100 * count / total:.3g} % {name}" for name, count in ordered if total)


def _aim(record: Mapping[str, Any]) -> str:
    """What the mix was to have least of."""
    if record["unit"] == "bytes":
        return "size"
    objective = str((record.get("target") or {}).get("objective", "value"))
    return _AIMS.get(objective, objective)


def _layers(record: Mapping[str, Any]) -> str:
    told = "A column is a block, from the embedding on; a cell is a matrix, and says more under the pointer."
    if plan_of(record):
        told += " Below it stands where the block runs: in the prefill and, if that is elsewhere, in the decode."
    return _paragraph(told) + layers_svg(record)


def _front(record: Mapping[str, Any]) -> str:
    told = (
        f"Dashed: the least {_aim(record)} that is predicted for each loss. Points: what was measured, with one "
        "standard error; random mixes on the text of the sensitivities, the others on that of the verification. What "
        "lies below the axis is drawn on it."
    )
    valued = record["unit"] != "bytes"  # a value besides the size
    body = front_svg(record, "bytes") + (front_svg(record, "value") if valued else "")
    rows = [
        (
            row["name"], figure(row.get("predicted")), increased(row["increase"], row.get("standard_error")),
            figure(row.get("kl")), _share(row.get("agreement")), value_text(row.get("bytes"), "bytes"),
            *([value_text(row.get("value"), record["unit"])] if valued else []),
        )
        for row in record["measured"]
    ]  # fmt: skip
    values = ("size", _aim(record)) if valued else ("size",)
    measured = table(
        [("mix", "predicted, nats", "increase", "KL, nats", "agreement", *values), *rows], numbers=range(1, 7)
    )
    front = [
        (figure(row["predicted"]), f"{percent(row['predicted']):+.3g} %", value_text(row.get("bytes"), "bytes"),
         *([value_text(row.get("value"), record["unit"])] if valued else []))
        for row in record["front"]
    ]  # fmt: skip
    predicted = table([("predicted, nats", "increase", *values), *front], numbers=range(4))
    tables = [
        _details(f"{len(rows)} mixes that were measured", measured) if rows else "",
        _details(f"{len(front)} points of the predicted front", predicted) if front else "",
    ]
    return _paragraph(told) + body + "".join(tables) if body or rows or front else ""


def _proxy(record: Mapping[str, Any]) -> str:
    proxy = record.get("proxy")
    if not proxy:
        return ""
    told = (
        f"Predicted and measured increases of {figure(proxy.get('mixes'))} random mixes have a rank correlation "
        f"(Spearman's) of {figure(proxy.get('rank_correlation'))}. On the dashed line both are the same."
    )
    if _known(proxy.get("kl_rank_correlation")):
        told += f" With the measured KL divergence it is {figure(proxy['kl_rank_correlation'])}."
    if _known(proxy.get("slope")):
        told += f" Altogether {figure(proxy['slope'])} times the predicted loss was measured."
    metrics = proxy.get("metrics") or {}
    body = _paragraph(told) + proxy_svg(record, "increase")
    body += _paragraph("The KL divergence is the rise of the loss on text as the source itself would write it.")
    body += proxy_svg(record, "kl")
    if metrics:
        body += _paragraph("How NNCF's metrics of sensitivity rank the matrices, beside what was measured of each:")
        body += table(
            [("metric", "rank correlation"), *((name, figure(x)) for name, x in metrics.items())], numbers=(1,)
        )
    return body


def _layer_tables(record: Mapping[str, Any]) -> str:
    layers: Sequence[Mapping[str, Any]] = record["layers"]
    head = ("layer", "role", "shape", "format", "method", "size", "predicted, nats", "alone in", "KL, nats")
    rows = [
        (
            layer["name"], layer["role"], " × ".join(map(str, layer["shape"])), layer["format"],
            layer.get("method") or "–", size(layer["bytes"]), figure(layer["loss"]), layer.get("anchor") or "–",
            figure(layer.get("measured")),
        )
        for layer in layers
    ]  # fmt: skip
    told = "What each matrix became, the rise of the loss predicted of that, and what was measured with it alone so."
    body = _paragraph(told) + table([head, *rows], numbers=(5, 6, 8))
    return body + _options(layers) + _metrics(layers)


def _options(layers: Sequence[Mapping[str, Any]]) -> str:
    """The predicted loss and the size of each matrix in each format that was weighed."""
    offered = {option["format"] for layer in layers for option in layer.get("options") or ()}
    if not offered:
        return ""
    formats = [*(name for name in FORMAT_COLOURS if name in offered), *sorted(offered - set(FORMAT_COLOURS))]
    rows = []
    for layer in layers:
        options = {option["format"]: option for option in layer.get("options") or ()}
        cells = [_option(options.get(name), name == layer["format"]) for name in formats]
        rows.append((layer["name"], *cells))
    numbers = range(1, 1 + len(formats))
    told = "Options: predicted loss in nats, and size; → is what was chosen"
    return _details(told, table([("layer", *formats), *rows], numbers=numbers))


def _option(option: Mapping[str, Any] | None, chosen: bool) -> str:
    if option is None:
        return "–"
    return f"{'→ ' * chosen}{figure(option['loss'])}, {value_text(option.get('bytes'), 'bytes')}"


def _metrics(layers: Sequence[Mapping[str, Any]]) -> str:
    """What NNCF's metrics say of each matrix."""
    names = list(dict.fromkeys(name for layer in layers for name in layer.get("metrics") or {}))
    if not names:
        return ""
    rows = [(layer["name"], *(figure((layer.get("metrics") or {}).get(name)) for name in names)) for layer in layers]
    return _details("NNCF's metrics", table([("layer", *names), *rows], numbers=range(1, 1 + len(names))))


def _configs(record: Mapping[str, Any]) -> str:
    rows = [
        (
            row["config"], increased(row.get("increase"), row.get("standard_error")), increased(row.get("bound")),
            figure(row.get("kl")), _share(row.get("agreement")), "yes" if row.get("used") else "",
        )
        for row in record.get("configs") or ()
    ]  # fmt: skip
    head = ("configuration", "increase", "at most (95 %)", "KL, nats", "agreement", "has to keep the budget")
    told = "The finished model beside the source, on the configurations that this machine has:"
    return _paragraph(told) + table([head, *rows], numbers=range(1, 5)) if rows else ""


def _target(record: Mapping[str, Any]) -> str:
    target = record.get("target")
    if not target:
        return ""
    aim = f"{_aim(record)} {value_text(target.get('value'), record['unit'])}"
    body = _paragraph(f"{target.get('profile', '?')}: {aim}, as predicted by the profile.")
    price = _npu_price(record)
    if price:
        body += _paragraph(f"Price of the NPU's recipe: {price}.")
    plan = plan_of(record)
    if plan:
        last = max(p.last for placements in plan.phases.values() for p in placements)
        names = block_names(record["layers"], last + 1)
        rows = [
            (phase, f"{names[p.first]} to {names[p.last]}" if p.last > p.first else names[p.first], str(p.config))
            for phase, placements in plan.phases.items()
            for p in placements
        ]
        body += table([("phase", "blocks", "configuration"), *rows])
    return body


def _npu_price(record: Mapping[str, Any]) -> str:
    """What formats that an NPU takes cost, beside all formats, within the same budget."""
    price = (record.get("target") or {}).get("npu_price")
    if not price:
        return ""
    recipe, free = (
        f"{value_text(price.get(f'bytes_{kind}'), 'bytes')} at {increased(price.get(f'increase_{kind}'))}"
        for kind in ("recipe", "free")
    )
    return f"{recipe} where every format is one for NPUs, {free} where all are free"


def _protocol(record: Mapping[str, Any]) -> str:
    protocol, seconds = record.get("protocol") or {}, record.get("seconds") or {}
    rows = [(_PROTOCOL.get(name, name.replace("_", " ")), _plain(value)) for name, value in protocol.items()]
    reference = (record.get("reference") or {}).get("what")
    if reference:
        rows.append(("compared with", str(reference)))
    body = table([("", ""), *rows]) if rows else ""
    if seconds:
        times = [(stage, figure(value)) for stage, value in seconds.items()]
        body += table([("stage", "seconds"), *times], numbers=(1,))
    return body


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)
