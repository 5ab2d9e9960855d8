"""`edgert serve`: models for other programs, as OpenAI's API.

Nothing here may load what the small server process does without: numpy, OpenVINO, rich.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from edgert.errors import MissingDependencyError, UsageError
from edgert.service.settings import RULES, Settings, read, to_toml

EPILOG = """\
examples
  edgert serve demo.edge                     on the user's Unix socket
  edgert serve demo.edge --port 11535        on http://127.0.0.1:11535 too; the key is in the user's token file
  edgert serve small=a.edge b.edge --memory 8GiB --keep-alive 1h
  edgert serve --folders ~/models            load what is asked for, when it is asked for

Each setting can also stand in serve.toml (--config) or the environment (EDGERT_SERVE_NAME); a flag wins over the
environment, that over the file. --print-config shows what comes out, and where each value comes from.
"""
_UNITS = ("_bytes", "_ms", "_s")
_SWITCHES = ("preload", "park", "low_priority", "sandbox", "verify", "log_prompts")
_REPEATED = ("folders", "origins", "declared_watts")


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("serve", help="serve models to other programs, as OpenAI's API", epilog=EPILOG)
    add_settings(parser)
    parser.add_argument("--print-config", action="store_true", help="print the settings as TOML, and where from; end")
    parser.set_defaults(run=run)


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Every setting as a flag, without its unit, and the bundles. What is not given stays out of the options."""
    parser.add_argument(
        "models", nargs="*", metavar="BUNDLE", help="bundles, loaded at once; NAME=PATH gives one another name"
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="settings (default: serve.toml in your settings)")
    group = parser.add_argument_group("settings (docs/service.md says more of each)")
    for name, rule in RULES.items():
        short = next((name.removesuffix(unit) for unit in _UNITS if name.endswith(unit)), name)
        flags = [f"--{each.replace('_', '-')}" for each in dict.fromkeys((short, name))]
        if name in _SWITCHES:
            group.add_argument(
                *flags, dest=name, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=rule.expects
            )
        else:
            group.add_argument(
                *flags,
                dest=name,
                action="append" if name in _REPEATED else "store",
                default=argparse.SUPPRESS,
                metavar=short.upper(),
                help=rule.expects.replace("%", "%%"),
            )


def settings_of(options: argparse.Namespace) -> tuple[Settings, Any]:
    """The settings that the flags, the environment and the file make, and where each comes from."""
    if options.config is not None and not str(options.config).strip():
        raise UsageError("--config: an empty path")
    flags = {name: getattr(options, name) for name in RULES if hasattr(options, name)}
    return read({**flags, "models": options.models}, os.environ, options.config)


def run(options: argparse.Namespace) -> int:
    settings, origins = settings_of(options)
    if options.print_config:
        print(to_toml(settings, origins), end="")
        return 0
    try:
        from edgert.service.daemon.serve import run as serve
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("edgert"):
            raise
        raise MissingDependencyError(f"{error.name} is not installed; pip install 'edgert[serve]'") from error
    return serve(settings)
