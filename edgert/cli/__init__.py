"""The command line: one module a verb, each with `add_parser` and `run`."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from edgert import __version__
from edgert.errors import EdgertError, QualityError

VERBS = (
    "devices", "compile", "inspect", "profile", "plan", "run", "bench", "eval", "fit", "doctor",
    "serve", "service", "ps", "load", "unload", "stop", "status",
)  # fmt: skip

DESCRIPTION = """\
Run language models on small Intel machines.

  edgert compile SRC -o OUT.edge    a model (Hugging Face folder, ONNX, OpenVINO IR, GGUF) becomes a bundle
  edgert plan OUT.edge              which block of the model runs where
  edgert run OUT.edge "Once"        text
  edgert serve OUT.edge             the same for other programs, as OpenAI's API
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the `edgert` command.

    Returns:
        0 on success; 2 for a wrong argument or any `EdgertError`, told in one line, but 3 for a `QualityError`; 130
        after Ctrl-C. Verbs may return other codes of their own.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = argparse.Namespace(debug=False)
    try:
        _show_everything()
        _parse(arguments, options)
        return int(options.run(options))
    except EdgertError as error:
        if options.debug:
            raise
        print(f"edgert: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 3 if isinstance(error, QualityError) else 2
    except KeyboardInterrupt:
        if options.debug:
            raise
        print("edgert: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `edgert … | head` is no error; keep the interpreter from flushing into the closed pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _show_everything() -> None:
    """Escape what the output's encoding lacks, e.g. Chinese in the cp1252 of a pipe on Windows, rather than fail."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _parse(arguments: list[str], options: argparse.Namespace) -> None:
    """Read the arguments into `options`. The module of a verb is imported where no other verb is meant."""
    parser = argparse.ArgumentParser(
        "edgert", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"edgert {__version__}")
    subparsers = parser.add_subparsers(title="verbs", metavar="VERB", required=True, parser_class=VerbParser)
    for verb in [v for v in VERBS if v in arguments[:1]] or VERBS:
        import_module(f"edgert.cli.{verb}").add_parser(subparsers)
    rest = parser.parse_known_args(arguments, options)[1]
    # argparse ends positionals at the first option, so of `run BUNDLE --chat PROMPT` it leaves the prompt over.
    if len(rest) == 1 and not rest[0].startswith("-") and getattr(options, "prompt", "") is None:
        options.prompt = rest.pop()
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")


class VerbParser(argparse.ArgumentParser):
    """A verb's parser: it keeps the layout of its texts, and knows `--debug`."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"formatter_class": argparse.RawDescriptionHelpFormatter, **options})
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")
