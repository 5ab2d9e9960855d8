"""`edgert fit`: which models a machine can hold, how fast they would be, and what their tokens cost."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Column, Table

from edgert.architecture import PRECISIONS, Weights
from edgert.catalogue import CatalogueModel, find, from_file
from edgert.cli.options import Subparsers, console, find_profile, print_json
from edgert.cost import Costs, Workload
from edgert.device import DeviceKind
from edgert.errors import PlanError, UsageError
from edgert.placement import Plan
from edgert.prediction import Prediction, memory_bytes, predict
from edgert.profile import Profile
from edgert.shapes import StaticShapes

JOULES_PER_KWH = 3.6e6
GIB = 2**30  # memory is sold so: a 16 GB laptop has 16 GiB
RESERVE_GIB = 4.0  # an assumption: a desktop with a browser
OBJECTIVES = ("tokens_per_joule", "latency")  # as `edgert plan` calls them
PACKED = "INT4 on an NPU is reckoned with one scale a row, which is what NPUs keep packed"
UNPACKED = (
    "FP16's prefill is reckoned at the profile's one rate for products; where that was fitted to compressed weights, "
    "as in the profiles that come with edgert, published runs took up to 1.7 times as long"
)
EPILOG = """\
examples
  edgert fit --profile lunarlake --memory 16
  edgert fit --profile lunarlake --memory 32 --context 16384 --weights int4 --objective latency
  edgert fit --profile lunarlake --memory 32 ./Qwen3-30B-A3B/config.json
  edgert fit --profile pantherlake --memory 32 --model qwen3 --model gpt-oss --price-kwh 0.30 --api-price 0.60

Each model runs on the one device configuration of the profile that suits the objective best; `edgert plan MODEL`
finds out whether several do better. Prices are in whatever currency they are given in. What is reckoned is the shape of
a model: not whether it is good, and not whether `edgert compile` knows its family.
"""


def add_parser(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser("fit", help="which models a machine can run, how fast, for how much", epilog=EPILOG)
    parser.add_argument(
        "--profile", required=True, metavar="NAME", help="a profile that comes with edgert, a file, or `measured`"
    )
    parser.add_argument("--memory", type=float, metavar="GIB", help="of the machine (default: what its profile says)")
    parser.add_argument(
        "--reserve", type=float, default=RESERVE_GIB, metavar="GIB",
        help="of it for the system, other programs and what the runtime needs beside a model (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "configs", nargs="*", type=Path, metavar="CONFIG", help="a config.json or its folder, instead of the catalogue"
    )
    parser.add_argument("--model", action="append", metavar="NAME", help="only models with this in their name; repeat")
    parser.add_argument("--weights", action="append", choices=PRECISIONS, help="only this precision; repeat")
    parser.add_argument(
        "--context", type=int, default=4096, metavar="N", help="tokens to have room for (default: 4096)"
    )
    parser.add_argument("--prompt", type=int, default=1024, metavar="N", help="tokens (default: 1024)")
    parser.add_argument("--new", type=int, default=256, metavar="N", help="tokens, 2 or more (default: 256)")
    parser.add_argument("--objective", choices=OBJECTIVES, default=OBJECTIVES[0], help="default: %(default)s")
    parser.add_argument("--price-kwh", type=float, metavar="PRICE", help="of a kilowatt hour")
    parser.add_argument("--api-price", type=float, metavar="PRICE", help="of a million new tokens from somebody else")
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.set_defaults(run=run)


@dataclass(frozen=True)
class Row:
    """A model at a precision on a machine.

    Attributes:
        model, weights: which.
        parameters: of the text model; active_parameters: those that one token uses.
        memory_bytes: weights, those of towers for images and sound too, keys, values and states at the context length,
            on the configuration named; without the reserve.
        config: where it would run; None where the profile has no configuration that takes the model.
        why_not: why it does not fit; None where it does. The speeds are then None, as are those of a
            diffusion transformer, which makes no tokens.
        prefill_tokens_per_second, ttft_ms: of the prompt.
        decode_tokens_per_second: of the tokens after the first.
        joules_per_token: of the whole machine over prompt and continuation, for each new token; None where not known.
        price_per_million: of a million new tokens in electricity; None without a price or joules.
        api_ratio: how many times that the price of somebody else's is; None without either.
        provenance, energy_provenance: of the times and the joules, the worst of what they rest on.
        notes: what was assumed of the model's shape, and of its speed.
    """

    model: str
    weights: str
    parameters: int
    active_parameters: int
    memory_bytes: int | None
    config: str | None
    why_not: str | None
    prefill_tokens_per_second: float | None = None
    ttft_ms: float | None = None
    decode_tokens_per_second: float | None = None
    joules_per_token: float | None = None
    price_per_million: float | None = None
    api_ratio: float | None = None
    provenance: str | None = None
    energy_provenance: str | None = None
    notes: tuple[str, ...] = ()


def run(options: argparse.Namespace) -> int:
    profile = find_profile(options.profile)
    room = _room(options, profile)
    chosen = _chosen(options)
    rows = [
        _row(entry, weights, profile, room, options)
        for entry in chosen
        for weights in PRECISIONS
        if not options.weights or weights in options.weights
    ]
    rows.sort(key=lambda row: row.why_not is not None)
    if options.json:
        print_json({**_conditions(options, profile, room), "models": [asdict(row) for row in rows]})
    else:
        _print(rows, chosen, options, profile, room)
    return 0


def _chosen(options: argparse.Namespace) -> tuple[CatalogueModel, ...]:
    """Models by their configurations, by name, or all of the catalogue."""
    if not options.configs:
        return find(options.model or [])
    given = tuple(from_file(path) for path in options.configs)
    return (*given, *find(options.model)) if options.model else given


def _room(options: argparse.Namespace, profile: Profile) -> int:
    """Bytes that a model may take."""
    if options.memory is None and profile.memory_bytes is None:
        raise UsageError(f"profile {options.profile} does not say how much memory there is; give --memory GIB")
    memory: float = (profile.memory_bytes or 0) / GIB if options.memory is None else options.memory
    for name, value, least, most in (
        ("--memory", memory, 0.1, 1e6), ("--reserve", options.reserve, 0, 1e6), ("--prompt", options.prompt, 1, 2**20),
        ("--new", options.new, 2, 2**20), ("--context", options.context, 1, 2**20),
        ("--price-kwh", options.price_kwh, 0, 1e9), ("--api-price", options.api_price, 0, 1e9),
    ):  # fmt: skip
        if value is not None and not least <= value <= most:
            raise UsageError(f"{name} is {value:g}, expected {least} to {most:g}")
    if options.prompt + options.new > options.context:
        tokens = options.prompt + options.new
        raise UsageError(f"--prompt and --new are {tokens} tokens together, --context has room for {options.context}")
    reserve: float = options.reserve
    return round(max(0.0, memory - reserve) * GIB)


def _row(entry: CatalogueModel, weights: Weights, profile: Profile, room: int, options: argparse.Namespace) -> Row:
    """What a model would take on the configuration that suits it best, among those that have room for it."""
    shape = entry.shape(weights)
    facts: dict[str, Any] = {
        "model": entry.name, "weights": shape.weights, "parameters": shape.parameters,
        "active_parameters": shape.active_parameters,
    }  # fmt: skip
    load = Workload(options.prompt, options.new)
    context = shape.context_length
    shapes = StaticShapes((load.chunk,)).within(max(options.context, load.chunk))
    usual, packed = (Costs(s.graph, profile, shapes) for s in (shape, entry.shape(weights, group_size=-1)))
    towers = sum(tower.total_weight_bytes for tower in shape.graph.towers)
    needed: dict[str, int] = {}
    found: list[tuple[str, Prediction]] = []
    refused = "the profile names no device"
    for config in profile.configs:
        costs = packed if config.kind is DeviceKind.NPU else usual
        plan = Plan.single(costs.graph, config)
        try:
            plan.check(costs.graph)
        except PlanError as error:
            refused = str(error)
            continue
        needed[str(config)] = sum(memory_bytes(costs, plan, options.context).values()) + towers
        if needed[str(config)] <= room and (context is None or options.context <= context):
            found.append((str(config), predict(costs, plan, load)))
    if not needed:
        return Row(**facts, memory_bytes=None, config=None, why_not=refused, notes=shape.notes)
    if not found:
        least = min(needed, key=lambda name: needed[name])
        short = f"more than the {_gibibytes(room)} GiB that are left"
        why = f"its context holds {context} tokens" if context is not None and context < options.context else short
        return Row(**facts, memory_bytes=needed[least], config=least, why_not=why, notes=shape.notes)
    config_name, best = min(found, key=lambda item: _rank(item[1], options.objective))
    if not shape.vocab_size:  # a diffusion transformer: no prompt, no new tokens
        return Row(**facts, memory_bytes=needed[config_name], config=config_name, why_not=None, notes=shape.notes)
    joules = None if best.energy_uj is None else best.energy_uj / 1e6 / load.new_tokens
    price = None if joules is None or options.price_kwh is None else joules * 1e6 / JOULES_PER_KWH * options.price_kwh
    notes = [PACKED] * (weights == "int4" and config_name.startswith(DeviceKind.NPU)) + [UNPACKED] * (weights == "fp16")
    return Row(
        **facts,
        memory_bytes=needed[config_name],
        config=config_name,
        why_not=None,
        prefill_tokens_per_second=load.prompt_tokens / best.prefill_us * 1e6,
        ttft_ms=best.prefill_us / 1e3,
        decode_tokens_per_second=best.tokens_per_second,
        joules_per_token=joules,
        price_per_million=price,
        api_ratio=options.api_price / price if options.api_price is not None and price else None,
        provenance=best.provenance,
        energy_provenance=best.energy_provenance,
        notes=(*shape.notes, *notes),
    )


def _rank(prediction: Prediction, objective: str) -> tuple[float, float]:
    """Less is better; where the joules are not known, time decides."""
    joules = math.inf if prediction.energy_uj is None or objective == "latency" else prediction.energy_uj
    return joules, prediction.total_us


def _conditions(options: argparse.Namespace, profile: Profile, room: int) -> dict[str, Any]:
    return {
        "machine": profile.machine, "room_bytes": room, "context": options.context, "prompt_tokens": options.prompt,
        "new_tokens": options.new, "chunk_tokens": Workload.chunk, "objective": options.objective,
        "price_kwh": options.price_kwh, "api_price": options.api_price,
    }  # fmt: skip


def _print(
    rows: Sequence[Row],
    chosen: Sequence[CatalogueModel],
    options: argparse.Namespace,
    profile: Profile,
    room: int,
) -> None:
    """The table, and below it what its numbers rest on."""
    priced = options.price_kwh is not None
    compared = priced and options.api_price is not None
    fitting = [row for row in rows if row.why_not is None]
    headings = ["GiB", "prefill\ntok/s", "TTFT\ns", "decode\ntok/s", "J per\ntoken"]
    headings += ["price of\n10^6"] * priced + ["API\ncosts"] * compared
    table = Table(
        *(Column(name, overflow="fold") for name in ("model", "on")),
        title=profile.machine,
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in fitting:
        cells = [
            _gibibytes(row.memory_bytes),
            _number(row.prefill_tokens_per_second),
            _number(None if row.ttft_ms is None else row.ttft_ms / 1e3),
        ]
        cells += [_number(row.decode_tokens_per_second), _number(row.joules_per_token)]
        cells += [_number(row.price_per_million)] * priced
        cells += ["?" if row.api_ratio is None else f"{_number(row.api_ratio)} x"] * compared
        table.add_row(f"{row.model}, {row.weights}", row.config, *cells)
    rest = Table("model", Column("GiB", justify="right"), "why not", title="does not fit", style="dim")
    rest.box, rest.padding = box.SIMPLE_HEAD, (0, 1, 0, 0)
    for row in rows[len(fitting) :]:
        rest.add_row(f"{row.model}, {row.weights}", _gibibytes(row.memory_bytes), row.why_not, style="dim")
    out = console()
    for part in (table, rest):
        if part.row_count:
            out.print(part)
    out.print(
        "GiB: weights (twice where shapes are static), towers for images and sound, keys and values for "
        f"{options.context} tokens, by each model's shape; {_gibibytes(room)} are left of the machine's, as "
        f"{options.reserve:g} are assumed to go elsewhere."
    )
    out.print(
        f"Speed and energy: a prompt of {options.prompt} in chunks of {Workload.chunk}, and {options.new} new tokens; "
        f"joules are all that the machine draws, by new token. Best for {options.objective} among single devices."
    )
    if priced:
        apart = " An API may charge prompts apart from that." if compared else ""
        out.print(f"The price of 10^6 new tokens has the electricity of their prompts in it.{apart}")
    times, joules = ({getattr(row, name) for row in rows} - {None} for name in ("provenance", "energy_provenance"))
    said = f"Times are {_listed(times)}, joules {_listed(joules)}, by the profile of {profile.machine}."
    out.print(said + (f" {profile.source}" if profile.source else ""))
    for model in profile.devices:
        if any(row.config == str(model.device) for row in fitting):
            out.print(f"  {model.device} ({model.provenance}): {model.source}", style="dim")
    for note in dict.fromkeys(note for row in rows for note in row.notes):
        whose = ", ".join(dict.fromkeys(row.model for row in rows if note in row.notes))
        out.print(f"note: {note}" if note in {PACKED, UNPACKED} else f"note: {note}: {whose}")
    unverified = [entry.name for entry in chosen if not entry.verified]
    if unverified:
        out.print(f"note: shapes by quotation or a library's defaults: {', '.join(unverified)}")


def _gibibytes(count: int | None) -> str:
    return "" if count is None else f"{count / GIB:.1f}"


def _listed(words: set[Any]) -> str:
    return " and ".join(sorted(words)) or "not known"


def _number(value: float | None) -> str:
    """Three digits that count, without an exponent."""
    if value is None:
        return "?"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
