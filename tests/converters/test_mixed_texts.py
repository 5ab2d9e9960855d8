"""The texts of a search: three sets of windows of a user's text, or of one that the model wrote."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from edgert.converters.mixed import texts as module
from edgert.converters.mixed.texts import Texts, read_texts, write_texts
from mixed_models import logits_of, model_of

from edgert.errors import UsageError
from edgert.likelihood import Prediction, Window
from edgert.text import Tokenizer

VOCAB_SIZE = 256
LIMITS = (module.CALIBRATION_TOKENS, module.SEARCH_TOKENS, module.VERIFY_TOKENS)
LENGTH = 32  # of windows in these tests, where the model writes


@pytest.fixture(scope="module")
def tokenizer(decoder_folder: Path) -> Tokenizer:
    return Tokenizer.open(decoder_folder)


def write(path: Path, words: int) -> Path:
    """A text whose parts differ."""
    draw = np.random.default_rng(3)
    path.write_text(" ".join("".join(draw.choice(list("foxdgbl"), 5)) for _ in range(words)), "utf-8")
    return path


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("texts") / "long.txt", 8000)


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("texts") / "short.txt", 1500)


def tokens_of(windows: tuple[Window, ...]) -> int:
    return sum(len(window.tokens) for window in windows)


def assert_apart(texts: Texts) -> None:
    parts = (texts.calibration, texts.search, texts.verify)
    assert all(parts)
    assert len({window for part in parts for window in part}) == sum(map(len, parts))


def test_sets_have_their_sizes_and_share_nothing(long: Path, tokenizer: Tokenizer) -> None:
    texts = read_texts(long, tokenizer, VOCAB_SIZE, 2048, seed=0)
    assert_apart(texts)
    assert (texts.name, texts.generated, texts.window) == ("long.txt", False, 512)
    for part, limit in zip((texts.calibration, texts.search, texts.verify), LIMITS, strict=True):
        assert limit <= tokens_of(part) < limit + 512
        assert {len(window.tokens) for window in part} <= {512} | set(range(2, 512))
    every = tokenizer.encode_with_ends(long.read_text("utf-8"))[0]
    text = ",".join(map(str, every))
    for window in texts.verify:
        assert ",".join(map(str, window.tokens)) in text
    assert texts.bos is None


def test_a_short_text_is_shared_out(short: Path, tokenizer: Tokenizer) -> None:
    texts = read_texts(short, tokenizer, VOCAB_SIZE, 256, seed=0)
    assert_apart(texts)
    assert texts.window == 256  # the model's context
    count = len(tokenizer.encode_with_ends(short.read_text("utf-8"))[0])
    assert module.LEAST_TOKENS <= count < sum(LIMITS) / 2
    sizes = [tokens_of(part) / count for part in (texts.calibration, texts.search, texts.verify)]
    assert sizes == pytest.approx([limit / sum(LIMITS) for limit in LIMITS], abs=0.08)
    assert len(texts.verify) > 1  # or nothing is known of the error


def test_the_seed_decides(long: Path, tokenizer: Tokenizer) -> None:
    first, again, other = (read_texts(long, tokenizer, VOCAB_SIZE, 2048, seed) for seed in (0, 0, 1))
    assert first == again
    assert first.sha256 == other.sha256  # it is the same text
    assert set(first.verify) != set(other.verify)


def test_tokens_that_the_model_lacks_are_left_out(long: Path, tokenizer: Tokenizer) -> None:
    texts = read_texts(long, tokenizer, 40, 2048, seed=0)
    assert max(token for window in texts.verify for token in window.tokens) < 40
    assert texts.sha256 != read_texts(long, tokenizer, VOCAB_SIZE, 2048, seed=0).sha256


def test_windows_begin_with_the_token_that_the_model_expects(
    long: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "prefix", lambda: 1)
    texts = read_texts(long, tokenizer, VOCAB_SIZE, 2048, seed=0)
    assert texts.bos == 1
    windows = (*texts.calibration, *texts.search, *texts.verify)
    assert {window.tokens[0] for window in windows} == {1}
    assert {window.first for window in windows} == {1}
    assert max(len(window.tokens) for window in windows) == 512


def too_short(folder: Path) -> tuple[Path, str]:
    path = write(folder / "brief.txt", 100)
    return path, r"calibration .*brief\.txt.* at least 4096"


def empty(folder: Path) -> tuple[Path, str]:
    (folder / "empty.txt").write_text(" \n", "utf-8")
    return folder / "empty.txt", r"empty\.txt: is empty"


def no_text(folder: Path) -> tuple[Path, str]:
    (folder / "latin.txt").write_bytes("Straße ".encode("latin-1") * 5000)
    return folder / "latin.txt", r"latin\.txt.*UTF-8"


def no_file(folder: Path) -> tuple[Path, str]:
    return folder / "none.txt", r"none\.txt: no such file"


def no_texts(folder: Path) -> tuple[Path, str]:
    (folder / "texts").mkdir()
    return folder / "texts", r"texts: the folder holds no \*\.txt"


def letters(folder: Path) -> tuple[Path, str]:
    """Documents of a token each: none has one to predict."""
    (folder / "letters.txt").write_text("\n<|endoftext|>\n".join("ab" * 3000), "utf-8")
    return folder / "letters.txt", r"calibration .*letters\.txt.* at least 4096"


@pytest.mark.parametrize("make", [too_short, empty, no_text, no_file, no_texts, letters])
def test_bad_texts(make: Callable[[Path], tuple[Path, str]], tmp_path: Path, tokenizer: Tokenizer) -> None:
    path, message = make(tmp_path)
    with pytest.raises(UsageError, match=message):
        read_texts(path, tokenizer, VOCAB_SIZE, 2048, seed=0)


@pytest.fixture(scope="module")
def written() -> dict[tuple[int, int | None], Texts]:
    """By seed and bos."""
    found = {}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(module, "WINDOW", LENGTH)
        for seed, bos in ((0, 1), (1, 1), (0, None)):
            shares: list[float] = []
            model = model_of("small")
            found[seed, bos] = write_texts(model, bos, VOCAB_SIZE, 256, seed, shares.append)
            assert shares == sorted(shares)
            assert 0 <= shares[0] < 0.1 < 0.9 < shares[-1] <= 1
        again = write_texts(model_of("small"), 1, VOCAB_SIZE, 256, 0, lambda share: None)
        assert again == found[0, 1]
    return found


def test_a_model_writes_windows(written: dict[tuple[int, int | None], Texts]) -> None:
    texts = written[0, 1]
    assert_apart(texts)
    assert (texts.name, texts.generated, texts.bos, texts.window) == ("written by the model", True, 1, LENGTH)
    windows = (*texts.calibration, *texts.search, *texts.verify)
    assert len(windows) == 32
    assert {len(window.tokens) for window in windows} == {LENGTH}
    assert {(window.tokens[0], window.first) for window in windows} == {(1, 1)}
    assert {token for window in windows for token in window.tokens} <= set(range(VOCAB_SIZE))
    assert written[1, 1].sha256 != texts.sha256
    free = written[0, None]
    assert free.bos is None
    assert len({window.tokens[0] for window in free.verify}) > 1


def test_a_model_writes_no_more_than_its_context(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = write_texts(model_of("small"), None, VOCAB_SIZE, 8, 0, lambda share: None)
    assert texts.window == 8
    assert {len(window.tokens) for window in texts.verify} == {8}


@pytest.mark.parametrize("key", [(0, 1), (1, 1), (0, None)])
def test_what_a_model_writes_is_drawn_from_its_distribution(
    key: tuple[int, int | None], written: dict[tuple[int, int | None], Texts]
) -> None:
    """The mean loss on it is near the mean entropy, and squared surprise near its expectation."""
    texts = written[key]
    windows = (*texts.calibration, *texts.search, *texts.verify)
    over, ranks = [], []
    for window, logits in zip(windows, logits_of(model_of("small"), windows), strict=True):
        said = Prediction(logits[:-1])
        chances = said.probabilities.astype(np.float64)
        entropy = -(chances * np.log(chances)).sum(axis=-1)
        over.append(said.losses(window.targets) - entropy)
        own = np.take_along_axis(chances, window.targets[:, None], -1)
        ranks.append((chances * (chances > own)).sum(axis=-1) + own[:, 0] / 2)  # uniform if drawn from it
    surprise, place = np.concatenate(over), np.concatenate(ranks)
    assert abs(surprise.mean()) < 3 * surprise.std() / np.sqrt(surprise.size)
    assert surprise.std() > 0.1  # the distributions are not flat
    assert abs(place.mean() - 0.5) < 3 / np.sqrt(12 * place.size)
    assert abs(place.std() - np.sqrt(1 / 12)) < 0.03
