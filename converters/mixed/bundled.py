"""The search for a mix of precisions as a step on the way to a bundle."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import openvino as ov
from edgert.converters.mixed.mixing import MixedOptions, Mixing

from edgert.bundle import Draft, ModelFacts
from edgert.cost import Workload
from edgert.device import DeviceKind
from edgert.errors import QualityError
from edgert.placement import HOST, Plan
from edgert.quality_page import QUALITY, QUALITY_PAGE, quality_html


class BundledMix:
    """A mix of precisions for one bundle.

    Args:
        after: where what was measured is removed once the bundle is there; on an error it stays, to go on from.
        out: the bundle to be.
        kernels: whether it will hold weights for the CPU kernels.
        force: write the bundle even if the budget is not kept.

    Attributes:
        record: the content of quality.json; empty before `compress`.
    """

    def __init__(self, after: ExitStack, out: Path, options: MixedOptions, *, kernels: bool, force: bool) -> None:
        self._after, self._options, self._kernels, self._force = after, options, kernels, force
        self._folder = out.with_name(f".{out.name}.search")
        self.record: dict[str, Any] = {}

    def compress(
        self,
        path: Path,
        draft: Draft,
        facts: ModelFacts,
        stage: Callable[[str], None],
        advance: Callable[[float], None],
    ) -> ov.Model:
        """An f16 model with its mix; the draft gets its quality.json and quality.html.

        Args:
            path: as `Mixing` takes it.

        Raises:
            QualityError: the budget is not kept, and `force` is not set.
            Others as `Mixing`.
        """
        options = self._options
        if options.target is not None:
            options = replace(options, target=replace(options.target, load=Workload.fitting(facts.context_length)))
        tokenizer = draft.path / "tokenizer"
        mixing = Mixing(
            path, self._folder, tokenizer, facts, options, kernels=self._kernels, stage=stage, advance=advance
        )
        self._after.push(lambda kind, error, trace: mixing.close() if kind else mixing.remove())
        mixed = mixing.run()
        self.record = {"model": facts.name, **mixed.record}
        if not self.record["met"] and not self._force:
            used = [row["config"] for row in self.record["configs"] if row["used"]]
            raise QualityError(
                f"max_ppl_increase is {options.max_increase:.4%}: with the best mix that was found it is, with 95 % "
                f"confidence, at most {mixed.worst:.4%} on {' and '.join(used) or HOST}; force writes that "
                f"bundle, and what was measured is kept in {self._folder}",
                value=mixed.worst,
                limit=options.max_increase,
            )
        (draft.path / QUALITY).write_text(json.dumps(self.record, indent=1) + "\n", "utf-8")
        (draft.path / QUALITY_PAGE).write_text(quality_html(self.record), "utf-8")
        return mixed.model

    @property
    def summary(self) -> dict[str, Any]:
        """What the manifest says of it: of the configurations that have to keep the budget the worst."""
        record = self.record
        used = [row for row in record["configs"] if row["used"]]
        worst = max(used, key=lambda row: row["bound"], default={"config": str(HOST), **record["result"]})
        return {
            **{name: worst[name] for name in ("config", "increase", "standard_error", "bound", "perplexity")},
            "budget": record["budget"],
            "met": record["met"],
            "reference": record["reference"]["perplexity"],
            "text": record["protocol"]["text"],
            "sha256": record["protocol"]["sha256"],
            "tokens": record["protocol"]["verify_tokens"],
        }

    @property
    def on_npu(self) -> list[tuple[int, int]]:
        """First and last blocks of the submodels that the target's plan has on an NPU."""
        plan = Plan.from_json(self.record["target"]["plan"])
        placements = {p for placements in plan.phases.values() for p in placements}
        return sorted((p.first, p.last) for p in placements if p.config.kind is DeviceKind.NPU)
