"""`edgert eval`: how well a model predicts a text, and what it loses against a reference."""

from __future__ import annotations

import argparse
import math
import sys
from typing import TYPE_CHECKING

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from edgert.cli.options import Subparsers, add_objective, add_placement, console, placement, positive, print_json, share
from edgert.errors import UsageError
from edgert.evaluation import MAX_INCREASE, MAX_KL, Evaluation
from edgert.scorers import exact_plan
from edgert.subjects import Subject, evaluate

if TYPE_CHECKING:
    from rich.console import Console

EPILOG = """\
MODEL and the reference are each one of
  a bundle                     on the plan that is asked for; as the reference on CPU@f32
  an OpenVINO IR folder        as optimum-intel and OpenVINO GenAI write it, on the CPU in f32
  a Hugging Face folder        in transformers, on the CPU in f32

examples
  edgert eval demo.edge --text prose.txt
  edgert eval demo.edge --text texts/ --reference ./demo --max-increase 1%
  edgert eval demo.edge --text prose.txt --gate --device GPU      the same bundle on CPU@f32 is the reference
  edgert eval ./demo-optimum-int4 --text prose.txt --reference ./demo --json

A limit that is not kept makes the exit code 3. docs/quality.md says how it is measured.
"""


def add_parser(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser("eval", help="measure what a model, or a placement, loses", epilog=EPILOG)
    parser.add_argument("model", metavar="MODEL", help="see below")
    parser.add_argument("--text", required=True, metavar="FILE", help="UTF-8 text, or a folder of *.txt")
    against = parser.add_mutually_exclusive_group()
    against.add_argument("--reference", metavar="MODEL", help="what to compare with; it must take the same tokens")
    against.add_argument(
        "--gate", action="store_true",
        help=f"compare with the same bundle on CPU@f32, and refuse a plan that drifts: by default more than "
        f"{MAX_INCREASE:.1%} of perplexity or {MAX_KL} nats of KL divergence".replace("%", "%%"),
    )  # fmt: skip
    add_objective(add_placement(parser))
    parser.add_argument("--window", type=int, metavar="N", help="tokens read at once (default: 1024, or the context)")
    parser.add_argument("--stride", type=int, metavar="N", help="from window to window (default: half a window)")
    parser.add_argument("--tokens", type=int, metavar="N", help="read only the first N tokens of the text")
    parser.add_argument(
        "--max-increase", type=share, metavar="X%", help="of perplexity over the reference's, e.g. 1%% or 0.01"
    )
    parser.add_argument("--max-kl", type=positive, metavar="NATS", help="mean KL divergence of a token, e.g. 0.005")
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    max_increase, max_kl = options.max_increase, options.max_kl
    if not options.gate and options.reference is None and (max_increase is not None or max_kl is not None):
        raise UsageError("--max-increase and --max-kl are limits on what is lost: they need --reference or --gate")
    subject = Subject.open(options.model)
    plan = subject.plan(**placement(options))
    reference = options.reference
    if options.gate:
        if subject.bundle is None:
            raise UsageError(f"--gate: {subject.path} is no bundle; only a bundle is placed on devices")
        exact_plan(subject.bundle)  # raises where there is none
        reference = options.model
        max_increase = MAX_INCREASE if max_increase is None else max_increase
        max_kl = MAX_KL if max_kl is None else max_kl
    for warning in plan.warnings if plan is not None else ():
        print(f"edgert: warning: {warning}", file=sys.stderr)
    columns = (
        TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
    )  # fmt: skip
    screen = console(stderr=True)
    with Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal) as bars:
        task = bars.add_task("load", total=None)

        def progress(done: int, total: int) -> None:
            bars.update(task, description="windows", completed=done, total=total)

        found = evaluate(
            options.model,
            options.text,
            reference=reference,
            plan=plan,
            window=options.window,
            stride=options.stride,
            tokens=options.tokens,
            progress=progress,
        )
    if options.json:
        print_json(found.to_json())
    else:
        _print(console(), found)
    found.check(max_increase=max_increase, max_kl=max_kl)
    return 0


def _print(out: Console, found: Evaluation) -> None:
    table = Table("", Column("value", justify="right"))
    table.add_row("perplexity", f"{found.perplexity:.4f}")
    table.add_row("bits per byte", f"{found.bits_per_byte:.4f}")
    if found.increase is not None:
        table.add_row("perplexity of the reference", f"{found.reference_perplexity:.4f}")
        error = found.standard_error or 0.0
        spread = f"± {error:.3%}" if math.isfinite(error) else "(one window: no standard error)"
        table.add_row("increase", f"{found.increase:+.3%} {spread}")
        table.add_row("KL divergence, nats a token", f"{found.kl:.6f}")
        table.add_row("top-1 agreement", f"{found.agreement:.2%}")
    if (divergence := found.divergence) is not None:
        texts = _count(len(divergence.points), "text")
        table.add_row(
            f"greedy divergence after, of {divergence.tokens} tokens",
            f"{divergence.median:g} (median of {texts}), {divergence.minimum} (least)",
        )
    out.print(found.model + (f", against {found.reference}" if found.reference else ""), soft_wrap=True)
    out.print(table)
    protocol = found.protocol
    windows = f"{_count(protocol.windows, 'window')} of up to {protocol.window} tokens, stride {protocol.stride}"
    begin = "" if protocol.bos is None else f", each begins with token {protocol.bos}"
    out.print(
        f"{found.tokens} tokens ({found.bytes} bytes) of {protocol.text} in {windows}{begin}; "
        f"text sha256 {protocol.sha256[:12]}",
        soft_wrap=True,
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"
