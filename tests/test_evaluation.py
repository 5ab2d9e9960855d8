"""What a model loses on a text, by hand on a model of bigrams; and what is no text."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from edgert.errors import DeviceNonsenseError, QualityError, UsageError
from edgert.evaluation import Document, Evaluation, Logits, Scorer, evaluate, read_documents

LETTERS = "abcd"


class Bigrams(Scorer):
    """A model of four letters and a bos: after each letter the next one of the alphabet has probability `sure`, and the
    others share the rest."""

    def __init__(self, name: str = "bigrams", sure: float = 0.7, vocab_size: int = 5) -> None:
        self.name = name
        self.vocab_size = vocab_size
        self.seen: list[tuple[int, ...]] = []
        rows = np.full((5, max(vocab_size, 5)), math.log((1 - sure) / 4), np.float32)
        for letter in range(4):
            rows[letter, (letter + 1) % 4] = math.log(sure)
        rows[4] = math.log(1 / 5)
        self._rows = rows[:, :vocab_size]

    def logits(self, tokens: Sequence[int]) -> Logits:
        self.seen.append(tuple(tokens))
        return self._rows[list(tokens)]


def encode(text: str) -> tuple[list[int], list[int]]:
    return [LETTERS.index(letter) for letter in text], list(range(1, len(text) + 1))


def measure(scorer: Scorer, reference: Scorer | None, *texts: str, **options: int | None) -> Evaluation:
    settings = {"window": 8, "stride": 4, **options}
    return evaluate(scorer, reference, [Document("letters", text) for text in texts], encode, **settings)  # type: ignore[arg-type]


def test_perplexity_by_hand() -> None:
    """40 letters, 39 of them predicted: 37 by the alphabet, and two are not."""
    text = "abcd" * 4 + "aacd" + "abcd" * 5
    found = measure(Bigrams(), None, text)
    wrong = 2  # the second `a`, and the `c` after it
    nats = -(39 - wrong) * math.log(0.7) - wrong * math.log(0.3 / 4)
    assert found.tokens == found.bytes == 39
    assert found.perplexity == pytest.approx(math.exp(nats / 39))
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / 39)
    assert (found.reference, found.increase, found.kl, found.divergence) == (None, None, None, None)


def test_bos_predicts_the_first_token_too_and_begins_every_window() -> None:
    model = Bigrams()
    found = measure(model, None, "abcd" * 5, "bcda" * 5, bos=4)
    nats = -2 * math.log(1 / 5) - 38 * math.log(0.7)
    assert (found.tokens, found.bytes) == (40, 40)
    assert found.perplexity == pytest.approx(math.exp(nats / 40))
    assert len(model.seen) == found.protocol.windows
    assert all(tokens[0] == 4 and len(tokens) <= 8 for tokens in model.seen)
    assert found.protocol.bos == 4


def test_bits_per_byte_compare_over_tokenizers() -> None:
    """The same predictions of the same text, once a letter a token, once two letters a token."""

    class Pairs(Bigrams):
        def logits(self, tokens: Sequence[int]) -> Logits:
            return np.log(np.array([[0.49, 0.51]], np.float32)).repeat(len(tokens), 0)  # 0.7 twice

    def pairs(text: str) -> tuple[list[int], list[int]]:
        return [0] * (len(text) // 2), list(range(2, len(text) + 1, 2))

    text = "abcd" * 40
    letters = measure(Bigrams(), None, text)
    twos = evaluate(Pairs(vocab_size=2), None, [Document("a", text)], pairs, window=8, stride=4)
    assert twos.tokens == 79
    assert twos.bytes == 158  # the first token is not predicted
    assert twos.bits_per_byte == pytest.approx(letters.bits_per_byte, rel=1e-6)
    assert twos.perplexity != pytest.approx(letters.perplexity, rel=0.1)


def test_bytes_are_those_of_utf8() -> None:
    documents = [Document("a", "ä" * 50)]
    found = evaluate(Bigrams(), None, documents, lambda text: ([0] * 50, list(range(1, 51))), window=8, stride=4)
    assert (found.tokens, found.bytes) == (49, 98)


def test_against_itself_nothing_is_lost() -> None:
    found = measure(Bigrams(), Bigrams(), "abcd" * 30)
    assert (found.increase, found.standard_error, found.kl, found.agreement) == (0, 0, 0, 1)
    assert found.divergence is not None
    assert found.divergence.points == (found.divergence.tokens,)
    found.check(max_increase=0, max_kl=0)


def test_against_a_reference_by_hand() -> None:
    found = measure(Bigrams("blunt", 0.6), Bigrams("sharp", 0.7), "abcd" * 30)
    assert (found.model, found.reference) == ("blunt", "sharp")
    assert found.increase == pytest.approx(0.7 / 0.6 - 1, rel=1e-6)
    assert found.reference_perplexity == pytest.approx(1 / 0.7, rel=1e-6)
    assert found.standard_error == pytest.approx(0, abs=1e-6)  # the same everywhere
    assert found.kl == pytest.approx(0.7 * math.log(0.7 / 0.6) + 0.3 * math.log(0.3 / 0.4), rel=1e-5)
    assert found.agreement == 1


def test_limits() -> None:
    found = measure(Bigrams("blunt", 0.6), Bigrams("sharp", 0.7), "abcd" * 30)
    found.check()
    found.check(max_increase=0.17, max_kl=0.03)
    with pytest.raises(
        QualityError, match=r"blunt drifts from sharp: perplexity \+16\.667%, at most \+1\.000%"
    ) as seen:
        found.check(max_increase=0.01, max_kl=1)
    assert (seen.value.value, seen.value.limit) == (found.increase, 0.01)
    with pytest.raises(QualityError, match=r"KL divergence 0\.02\d+ nats a token, at most 0\.00500 nats"):
        found.check(max_increase=1, max_kl=0.005)
    with pytest.raises(UsageError, match="needs a reference"):
        measure(Bigrams(), None, "abcd" * 30).check(max_kl=1)


class Stumbling(Bigrams):
    """Takes the bos for the likeliest from some number of tokens on."""

    def __init__(self, after: int) -> None:
        super().__init__(f"stumbles after {after}")
        self.after = after

    def logits(self, tokens: Sequence[int]) -> Logits:
        found = super().logits(tokens).copy()
        found[self.after - 1 :, 4] = 9
        return found


@pytest.mark.parametrize(("after", "point"), [(10, 0), (32, 0), (33, 1), (95, 63), (96, 64)])
def test_greedy_divergence_is_that_of_free_runs(after: int, point: int) -> None:
    model, reference = Stumbling(after), Bigrams()
    found = measure(model, reference, "abcd" * 30, window=200, stride=100, bos=4)
    assert found.divergence is not None
    assert (found.divergence.prompt, found.divergence.tokens, found.divergence.points) == (32, 64, (point,))
    prompt = [4, *encode("abcd" * 30)[0]][:32]
    own, other = model.greedy(prompt, 64), reference.greedy(prompt, 64)
    assert point == next((i for i, (a, b) in enumerate(zip(own, other, strict=True)) if a != b), 64)


def test_greedy_divergence_of_the_first_eight_documents_that_are_long_enough() -> None:
    texts = ["abcd" * 7, *["abcd" * 10] * 9]
    found = measure(Stumbling(50), Bigrams(), *texts, window=64, stride=32)
    assert found.divergence is not None
    assert found.divergence.points == (18,) * 8
    assert (found.divergence.median, found.divergence.minimum) == (18, 18)
    assert found.divergence.tokens == 33  # 32 of the prompt and 32 that are read again fill the window
    assert measure(Bigrams(), Bigrams(), *["abcd" * 7] * 9, window=64, stride=32).divergence is None


def test_the_first_tokens_only_and_progress() -> None:
    steps = []
    documents = [Document("one", "abcd" * 10), Document("two", "abcd" * 10), Document("three", "abcd" * 10)]
    found = evaluate(
        Bigrams(), Bigrams(), documents, encode, window=8, stride=4, limit=60,
        progress=lambda done, total: steps.append((done, total)),
    )  # fmt: skip
    assert (found.tokens, found.bytes) == (58, 58)
    assert (found.protocol.documents, found.protocol.text, found.protocol.limit) == (2, "3 files", 60)
    total = found.protocol.windows + 2
    assert steps == [(done, total) for done in range(total + 1)]


def test_as_json() -> None:
    found = measure(Bigrams(), Bigrams("other", 0.6), "abcd" * 10, window=64, stride=32)
    assert math.isinf(found.standard_error or 0)  # a single window
    data = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert data["standard_error"] is None
    assert data["increase"] == found.increase
    assert data["divergence"]["minimum"] == data["divergence"]["median"] == data["divergence"]["points"][0]
    text = "abcd" * 10 + "\n<|endoftext|>\n"
    assert data["protocol"] == {
        "text": "letters", "sha256": hashlib.sha256(text.encode()).hexdigest(), "documents": 1, "windows": 1,
        "window": 64, "stride": 32, "bos": None, "limit": None,
    }  # fmt: skip


class Broken(Bigrams):
    def __init__(self, value: float, window: int) -> None:
        super().__init__("broken")
        self.value, self.window = value, window

    def logits(self, tokens: Sequence[int]) -> Logits:
        found = super().logits(tokens).copy()
        if len(self.seen) == self.window:
            found[-2, 3] = self.value
        return found


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nonsense_names_model_and_window(value: float) -> None:
    with pytest.raises(DeviceNonsenseError, match="broken: its logits in window 3 of 9 hold NaN or what is infinite"):
        measure(Broken(value, 3), None, "abcd" * 10)
    with pytest.raises(DeviceNonsenseError, match="broken: its logits in window 9 of 9"):
        measure(Bigrams(), Broken(value, 9), "abcd" * 10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit": 0}, "limit is 0 tokens, expected at least 1"),
        ({"limit": 20}, "letters: has 19 tokens to predict, at least 32 needed"),
        ({"window": 1}, "window is 1, the least is 2"),
        ({"stride": 8}, "stride is 8, expected 1 to 7"),
    ],
)
def test_numbers_out_of_range(options: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        measure(Bigrams(), None, "abcd" * 10, **options)


def test_vocabularies_that_do_not_fit() -> None:
    with pytest.raises(UsageError, match=r"wide has a vocabulary of 6, bigrams one of 5.*bits per byte do"):
        measure(Bigrams(), Bigrams("wide", vocab_size=6), "abcd" * 10)
    with pytest.raises(UsageError, match="token 3 is outside the vocabulary of 3 of narrow"):
        measure(Bigrams("narrow", vocab_size=3), None, "abcd" * 10)


def test_documents_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "b.txt").write_text("last", "utf-8")
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\n<|endoftext|>\r\ntw\xc3\xb6\r\n")
    (tmp_path / "in" / "empty.txt").write_text("\n", "utf-8")
    (tmp_path / "in" / "c.txt").write_text("in between", "utf-8")
    (tmp_path / "readme.md").write_bytes(b"\xff")
    assert read_documents(tmp_path) == [
        Document("a.txt", "one"), Document("a.txt", "twö"), Document("b.txt", "last"),
        Document("in/c.txt", "in between"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file or folder"),
        (b"", "is empty"),
        (b" \n<|endoftext|>\n", "is empty"),
        ("naïve".encode("latin-1"), r"is no UTF-8: byte 0xef at 2"),
        ("text".encode("utf-16"), r"is no UTF-8: byte 0xff at 0"),
        (b"text\0text", "is no text: character 4 is NUL"),
    ],
)
def test_what_is_no_text(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=message):
        read_documents(path)
    if content is not None:
        with pytest.raises(UsageError, match=message):
            read_documents(tmp_path)


def test_a_folder_without_texts_and_a_file_that_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"holds no \*\.txt"):
        read_documents(tmp_path)
    (tmp_path / "long.txt").write_text("words " * 10, "utf-8")
    monkeypatch.setattr("edgert.evaluation.MAX_TEXT_BYTES", 59)
    with pytest.raises(UsageError, match=r"long\.txt: has 60 bytes, at most 59 allowed"):
        read_documents(tmp_path)
