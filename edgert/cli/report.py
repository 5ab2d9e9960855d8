"""A plan as a page of its own: pictures and tables that load nothing from elsewhere; and how figures are written."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from edgert import charts
from edgert.charts import Point
from edgert.cli import picture
from edgert.cli.picture import config_columns, plan_svg, rows
from edgert.graph import Block, BlockGraph
from edgert.page import duration, page, size, table
from edgert.placement import Plan
from edgert.prediction import Prediction
from edgert.profile import PROVENANCES, Profile

if TYPE_CHECKING:
    from edgert.scheduler import Schedule, Sensitivity

FIGURES = ("TTFT", "TPOT", "tok/s", "J/token", "tok/J", "W", "memory")
_AIMS = {
    "tokens_per_joule": "most tokens a joule", "latency": "least time in all", "throughput": "fastest after the prompt",
}  # fmt: skip
_MOST_BARS = 16


@dataclass(frozen=True)
class Line:
    """A plan in the table of plans.

    Attributes:
        name: what it is.
        plan, prediction: what runs where, and what that takes; None where there is no such plan.
        chosen: whether it is the plan that the command gives.
        broken: why it cannot be chosen; empty where it can.
    """

    name: str
    plan: Plan | None
    prediction: Prediction | None
    chosen: bool = False
    broken: str = ""


@dataclass(frozen=True)
class Study:
    """A plan, those it was compared with, and what the comparison rests on.

    Attributes:
        name: of the model.
        graph: its blocks.
        profile: of the machine that the plan is for.
        schedule: what the scheduler found.
        plan, prediction: the plan that the command gives: the scheduler's, or the one that was asked about.
        broken: why the scheduler could not choose that plan, a phrase each; empty where it could.
        sensitivity: of it; empty where nobody asked.
        notes: what the reader must know.
    """

    name: str
    graph: BlockGraph
    profile: Profile
    schedule: Schedule
    plan: Plan
    prediction: Prediction
    broken: tuple[str, ...] = ()
    sensitivity: tuple[Sensitivity, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def given(self) -> bool:
        """Whether the plan is another one than the scheduler's."""
        return _place(self.plan) != _place(self.schedule.plan)

    @property
    def title(self) -> str:
        """What the plan is to be best at, where, and for how many tokens."""
        load = self.prediction.load
        return (
            f"{self.profile.machine}: {_AIMS[self.schedule.objective]} for a prompt of {load.prompt_tokens} tokens in "
            f"chunks of {load.chunk} and {load.new_tokens} new ones"
        )

    @property
    def lines(self) -> list[Line]:
        """The plan, the scheduler's where that is another one, and the baselines: the best that can be chosen first."""
        objective = self.schedule.objective

        def rank(line: Line) -> tuple[bool, float, float]:
            p = line.prediction
            if p is None:
                return True, math.inf, math.inf
            value = {"tokens_per_joule": p.energy_uj, "throughput": p.decode_us}.get(objective, p.total_us)
            return bool(line.broken), math.inf if value is None else value, p.total_us

        best = Line("scheduled", self.schedule.plan, self.schedule.prediction, chosen=not self.given)
        broken = "; ".join(self.broken)
        given = [Line("given", self.plan, self.prediction, chosen=True, broken=broken)] if self.given else []
        rest = [Line(b.name, b.plan, b.prediction, broken="; ".join(b.broken)) for b in self.schedule.baselines]
        return [*given, best, *sorted(rest, key=rank)]

    @property
    def library(self) -> list[Line]:
        """Plans to switch between, the most economical first."""
        own = _place(self.plan)
        return [Line(c.name, c.plan, c.prediction, chosen=_place(c.plan) == own) for c in self.schedule.library]


def _place(plan: Plan) -> object:
    return plan.placements, plan.decode


def amount(schedule: Schedule, value: float) -> str:
    """A value of the objective (`Schedule.value`) for people."""
    return f"{value / 1e6:.3g} J" if schedule.objective == "tokens_per_joule" else duration(value)


def figures(prediction: Prediction | None) -> tuple[str, ...]:
    """What a plan takes, in the order of `FIGURES`; `?` where it is not known."""
    if prediction is None:
        return ("",) * len(FIGURES)
    p = prediction
    joules = None if p.energy_uj is None else p.energy_uj / 1e6 / p.load.new_tokens

    def number(value: float | None) -> str:
        return "?" if value is None else f"{value:.3g}" if value < 1000 else f"{value:.0f}"

    return (
        duration(p.prefill_us), "–" if p.tpot_us is None else duration(p.tpot_us),
        "–" if p.tokens_per_second is None else number(p.tokens_per_second), number(joules),
        number(p.tokens_per_joule), number(p.watts), size(sum(p.memory_bytes.values())),
    )  # fmt: skip


def basis(profile: Profile, prediction: Prediction) -> str:
    """What the numbers rest on, in one line."""
    counts = Counter(entry.provenance for entry in prediction.entries)
    parts = [f"times rest on {', '.join(f'{counts[p]} {p}' for p in PROVENANCES if counts[p])} entries"]
    if prediction.energy_provenance is None:
        parts.append(f"energy not known, for want of {', '.join(prediction.missing)}")
    else:
        parts.append(f"energy {prediction.energy_provenance}")
    if profile.base_w is not None:
        likely = "{:g}–{:g} W likely, ".format(*profile.base_range) if profile.base_range else ""
        parts.append(f"base {profile.base_w:g} W ({likely}{profile.base_provenance})")
    return "; ".join(parts)


def proof(schedule: Schedule) -> str:
    """How sure it is that no plan is better than the scheduler's, in one line."""
    if schedule.bound is None or schedule.gap is None:
        return "no plan whose devices take turns keeps the limits; in this one some work at the same time"
    bound = amount(schedule, schedule.bound)
    if schedule.gap:
        above = schedule.value / schedule.bound - 1 if schedule.bound else math.inf
        return f"at most {above:.2%} above {bound}, and no plan whose devices take turns gets below that"
    return f"proved: no plan whose devices take turns gets below {bound}"


def runner_ups(study: Study, *, each: bool) -> list[tuple[str, ...]]:
    """For every block of the scheduler's plan where it would go next, and at what price, with a heading.

    Cells are empty where nothing is decided: in a decode without tokens, or one that goes with the prefill.

    Args:
        each: a row for every block, or one for those of which the same is to be said.
    """
    found = {(r.block, r.phase): r for r in study.schedule.runner_ups}
    decodes = study.prediction.load.new_tokens > 1
    least = "≥ " if _tight(study) else "+"
    columns = list(config_columns(study.schedule.plan).values())
    alike: dict[tuple[str, ...], list[Block]] = {}
    for block in study.graph.blocks:
        cells = [block.name if each else block.signature]
        for phase, column in (("prefill", columns[0]), ("decode", columns[-1])):
            cells.append(column[block.index] if phase == "prefill" or decodes else "")
            r = found.get((block.index, phase))
            if r is None:
                cells += ["", ""]
            elif r.config is None or r.price is None:
                cells += ["nowhere", ""]
            else:
                cells += [r.config, least + amount(study.schedule, r.price)]
        alike.setdefault(tuple(cells), []).append(block)
    rows = [(picture.together(blocks), *cells[1:]) for cells, blocks in alike.items()]
    return [("block", "prefill on", "or", "for", "decode on", "or", "for"), *rows]


def _tight(study: Study) -> bool:
    """Whether a limit may make a block's runner-up dearer than its price says."""
    keep, load = study.schedule.constraints, study.prediction.load
    tokens, blocks = load.prompt_tokens + load.new_tokens, study.graph.blocks
    # No plan holds a block more than twice, once for each phase.
    most = 2 * sum(b.total_weight_bytes + b.recurrent_bytes + b.kv_bytes_per_token * tokens for b in blocks)
    return bool(keep.required) or any(n != "max_memory_bytes" or limit < most for n, limit in keep.limits.items())


def whose(study: Study) -> str:
    """Of which plan the runners-up are, where that is not the one that the command gives."""
    return " of the scheduled plan, not of the given one" if study.given else ""


def changes(study: Study) -> list[tuple[str, ...]]:
    """What becomes of the plan where the profile is wrong, with a heading."""
    table: list[tuple[str, ...]] = [("if", "is", "the plan takes", "the best takes", "")]
    for row in study.sensitivity:
        again = "–" if row.again is None else amount(study.schedule, row.again)
        other = "nothing keeps the limits" if row.again is None else "another plan" if row.changed else ""
        table.append((row.what, f"× {row.factor:g}", amount(study.schedule, row.kept), again, other))
    return table


def plan_html(name: str, graph: BlockGraph, plan: Plan) -> str:
    """A page of its own with the picture and the table; it loads nothing from elsewhere."""
    return page(f"{name}: plan", [plan_svg(name, graph, plan), _block_table(graph, plan, each=True)])


def study_html(study: Study) -> str:
    """A page with the blocks, the Pareto front, where the energy goes, the baselines, and what they rest on."""
    lines, library = study.lines, study.library
    plans = [line.plan for line in (*lines, *library) if line.plan is not None]
    colours = charts.palette([str(config) for plan in plans for config in plan.configs])
    remarks = [*study.notes, *study.plan.warnings, basis(study.profile, study.prediction), proof(study.schedule)]
    each = len(study.graph.blocks) <= picture.EACH
    sections = {
        "Blocks": [plan_svg(study.name, study.graph, study.plan, colours),
                   _block_table(study.graph, study.plan, each=each)],
        "Time and energy": ["<p>Large: the library; small: baselines; the colour is where most blocks run, grey what "
                            "cannot be chosen.</p>",
                            _front(lines, library, colours)],
        "Where the energy goes": [_energy(lines, colours)],
        "Baselines": [_plans(lines)],
        "Library": ["<p>Plans to switch between at run time.</p>", _plans(library)],
        "Sensitivity": [_tornado(study), table(changes(study), numbers=(1, 2, 3))],
        "Runners-up": [f"<p>Where a block{whose(study)} would run if not where it does, and what that costs.</p>",
                       table(runner_ups(study, each=each), numbers=(3, 6))],
        "What the numbers rest on": [_sources(study)],
    }  # fmt: skip
    return page(
        f"{study.name}: plan",
        [
            f"<h1>{escape(study.name)}</h1><p>{escape(study.title)}</p>",
            table([FIGURES, figures(study.prediction)]),
            *(f"<p>{escape(remark)}</p>" for remark in remarks),
            *(f"<h2>{title}</h2>{''.join(parts)}" for title, parts in sections.items() if all(parts)),
        ],
    )


def _front(lines: Sequence[Line], library: Sequence[Line], colours: Mapping[str, str]) -> str:
    """Time against energy, or prefill against decode where the energy of some plan is not known."""
    found = [(line, line.plan, line.prediction) for line in (*lines, *library) if line.plan and line.prediction]
    energy = all(p.energy_uj is not None for _, _, p in found)
    points = []
    for line, plan, p in found:
        x, y = (p.total_us, p.energy_uj or 0.0) if energy else (p.prefill_us + p.handover_us, p.decode_us)
        blocks = Counter(config for column in config_columns(plan).values() for config in column)
        labelled = line in library or (line.chosen and not any(other.chosen for other in library))
        colour = colours[blocks.most_common(1)[0][0]]
        points.append(Point(line.name, x / 1e6, y / 1e6, colour, labelled, out=bool(line.broken)))
    titles = ("seconds in all", "joules in all") if energy else ("seconds of prefill", "seconds of decode")
    return charts.points_svg(points, *titles)


def _energy(lines: Sequence[Line], colours: Mapping[str, str]) -> str:
    """Bars of what each device draws, and the machine; nothing where no energy is known."""
    bars = {
        line.name: {part: uj / 1e6 for part, uj in line.prediction.energy_parts_uj.items() if uj}
        for line in lines
        if line.prediction is not None and line.prediction.energy_uj is not None
    }
    bars = dict(list(bars.items())[:_MOST_BARS])
    used = dict.fromkeys(part for parts in bars.values() for part in parts)
    fixed = {"waiting": "#CCCCCC", "base": "#777777"}
    return charts.bars_svg(bars, {part: fixed.get(part) or colours[part] for part in used}, "J") if bars else ""


def _tornado(study: Study) -> str:
    """By how much the best plan gets better or worse where the profile is wrong."""
    pairs: dict[str, list[float | None]] = {}
    for row in study.sensitivity:
        now = row.kept if row.again is None else row.again
        pairs.setdefault(row.what, [None, None])[row.factor > 1] = now / study.schedule.value - 1
    ordered = sorted(pairs.items(), key=lambda item: -max(abs(change or 0.0) for change in item[1]))
    colours, labels = ("#56B4E9", "#D55E00"), ("a fifth less", "a fifth more")
    return charts.tornado_svg(dict(ordered), colours, labels)


def _plans(lines: Sequence[Line]) -> str:
    body = [
        (line.name, where(line.plan), *figures(line.prediction), line.broken or ("chosen" if line.chosen else ""))
        for line in lines
    ]
    kinds = ["chosen" if line.chosen else "out" if line.broken else "" for line in lines]
    return table([("plan", "runs on", *FIGURES, ""), *body], numbers=range(2, 2 + len(FIGURES)), kinds=kinds)


def where(plan: Plan | None) -> str:
    """Which configurations a plan uses in each phase, in one line."""
    if plan is None:
        return ""
    used = [" + ".join(dict.fromkeys(str(p.config) for p in placements)) for placements in plan.phases.values()]
    return used[0] if len(used) == 1 else f"{used[0]} → {used[1]}"


def _block_table(graph: BlockGraph, plan: Plan, *, each: bool) -> str:
    head = ("blocks", "weights", "types", "MFLOP/token", "KV/token", *config_columns(plan))
    body = [
        (row.name, row.weights, " ".join(row.blocks[0].weight_bytes), f"{row.blocks[0].flops_per_token / 1e6:.2f}",
         size(row.blocks[0].kv_bytes_per_token), *row.configs)
        for row in rows(graph, plan, each=each)
    ]  # fmt: skip
    return table([head, *body])


def _sources(study: Study) -> str:
    entries = Counter((entry.config, entry.provenance) for entry in study.prediction.entries)
    body = []
    for model in study.profile.devices:
        config = str(model.device)
        counted = ", ".join(f"{n} {p}" for (c, p), n in entries.items() if c == config) or "not used"
        body.append((config, counted, model.provenance, model.source))
    base = study.profile.base_w
    body.append(("base", "" if base is None else f"{base:g} W", study.profile.base_provenance, study.profile.source))
    return table([("configuration", "entries of the plan", "its rates", "source"), *body])
