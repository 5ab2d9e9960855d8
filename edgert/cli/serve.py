"""`edgert serve`: models for other programs, as OpenAI's API.

Nothing here may load what the small server process does without: numpy, OpenVINO, rich.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from edgert.errors import MissingDependencyError, UsageError
from edgert.service.settings import RULES, Settings, flag, read, to_toml

EPILOG = """\
examples
  edgert serve demo.edge                     on the user's Unix socket
  edgert serve demo.edge --port 11535        on http://127.0.0.1:11535 too; the key is in the user's token file
  edgert serve small=a.edge b.edge --memory 8GiB --keep-alive 1h
  edgert serve --folders ~/models            load what is asked for, when it is asked for

Each setting can also stand in serve.toml (--config) or the environment (EDGERT_SERVE_NAME); a flag wins over the
environment, that over the file. --print-config shows what comes out, and where each value comes from.
"""
_SWITCHES = ("preload", "park", "low_priority", "sandbox", "verify", "log_prompts")
_REPEATED = ("folders", "origins", "declared_watts")
# What `--help` says of each setting: its value, and what it means; docs/service.md says more.
GROUPS: dict[str, dict[str, tuple[str, str]]] = {
    "models": {
        "device": ("DEVICE", "device configuration of models that name none, such as CPU@f32; else edgert chooses"),
        "objective": ("WHAT", "instead: the best measured plan for tokens_per_joule, latency or throughput"),
        "preload": ("", "load the bundles given here at once (the default), or when they are first asked for"),
        "folders": ("FOLDER", "every NAME.edge in it can be asked for as NAME; may be given again"),
        "verify": ("", "compare a bundle with its hashes when it is loaded (default: yes)"),
    },
    "who may ask, and where": {
        "socket": ("PATH", "Unix socket, mode 0600 (default: edgert/edgert.sock in your session's folder), or none"),
        "host": ("ADDRESS", "where TCP listens (default: 127.0.0.1); others than loopback need --key-file"),
        "port": ("PORT", "listen on TCP too, 0 for a free port (default: none; on Windows 11535)"),
        "key_file": ("FILE", "holds the key of TCP clients (default: your token file, which is made)"),
        "origins": ("ORIGIN", "web page that may ask, such as http://localhost:5173; may be given again"),
    },
    "limits": {
        "memory_bytes": ("SIZE", "of all models together, such as 8GiB or 50%% (default: 60%%)"),
        "kv_bytes": ("SIZE", "of one model's KV caches (default: 1GiB)"),
        "max_sequences": ("N", "requests of one model that run at once (default: 16)"),
        "queue": ("N", "requests of one model that may wait; more get 429 (default: 64)"),
        "max_tokens": ("N", "of an answer whose request does not say (default: 4096)"),
        "body_bytes": ("SIZE", "of one request (default: 16MiB)"),
        "prefill_chunk": ("TOKENS", "of a prompt in one step, at most (default: 512)"),
        "preempt_ms": ("TIME", "how long a background step may delay an interactive request (default: 100ms)"),
        "threads": ("N", "of the CPU; 0 is OpenVINO's choice (default: 0)"),
        "device_timeout_s": ("TIME", "a call into a GPU or NPU that takes longer counts as hung (default: 60s)"),
        "step_timeout_s": ("TIME", "a worker that says nothing for so long counts as hung (default: 60s)"),
    },
    "power": {
        "power": ("POLICY", "saver, balanced, performance, or auto: by power source, battery, heat and user (default)"),
        "max_watts": ("WATTS", "mean power stays below (default: none)"),
        "joules_per_hour": ("JOULES", "a budget; when it is spent background requests wait (default: none)"),
        "dwell_s": ("TIME", "for how long a change must hold before plans follow it (default: 30s)"),
        "declared_watts": ("UNIT=WATTS", "what devices draw where nothing can be read, such as CPU=15,base=4"),
        "low_priority": ("", "background work in the system's low scheduling class (default: yes)"),
    },
    "idle": {
        "keep_alive_s": ("TIME", "a model stays loaded after its last request, such as 30m, forever (default: 5m)"),
        "drop_after_s": ("TIME", "idle KV caches are given back (default: 60s)"),
        "park": ("", "keep them in files of edgert's cache folder then (default: no)"),
        "exit_after_s": ("TIME", "started by a socket: end when nothing has been loaded for so long (default: none)"),
        "grace_s": ("TIME", "when it ends: how long running requests may go on (default: 30s)"),
    },
    "safety and logs": {
        "sandbox": ("", "of the workers (default: yes)"),
        "log": ("FORM", "text, or json: a line an event on standard error (default: text)"),
        "log_prompts": ("", "write down what people ask and get (default: no)"),
    },
}  # fmt: skip


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "serve",
        help="serve models to other programs, as OpenAI's API",
        usage="edgert serve [BUNDLE ...] [settings]",
        epilog=EPILOG,
    )
    add_settings(parser)
    parser.add_argument("--print-config", action="store_true", help="print the settings as TOML, and where from; end")
    parser.set_defaults(run=run)


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Every setting as a flag, without its unit, and the bundles. What is not given stays out of the options."""
    parser.add_argument(
        "models", nargs="*", metavar="BUNDLE", help="bundles, loaded at once; NAME=PATH gives one another name"
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="settings (default: serve.toml in your settings)")
    for title, meanings in GROUPS.items():
        group = parser.add_argument_group(title)
        for name, (value, meaning) in meanings.items():
            names = dict.fromkeys((flag(name), f"--{name.replace('_', '-')}"))  # with its unit too, as in the file
            for number, each in enumerate(names):
                shown = argparse.SUPPRESS if number else meaning
                if name in _SWITCHES:
                    group.add_argument(
                        each,
                        dest=name,
                        action=argparse.BooleanOptionalAction,
                        default=argparse.SUPPRESS,
                        help=shown,
                    )
                else:
                    group.add_argument(
                        each,
                        dest=name,
                        action="append" if name in _REPEATED else "store",
                        default=argparse.SUPPRESS,
                        metavar=value,
                        help=shown,
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
    if not settings.models and not settings.folders:
        raise UsageError("nothing to serve: give a bundle (`edgert serve demo.edge`), or --folders with some inside")
    try:
        from edgert.service.daemon.serve import run as serve
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("edgert"):
            raise
        raise MissingDependencyError(f"{error.name} is not installed; pip install 'edgert[serve]'") from error
    return serve(settings)
