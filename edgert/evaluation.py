"""What a model loses on a text, beside a reference that reads the same tokens: the protocol of `docs/quality.md`.

Whatever predicts is a `Scorer`: a bundle on any plan, an OpenVINO IR folder, or what `edgert.converters` makes of a
Hugging Face folder. Model and reference read a window each in turn, so that only one window's logits are in memory.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgert.errors import DeviceNonsenseError, QualityError, UsageError
from edgert.likelihood import END_OF_TEXT, Losses, Window, increase, windows
from edgert.likelihood import documents as split

Logits = NDArray[np.float32]
Encode = Callable[[str], tuple[Sequence[int], Sequence[int]]]
"""Tokens of a text without special ones, and the index of the character behind each: `Tokenizer.encode_with_ends`."""
Progress = Callable[[int, int], None]
"""Is told how many windows and prompts are done, of how many."""

MAX_TEXT_BYTES = 256 * 1024 * 1024
LEAST_TOKENS = 32  # that are scored; a mean over fewer says nothing
PROMPTS = 8  # documents whose beginning is continued
PROMPT_TOKENS = 32
CONTINUED_TOKENS = 64
MAX_INCREASE = 0.005  # of the gate: half a percent of perplexity
MAX_KL = 0.005  # of the gate, nats a token


class Scorer(Protocol):
    """Something that predicts tokens. Who derives from this needs to write no more than `logits`.

    Attributes:
        name: for people, e.g. `demo.edge on CPU@f32`.
        vocab_size: of the logits.
        context: tokens that it takes at most; None where nobody says.
    """

    name: str
    vocab_size: int
    context: int | None = None

    def logits(self, tokens: Sequence[int]) -> Logits:
        """Logits `[len(tokens), vocab_size]` after each of some tokens, read from an empty cache; the caller's own."""
        ...

    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        """The `count` tokens that follow a prompt when always the likeliest is taken; no token ends it."""
        tokens = list(prompt)
        for _ in range(count):
            tokens.append(int(self.logits(tokens)[-1].argmax()))
        return tokens[len(prompt) :]


@dataclass(frozen=True)
class Document:
    """A text without a break in it.

    Attributes:
        name: of the file that it comes from.
        text: not empty.
    """

    name: str
    text: str


@dataclass(frozen=True)
class Ruler:
    """How it was measured.

    Attributes:
        text: what was read, a name for people.
        sha256: of the documents as UTF-8, each followed by a line `<|endoftext|>`.
        documents, windows: how many were read.
        window, stride: tokens.
        bos: the token that each window begins with; None for none.
        limit: tokens of the text that were read at most; None for all.
    """

    text: str
    sha256: str
    documents: int
    windows: int
    window: int
    stride: int
    bos: int | None
    limit: int | None


@dataclass(frozen=True)
class Divergence:
    """How far a model's greedy continuations are those of the reference.

    Attributes:
        points: of each document, how many tokens agree before the first that does not.
        tokens: that were compared of each document.
        prompt: tokens of the document that were continued, bos included.
    """

    points: tuple[int, ...]
    tokens: int
    prompt: int

    @property
    def median(self) -> float:
        return float(median(self.points))

    @property
    def minimum(self) -> int:
        return min(self.points)


@dataclass(frozen=True)
class Evaluation:
    """What was found.

    Attributes:
        model, reference: names; without a reference all that compares is None.
        protocol: how it was measured.
        tokens: that were scored.
        bytes: UTF-8 bytes of the text that these tokens are.
        perplexity: of a token, so it compares only where the tokens are the same.
        bits_per_byte: compares over tokenizers.
        reference_perplexity: of the reference.
        increase: of perplexity over the reference's; 0.01 is one percent.
        standard_error: of the increase; infinite with a single window.
        kl: mean Kullback-Leibler divergence from the reference's distributions, nats a token.
        agreement: share of tokens for which both hold the same one for the likeliest.
        divergence: None also where no document is long enough.
    """

    model: str
    reference: str | None
    protocol: Ruler
    tokens: int
    bytes: int
    perplexity: float
    bits_per_byte: float
    reference_perplexity: float | None = None
    increase: float | None = None
    standard_error: float | None = None
    kl: float | None = None
    agreement: float | None = None
    divergence: Divergence | None = None

    def check(self, *, max_increase: float | None = None, max_kl: float | None = None) -> None:
        """Hold the values found, not their bounds, against limits.

        Raises:
            QualityError: one of them is above.
            UsageError: there is no reference.
        """
        for name, value, limit, form in (
            ("perplexity", self.increase, max_increase, "{:+.3%}"),
            ("KL divergence", self.kl, max_kl, "{:.5f} nats a token"),
        ):
            if limit is None:
                continue
            if value is None:
                raise UsageError(f"a limit on {name} needs a reference")
            if not value <= limit:  # also for NaN
                raise QualityError(
                    f"{self.model} drifts from {self.reference}: {name} {form.format(value)}, "
                    f"at most {form.format(limit)} allowed",
                    value=value,
                    limit=limit,
                )

    def to_json(self) -> dict[str, Any]:
        """As JSON has it: what is infinite is None."""
        found = asdict(self)
        if self.divergence is not None:
            found["divergence"] |= {"median": self.divergence.median, "minimum": self.divergence.minimum}
        infinite = [name for name, value in found.items() if isinstance(value, float) and not math.isfinite(value)]
        return {**found, **dict.fromkeys(infinite)}


def read_documents(path: str | Path) -> list[Document]:
    """The documents of a UTF-8 file, or of all `*.txt` in a folder and those in it, by name.

    Lines of `<|endoftext|>` separate documents.

    Raises:
        UsageError: there is no such file, no text in it, or what is no UTF-8 text.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*.txt") if file.is_file())
        if not files:
            raise UsageError(f"text {path}: the folder holds no *.txt")
        named = [(file.relative_to(path).as_posix(), file) for file in files]
    elif path.is_file():
        named = [(path.name, path)]
    else:
        raise UsageError(f"text {path}: no such file or folder")
    found = [Document(name, part) for name, file in named for part in split(_read(file))]
    if not found:
        raise UsageError(f"text {path}: is empty")
    return found


def evaluate(
    scorer: Scorer,
    reference: Scorer | None,
    documents: Sequence[Document],
    encode: Encode,
    *,
    window: int,
    stride: int,
    bos: int | None = None,
    limit: int | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Let a model, and a reference, predict documents.

    Args:
        encode: of the model's tokenizer; the reference must take the same tokens.
        window, stride, bos: see `edgert.likelihood.windows`; both models must take `window` tokens.
        limit: read only the first so many tokens; None for all.
        progress: is told of every window, and of every prompt that is continued.

    Raises:
        UsageError: the text is too short or not for this model, the reference has another vocabulary, or a number is
            out of its range.
        DeviceNonsenseError: a model gave NaN or what is infinite; the message names the window.
        Others as the scorers'.
    """
    if reference is not None and reference.vocab_size != scorer.vocab_size:
        raise UsageError(
            f"reference {reference.name} has a vocabulary of {reference.vocab_size}, {scorer.name} one of "
            f"{scorer.vocab_size}: their distributions and perplexities do not compare, bits per byte do"
        )
    if limit is not None and limit < 1:
        raise UsageError(f"the limit is {limit} tokens, expected at least 1")
    tokens, size = _encoded(documents, encode, bos, limit)
    highest = max(map(max, tokens), default=0)
    if highest >= scorer.vocab_size:
        raise UsageError(f"text: token {highest} is outside the vocabulary of {scorer.vocab_size} of {scorer.name}")
    cut = windows(tokens, window=window, stride=stride, bos=bos)
    count = sum(len(part.targets) for part in cut)
    if count < LEAST_TOKENS:
        raise UsageError(f"text {_name(documents)}: has {count} tokens to predict, at least {LEAST_TOKENS} needed")
    prompts, continued = _prompts(tokens, window, bos) if reference is not None else ([], 0)
    report = progress or (lambda done, total: None)
    total = len(cut) + len(prompts)
    own, other = Losses(), Losses()
    for number, part in enumerate(cut):
        report(number, total)
        _score(scorer, reference, part, own, other, f"window {number + 1} of {len(cut)}")
    points = []
    for number, prompt in enumerate(prompts):
        assert reference is not None
        report(len(cut) + number, total)
        points.append(_agreeing(scorer, reference, prompt, continued))
    report(total, total)
    digest = hashlib.sha256("".join(f"{part.text}\n{END_OF_TEXT}\n" for part in documents).encode())
    protocol = Ruler(_name(documents), digest.hexdigest(), len(tokens), len(cut), window, stride, bos, limit)
    found: dict[str, Any] = {}
    if reference is not None:
        above, error = increase(own, other)
        found = {
            "reference_perplexity": other.perplexity, "increase": above, "standard_error": error, "kl": own.mean_kl,
            "agreement": own.agreement,
            "divergence": Divergence(tuple(points), continued, len(prompts[0])) if prompts else None,
        }  # fmt: skip
    return Evaluation(
        scorer.name,
        reference.name if reference is not None else None,
        protocol,
        own.tokens,
        size,
        own.perplexity,
        own.nats / math.log(2) / size,
        **found,
    )


def _read(path: Path) -> str:
    try:
        if (size := path.stat().st_size) > MAX_TEXT_BYTES:
            raise UsageError(f"text {path}: has {size} bytes, at most {MAX_TEXT_BYTES} allowed")
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        value = error.object[error.start]
        raise UsageError(f"text {path}: is no UTF-8: byte 0x{value:02x} at {error.start}") from error
    except OSError as error:
        raise UsageError(f"text {path}: cannot be read: {error.strerror}") from error
    if "\0" in text:
        raise UsageError(f"text {path}: is no text: character {text.index(chr(0))} is NUL")
    return text


def _name(documents: Sequence[Document]) -> str:
    names = dict.fromkeys(part.name for part in documents)
    return next(iter(names)) if len(names) == 1 else f"{len(names)} files"


def _encoded(
    documents: Sequence[Document], encode: Encode, bos: int | None, limit: int | None
) -> tuple[list[Sequence[int]], int]:
    """The tokens of each document, and the UTF-8 bytes of those that something comes before."""
    found: list[Sequence[int]] = []
    size, left = 0, limit
    for part in documents:
        ids, ends = encode(part.text)
        ids = ids[:left]
        if ids:
            first = 0 if bos is not None else ends[0]
            size += len(part.text[first : ends[len(ids) - 1]].encode())
            found.append(ids)
        if left is not None:
            left -= len(ids)
            if not left:
                break
    return found, size


def _score(scorer: Scorer, reference: Scorer | None, window: Window, own: Losses, other: Losses, name: str) -> None:
    """Add a window to the losses of both."""
    rows = slice(window.first - 1, len(window.tokens) - 1)
    found = _finite(scorer, window.tokens, name)[rows]
    expected = None if reference is None else _finite(reference, window.tokens, name)[rows]
    own.add(found, window.targets, expected)
    if expected is not None:
        other.add(expected, window.targets)


def _finite(scorer: Scorer, tokens: Sequence[int], name: str) -> Logits:
    logits = scorer.logits(tokens)
    if not all(np.isfinite(row).all() for row in logits):  # row by row: a mask of all would be a quarter of their size
        raise DeviceNonsenseError(f"{scorer.name}: its logits in {name} hold NaN or what is infinite")
    return logits


def _prompts(tokens: Sequence[Sequence[int]], window: int, bos: int | None) -> tuple[list[list[int]], int]:
    """Beginnings of the first documents that are long enough, and how many tokens shall follow them."""
    head = [] if bos is None else [bos]
    length = max(min(PROMPT_TOKENS, window // 2) - len(head), 1)
    found = [[*head, *part[:length]] for part in tokens if len(part) >= length]
    # The last token that follows is only compared, never read.
    return found[:PROMPTS], min(CONTINUED_TOKENS, window + 1 - len(head) - length)


def _agreeing(scorer: Scorer, reference: Scorer, prompt: list[int], count: int) -> int:
    """Of `count` tokens that the reference continues a prompt with, how many come before one that the scorer would not
    have chosen.

    The scorer reads the reference's continuation in one pass. Up to the first difference that is what it would have
    read of its own, so the number is that of two free runs.
    """
    expected = reference.greedy(prompt, count)
    logits = _finite(scorer, [*prompt, *expected[:-1]], f"a continuation of {len(prompt)} tokens")
    differ = logits[len(prompt) - 1 :].argmax(axis=-1) != np.array(expected)
    return int(differ.argmax()) if differ.any() else count
