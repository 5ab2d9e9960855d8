"""Models judged by one ruler, whatever wrote them: a bundle, an OpenVINO IR folder, a Hugging Face folder."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from edgert import evaluation
from edgert.bundle import MANIFEST, Bundle
from edgert.choice import choose_plan
from edgert.device import DeviceConfig
from edgert.errors import MissingDependencyError, UsageError
from edgert.evaluation import Document, Evaluation, Progress, Scorer, read_documents
from edgert.placement import Plan
from edgert.scorers import bundle_scorer, exact_plan, folder_scorer
from edgert.text import Tokenizer

if TYPE_CHECKING:
    from edgert.scheduler import Objective

Name = str | os.PathLike[str]
DEFAULT_WINDOW = 1024
_PACKAGES = ("torch", "transformers", "safetensors")


@dataclass(frozen=True)
class Subject:
    """A model before it is loaded; `Subject.open` is the way to get one.

    Attributes:
        kind: what it is.
        path: its folder.
        tokenizer: its own.
        bundle: it, if that is what it is.
    """

    kind: Literal["bundle", "openvino", "huggingface"]
    path: Path
    tokenizer: Tokenizer
    bundle: Bundle | None = None

    @classmethod
    def open(cls, name: Name) -> Subject:
        """Find out what a folder holds.

        Raises:
            UsageError: nothing that can be evaluated as it is.
            BundleError, ConversionError: it is damaged, or has no tokenizer.
        """
        from edgert.converters import sources

        path = Path(name)
        if not path.is_dir():
            raise UsageError(
                f"model {path}: no such folder; expected a bundle, an OpenVINO IR or a Hugging Face folder"
            )
        if (path / MANIFEST).exists():
            bundle = Bundle.open(path)
            bundle.require_text()
            return cls("bundle", path, Tokenizer.open(bundle.tokenizer_path), bundle)
        kind = sources.detect(path).kind
        if kind in {"onnx", "gguf"}:
            raise UsageError(f"model {path}: holds {kind.upper()}; `edgert compile` makes a bundle of it, which can be")
        with tempfile.TemporaryDirectory() as scratch:  # files may be links, and some become a tokenizer.json only here
            sources.copy_tokenizer(path, Path(scratch) / "tokenizer")
            tokenizer = Tokenizer.open(Path(scratch) / "tokenizer")
        return cls("openvino" if kind == "openvino" else "huggingface", path, tokenizer)

    def plan(
        self,
        *,
        plan: Plan | Name | None = None,
        device: str | DeviceConfig | None = None,
        place: str | None = None,
        objective: Objective | None = None,
    ) -> Plan | None:
        """The plan that a bundle runs on, as `edgert.load` chooses it; None of others, which run on the CPU in f32.

        Raises:
            UsageError: more than one is given, or one for what is no bundle.
            PlanError, DeviceError: as `edgert.load`.
        """
        if self.bundle is not None:
            return choose_plan(self.bundle, plan=plan, device=device, place=place, objective=objective)
        if any(option is not None for option in (plan, device, place, objective)):
            raise UsageError(
                f"model {self.path}: only a bundle is placed on devices; this is computed in f32 on the CPU"
            )
        return None

    def exact(self) -> Plan | None:
        """The plan on which a model is a reference: all on `CPU@f32`; a bundle of onnxruntime's as it runs."""
        if self.bundle is None or self.bundle.graph is None:
            return self.plan()
        return exact_plan(self.bundle)

    def load(self, plan: Plan | None) -> Scorer:
        """Make it ready, on a plan of `plan` or `exact`.

        Raises:
            MissingDependencyError: a Hugging Face folder needs what is not installed.
            UsageError, ConversionError, PlanError, DeviceError: it does not run.
        """
        if self.bundle is not None:
            return bundle_scorer(self.bundle, plan or choose_plan(self.bundle))
        if self.kind == "openvino":
            return folder_scorer(self.path)
        try:
            from edgert.converters.torch_scorer import TorchScorer

            return TorchScorer(self.path)
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            if package not in _PACKAGES:
                raise
            raise MissingDependencyError(
                f"model {self.path}: a Hugging Face folder needs {package}: pip install edgert[compile]"
            ) from error


def evaluate(
    model: Name,
    text: Name,
    *,
    reference: Name | None = None,
    plan: Plan | Name | None = None,
    device: str | DeviceConfig | None = None,
    place: str | None = None,
    objective: Objective | None = None,
    window: int | None = None,
    stride: int | None = None,
    tokens: int | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """How well a model predicts a text, and what it loses against a reference; the protocol is in `docs/quality.md`.

    Args:
        model: a bundle, an OpenVINO IR folder (optimum-intel's, OpenVINO GenAI's), or a Hugging Face folder. Its
            tokenizer makes the tokens, and says whether windows begin with a bos.
        text: a UTF-8 file, or a folder of `*.txt`; lines of `<|endoftext|>` separate documents.
        reference: a model that takes the same tokens; a bundle runs on `CPU@f32`. So the bundle itself as the
            reference tells what a placement changes.
        plan, device, place, objective: where a bundle runs, as `edgert.load` has them.
        window: tokens that a model reads at once; by default 1024, or as many as both models take.
        stride: tokens from one window to the next; by default half a window.
        tokens: read only the first so many tokens of the text.
        progress: is told how many windows and prompts are done, of how many.

    Raises:
        UsageError: the text is missing, empty, too short or no UTF-8; the reference does not take the model's tokens;
            a number is out of its range.
        BundleError, ConversionError, PlanError, DeviceError, MissingDependencyError: a model cannot be run.
        DeviceNonsenseError: a model gave NaN or what is infinite.
    """
    documents = read_documents(os.fspath(text))
    subject = Subject.open(model)
    chosen = subject.plan(plan=plan, device=device, place=place, objective=objective)
    other = Subject.open(reference) if reference is not None else None
    if other is not None:
        _check_tokens(subject, other, documents, tokens)
    scorers = [subject.load(chosen), *([other.load(other.exact())] if other is not None else [])]
    contexts = [scorer.context for scorer in scorers if scorer.context is not None]
    most = min(contexts, default=None)
    if window is None:
        window = min([DEFAULT_WINDOW, *contexts])
    elif most is not None and window > most:
        raise UsageError(f"window is {window} tokens, the context holds {most}")
    return evaluation.evaluate(
        scorers[0],
        scorers[1] if other is not None else None,
        documents,
        subject.tokenizer.encode_with_ends,
        window=window,
        stride=max(window // 2, 1) if stride is None else stride,
        bos=subject.tokenizer.prefix(),
        limit=tokens,
        progress=progress,
    )


def _check_tokens(subject: Subject, other: Subject, documents: Sequence[Document], limit: int | None) -> None:
    """Raise `UsageError` unless both make the same tokens of the documents that hold the first `limit` tokens."""
    seen = 0
    for part in documents:
        own, others = (found.tokenizer.encode(part.text, special=False) for found in (subject, other))
        if own != others:
            raise UsageError(
                f"reference {other.path}: its tokenizer makes other tokens of {part.name} than that of {subject.path}, "
                "so their distributions and perplexities do not compare; evaluate both without a reference and compare "
                "bits per byte"
            )
        seen += len(own)
        if limit is not None and seen >= limit:
            return
