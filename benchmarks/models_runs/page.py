"""docs/models.md out of docs/models_measured.json and the table of families."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

HEAD = """\
# Families of models

What edgert was tried with, family by family: tiny models with random weights that have every part of the family
(windows shorter than the prompt, experts, each kind of layer), through the whole of edgert. Nothing here is a speed,
and nothing says how well a model writes. `make models` makes this page, out of
[models_measured.json](models_measured.json).

* **route**: `general` is torch.export with explicit caches and states; `optimum` where optimum-intel's export passes
  the same gate too.
* **blocks**: what the partition finds; each can have its own device.
* **parity**: largest difference of the logits from those of transformers in f32, relative to the largest logit: a
  prompt of 24 tokens, three times the window, at once and in pieces, then 64 single tokens. At most 1e-3.
* **INT8, INT4**: `edgert compile` with its gate, saved, opened and run twice with the same outcome; the number is the
  correlation of its logits with those in f32, low for INT4 as the weights are random.
* **cuts**: largest difference of the model that is cut at every boundary from the uncut one. At most 1e-5.
* **placements**: how many plans gave the logits of the uncut model, to 1e-3: each block a submodel; every other block
  with static shapes (of encoders: two pieces); experts with static shapes, the rest without; a GPU where there is one.
* **shape**: whether weights, caches and operations that `edgert fit` and `edgert plan` take from the configuration
  alone are those of the compiled model, at FP16, INT8 and INT4: every compressed byte, every byte of caches and
  states, every operation; of f32 vectors all but the numbers in a norm's formula.
* **NPU**: `recipe` is edgert's own list of what the NPU's compiler refuses; `compiled` is Intel's compiler for
  platform 4000, every block but the embedding.
"""
ADDING = """\
## A new family

Where transformers has it and its layers are made of what the families above are made of, a family needs nothing to be
compiled and run: the exporter, the gate, the partition and the executor go by what a model's graph contains, not by
its name. A line in `TABLE` of `tests/tiny_models.py` puts it into this table:

    "exaone4": Family("Exaone4", "EXAONE 4", _HALF_SLIDING),

and a line in `edgert/architecture/families.py` tells `edgert fit` and `edgert plan` what of its shape is not Llama's
(an unknown family is taken for one like Llama, and the output says so):

    "exaone4": Family(qk_norm="head", every=(4, "sliding_attention")),

exaone4, olmo3, minimax_m2 and ernie4_5_moe are in the table to show that: no other line of edgert is for one of them.
(falcon_h1, attention beside Mamba in one layer, needed a patch of its code in transformers.) Then
`make models ARGS="exaone4"`.
"""
KNOWN = """\
Found on the way, beside what the table shows:

* **longrope** (phi4_mini): transformers takes the long factors where a call reaches beyond the original context (4096
  tokens of Phi-4-mini), and so does the export. A prompt that is longer, in chunks, has keys with short factors in its
  cache then, in transformers as in edgert; set `prefill_chunk` to the length of such prompts.
* Routers stay at f16 in OpenVINO bundles; an ONNX bundle's are compressed as all else.

What failed, with the error:
"""
MEDIA = """\
## With images and sound

Whole models of `tests/tiny_multimodal.py`, compiled with their towers. **checks**: the largest relative error of tower,
prompt with an image or sound, and cuts against transformers and the uncut model. **parameters**: those that
`edgert fit` finds in the configuration, towers included, beside the model's.
"""
DIFFUSION = """\
## Diffusion transformers

Those of `tests/tiny_diffusion.py`, at FP16, INT8 and INT4. **parity**: the export in f32 against diffusers, at two
sizes of the picture. **placements**: two pieces on CPU@f32 against one. All are relative errors.
[diffusion.md](diffusion.md) has more.
"""
_DASH = "–"
_GATE = "cut at every boundary"


def page(measured: Mapping[str, Any], table: Mapping[str, Any]) -> str:
    """The page. `table` is that of tests/tiny_models.py, in whose order the rows stand."""
    families = {name: row for name, row in measured.get("families", {}).items() if name in table}
    lines = [HEAD, _versions(families), ""]
    lines += ["| family | models | route | blocks | parity | INT8, INT4 | cuts | placements | shape | NPU | missing |"]
    lines += ["|" + "---|" * 11]
    for name in table:
        if name in families:
            lines.append("| " + " | ".join([name, table[name].models, *_cells(families[name]["steps"])]) + " |")
    media = measured.get("media", {})
    if media:
        lines += ["", MEDIA, "| family | towers | checks | parameters | missing |", "|---|---|---|---|---|"]
        lines += [
            "| " + " | ".join([name, *_media_cells(row["steps"].get("media", {}))]) + " |"
            for name, row in media.items()
        ]
    diffusion = measured.get("diffusion", {})
    if diffusion:
        lines += [
            "",
            DIFFUSION,
            "| family | weights | blocks | parity | cuts | placements | missing |",
            "|" + "---|" * 7,
        ]
        lines += [
            "| " + " | ".join([name, weights, *_diffusion_cells(cells)]) + " |"
            for name, row in diffusion.items()
            for weights, cells in row["steps"].get("diffusion", {}).get("rows", {}).items()
        ]
    lines += ["", ADDING, "## Out of reach, or not yet", ""]
    rows = [*families.items(), *media.items(), *diffusion.items()]
    missing = [f"* **{name}**, {text}" for name, row in rows for text in _missing(row["steps"])]
    lines += [KNOWN, *(missing or ["Nothing of what was tried."])]
    return "\n".join(lines) + "\n"


def _versions(families: Mapping[str, Any]) -> str:
    """With what it was checked, and when."""
    dates = sorted({row["checked"] for row in families.values()})
    if not dates:
        return "Nothing has been checked yet."
    packages = ("transformers", "openvino")
    names = [f"{p} {', '.join(sorted({row[p] for row in families.values()}))}" for p in packages]
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return f"{len(families)} families, checked {when} with {' and '.join(names)}. Provenance: checked."


def _cells(steps: Mapping[str, Any]) -> list[str]:
    export = steps.get("export", {})
    routes = [name for name, step in (("general", "export"), ("optimum", "optimum")) if _passed(steps, step)]
    blocks = ", ".join(f"{count} {kind}" if count > 1 else kind for kind, count in export.get("blocks", {}).items())
    if export.get("reason"):
        blocks = "whole"
    parity = steps.get("parity", {})
    error = max((parity[key] for key in ("relative_error", "in_pieces") if key in parity), default=None)
    compressed = ", ".join(_compressed(steps, weights) for weights in ("int8", "int4"))
    return [
        ", ".join(routes) or _DASH, blocks or _DASH, _number(error, parity), compressed, _cuts(steps),
        _placements(steps.get("placements")), _said(steps, "fit", "exact"), _npu(steps), _short(steps),
    ]  # fmt: skip


def _passed(steps: Mapping[str, Any], name: str) -> bool:
    return name in steps and "error" not in steps[name]


def _said(steps: Mapping[str, Any], name: str, word: str) -> str:
    return _DASH if name not in steps else word if _passed(steps, name) else "no"


def _number(error: float | None, step: Mapping[str, Any]) -> str:
    if error is None:
        return "no" if "error" in step else _DASH
    return f"{error:.0e}" + (", no" if "error" in step else "")


def _compressed(steps: Mapping[str, Any], weights: str) -> str:
    step = steps.get(weights, {})
    if not _passed(steps, weights):
        return "no" if step else _DASH
    return f"{step['correlation']:.3f}" if "correlation" in step else "runs"


def _cuts(steps: Mapping[str, Any]) -> str:
    """The largest of those of the three precisions."""
    found = [steps.get(name, {}).get("checks", {}).get(_GATE) for name in ("fp16", "int8", "int4")]
    known = [value for value in found if value is not None]
    return f"{max(known):.0e}" if known else _DASH


def _placements(step: Mapping[str, Any] | None) -> str:
    if not step:
        return _DASH
    plans = step.get("plans", {})
    return f"{sum(isinstance(value, float) for value in plans.values())} of {len(plans)}" if plans else "no"


def _npu(steps: Mapping[str, Any]) -> str:
    words = [word for step, word in (("npu_recipe", "recipe"), ("npu_compile", "compiled")) if _passed(steps, step)]
    return ", ".join(words) or ("no" if {"npu_recipe", "npu_compile"} & steps.keys() else _DASH)


def _short(steps: Mapping[str, Any]) -> str:
    """The names of what failed; optimum-intel's route is an addition and not missed."""
    failed = [name for name, step in steps.items() if "error" in step and name != "optimum"]
    return ", ".join(failed).replace("_", " ") or "nothing"


def _missing(steps: Mapping[str, Any]) -> list[str]:
    """What failed, with the error in one line."""
    return [
        f"{name.replace('_', ' ')}: `{_plain(step['error'])}`"
        for name, step in steps.items()
        if "error" in step and name != "optimum"
    ] + [f"{name}: not cut, {step['reason']}" for name, step in steps.items() if name == "media" and step.get("reason")]


def _media_cells(step: Mapping[str, Any]) -> list[str]:
    checks = [value for value in step.get("checks", {}).values() if value is not None]
    said = f"{len(checks)}, at most {max(checks):.0e}" if checks else "no" if "error" in step else _DASH
    missing = "media" if "error" in step else "cuts" if step.get("reason") else "nothing"
    return [", ".join(step.get("towers", [])) or _DASH, said, step.get("parameters", _DASH), missing]


def _diffusion_cells(row: Mapping[str, Any]) -> list[str]:
    blocks = ", ".join(f"{count} {kind}" if count > 1 else kind for kind, count in row.get("blocks", {}).items())
    errors = [row.get(name) for name in ("parity", "cut", "placements")]
    said = [f"{error:.0e}" if isinstance(error, float) else str(error or _DASH) for error in errors]
    return [blocks or _DASH, *said, "compile" if "error" in row else "nothing"]


def _plain(text: str) -> str:
    """As it can stand in backquotes, in a list."""
    text = text.replace("`", "'").replace("\n", " ")
    return text if len(text) <= 300 else f"{text[:297]}…"
