"""The same weights in the format of each runtime. Run by `peers.py` in the runtimes' own environment.

    python models.py SOURCE BUNDLE FOLDER

SOURCE is a folder in transformers' form, BUNDLE what edgert compiled of it. Into FOLDER go `genai/` (OpenVINO, the
bundle's own model), `model.gguf`, `ort/` and `bf16/`; what is there and not older than its source is left.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

GROUP = 128  # weights with one scale, as in the bundle


def genai(source: Path, bundle: Path, target: Path) -> None:
    """The bundle's model under the names that OpenVINO GenAI looks for."""
    import openvino as ov
    from openvino_tokenizers import convert_tokenizer
    from transformers import AutoTokenizer

    target.mkdir()
    for suffix in (".xml", ".bin"):
        try:
            os.link(bundle / f"model{suffix}", target / f"openvino_model{suffix}")
        except OSError:  # another file system, or one without links
            shutil.copyfile(bundle / f"model{suffix}", target / f"openvino_model{suffix}")
    for name in ("config.json", "generation_config.json"):
        shutil.copyfile(source / name, target / name)
    # Only token ids are passed, but the pipeline wants a tokenizer.
    for name, model in zip(
        ("tokenizer", "detokenizer"),
        convert_tokenizer(AutoTokenizer.from_pretrained(source), with_detokenizer=True),
        strict=True,
    ):
        ov.save_model(model, target / f"openvino_{name}.xml")


def gguf(source: Path, bundle: Path, target: Path) -> None:
    """Q4_0, groups of 32; embedding and head, which are one tensor, Q8_0; norms f32."""
    from gguf_writer import write

    write(source, target, int4=True)


def ort(source: Path, bundle: Path, target: Path) -> None:
    """INT4 asymmetric; embedding and head, which are one tensor, INT8 in groups too; by onnxruntime-genai's builder."""
    options = {
        "block_size": GROUP, "is_symmetric": "false", "algo_config": "rtn",
        "matmul_mixed_precision": "last_matmul:int8", "accuracy_level": 4, "prune_lm_head": "true", "hf_token": "false",
    }  # fmt: skip
    log = target.parent / "ort.log"  # it says a line a tensor
    with tempfile.TemporaryDirectory(dir=target.parent) as cache, log.open("w") as lines:
        command = [
            sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(source), "-o", str(target), "-p",
            "int4", "-e", "cpu", "-c", cache, "--extra_options", *(f"{k}={v}" for k, v in options.items()),
        ]  # fmt: skip
        if subprocess.run(command, stdout=lines, stderr=subprocess.STDOUT).returncode:
            raise RuntimeError(f"onnxruntime-genai's builder failed; see {log}")


def bf16(source: Path, bundle: Path, target: Path) -> None:
    """As transformers maps it into memory: without a conversion at load."""
    import torch
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(target)


FORMS: dict[str, Callable[[Path, Path, Path], None]] = {
    "genai": genai, "model.gguf": gguf, "ort": ort, "bf16": bf16,
}  # fmt: skip


def make(source: Path, bundle: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, form in FORMS.items():
        target, partial = folder / name, folder / f"partial-{name}"
        origin = bundle / "manifest.json" if form is genai else source / "config.json"
        if target.exists() and target.stat().st_mtime >= origin.stat().st_mtime:
            continue
        for path in (target, partial):
            if path.is_dir():
                shutil.rmtree(path)
            path.unlink(missing_ok=True)
        print(f"{folder.name}: {name}", file=sys.stderr)
        form(source, bundle, partial)
        partial.rename(target)


if __name__ == "__main__":
    make(*map(Path, sys.argv[1:]))
