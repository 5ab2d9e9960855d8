"""`edgert run`: text from a prompt, or a chat, with pictures and sound where the model takes them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from edgert.cli.options import Subparsers, add_objective, add_placement, console, placement, print_json
from edgert.errors import EmptyPromptError, UsageError
from edgert.results import Piece
from edgert.sampling import Sampling
from edgert.session import Model, load

Messages = list[dict[str, Any]]

EPILOG = """\
examples
  edgert run demo.edge "It was a dark night"
  edgert run demo.edge "It was" --temperature 0.8 --top-p 0.95 --seed 7 --max-tokens 100
  edgert run demo.edge --chat "Good evening"       one answer in the model's chat template
  edgert run demo.edge                             a conversation; an empty line or Ctrl-D ends it
  edgert run gemma.edge --image cat.png "What is this?"
  echo "It was" | edgert run demo.edge --json
"""


def add_parser(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser("run", help="generate text, or chat", epilog=EPILOG)
    parser.add_argument("bundle", metavar="BUNDLE")
    parser.add_argument("prompt", nargs="?", help="the text to continue (default: a conversation, or standard input)")
    parser.add_argument("--chat", action="store_true", help="treat the prompt as a user's message")
    parser.add_argument("--system", help="a system message for the conversation")
    parser.add_argument(
        "--image", action="append", default=[], metavar="FILE", help="a picture for the first message; repeatable"
    )
    parser.add_argument(
        "--audio", action="append", default=[], metavar="FILE", help="a WAV file for the first message; repeatable"
    )
    add_objective(add_placement(parser))
    group = parser.add_argument_group("sampling")
    group.add_argument("--max-tokens", type=int, help="default: 256 or what is left of the context")
    group.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    group.add_argument("--top-k", type=int, default=0, help="0 is off (default)")
    group.add_argument("--top-p", type=float, default=1.0, help="1 is off (default)")
    group.add_argument("--min-p", type=float, default=0.0, help="0 is off (default)")
    group.add_argument("--repetition-penalty", type=float, default=1.0, help="1 is off (default)")
    group.add_argument("--seed", type=int, help="the same text every time")
    group.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable")
    parser.add_argument("--verify", action="store_true", help="compare the bundle's files with their hashes first")
    parser.add_argument("--json", action="store_true", help="one JSON object with text, tokens and timings")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    prompt = _piped() if options.prompt is None else str(options.prompt)
    if prompt is None and options.json:
        raise UsageError("--json: a conversation is no JSON object; give a prompt")
    parts = _parts(options)
    chat = options.chat or bool(parts)
    if prompt is not None and options.system is not None and not chat:
        raise UsageError("--system: a prompt that is continued has no system message; add --chat")
    model = load(options.bundle, **placement(options), verify=options.verify)
    for warning in model.plan.warnings:
        print(f"edgert: warning: {warning}", file=sys.stderr)
    sampling: Sampling = {
        "temperature": options.temperature,
        "top_k": options.top_k,
        "top_p": options.top_p,
        "min_p": options.min_p,
        "repetition_penalty": options.repetition_penalty,
        "seed": options.seed,
        "stop": options.stop,
    }
    if options.max_tokens is not None:
        sampling["max_tokens"] = options.max_tokens
    opening: Messages = [{"role": "system", "content": options.system}] if options.system is not None else []
    if prompt is None:
        return _converse(model, opening, parts, sampling)
    if chat:
        pieces = model.stream_chat([*opening, _message(parts, prompt)], **sampling)
    else:
        pieces = model.stream(prompt, **sampling)
    if options.json:
        print_json(_as_json(model, pieces))
        return 0
    _show(pieces)
    return 0


def _parts(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Pictures and sound of the command line, as parts of a message."""
    images = [{"type": "image", "image": name} for name in options.image]
    return images + [{"type": "audio", "audio": name} for name in options.audio]


def _message(parts: list[dict[str, Any]], text: str) -> dict[str, Any]:
    """What a user says; without parts just the text, which every chat template takes."""
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}] if parts else text}


def _piped() -> str | None:
    """The prompt on standard input; None where that is a terminal."""
    if sys.stdin is None:
        raise EmptyPromptError("prompt: none is given and standard input is closed")
    if sys.stdin.isatty():
        return None
    try:
        prompt = sys.stdin.read().rstrip("\n")
    except UnicodeDecodeError as error:
        raise UsageError(f"prompt: standard input is not {sys.stdin.encoding} text: {error}") from error
    if not prompt:
        raise EmptyPromptError("prompt: standard input is empty")
    return prompt


def _show(pieces: Iterator[Piece]) -> str:
    text, last = "", None
    for piece in pieces:
        print(piece.text, end="", flush=True)
        text, last = text + piece.text, piece
        for event in piece.events:
            print(f"\nedgert: {event.kind} at token {event.tokens}: {event.detail}", file=sys.stderr)
    print()
    if last is not None:
        t = last.timings
        speed = f"{t.tokens_per_second:.1f} tokens/s" if t.tokens_per_second else "no speed to report"
        if t.provenance == "emulated":
            speed = "emulated device: no speed"
        note = (
            f"{t.prompt_tokens} prompt tokens ({t.reused_tokens} from cache), {t.new_tokens} new, "
            f"first after {t.ttft_us / 1000:.0f} ms, then {speed}; {last.finish_reason}"
        )
        console(stderr=True).print(note, style="dim")
    return text


def _as_json(model: Model, pieces: Iterator[Piece]) -> dict[str, Any]:
    collected = list(pieces)
    last = collected[-1]
    return {
        "text": "".join(p.text for p in collected),
        "tokens": [p.token for p in collected if p.token is not None],
        "finish_reason": last.finish_reason,
        "timings": last.timings.to_json(),
        "events": [asdict(event) for p in collected for event in p.events],
        "plan": model.plan.to_json(),
    }


def _converse(model: Model, opening: Messages, parts: list[dict[str, Any]], sampling: Sampling) -> int:
    messages = list(opening)
    while True:
        try:
            said = input("> ")
        except EOFError:
            print()
            return 0
        if not said.strip():
            return 0
        messages.append(_message(parts if len(messages) == len(opening) else [], said))
        try:
            answer = _show(model.stream_chat(messages, **sampling))
        except KeyboardInterrupt:  # ends the answer, not the conversation
            print()
            messages.pop()
            continue
        messages.append({"role": "assistant", "content": answer})
