"""What a search has measured is on disk, for the search that it is of and no other one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from edgert.converters.mixed.journal import Journal

from edgert.errors import UsageError

KEY = {"model": "abc", "seed": 0}


def never() -> object:
    raise AssertionError("this is known")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With two measurements, and what else a search leaves there."""
    folder = tmp_path / "search"
    journal = Journal(folder, KEY)
    assert journal.rows == 0
    assert journal.measured("a", lambda: {"loss": 0.1 + 0.2}) == {"loss": 0.1 + 0.2}
    assert journal.measured("ünï", lambda: [1, None, "x"]) == [1, None, "x"]
    assert journal.measured("a", never) == {"loss": 0.1 + 0.2}
    journal.close()
    (folder / "variants").mkdir()
    (folder / "variants" / "000-int8-rtn.xml").write_text("<net/>", "utf-8")
    return folder


def test_what_is_known_is_not_measured_again(folder: Path) -> None:
    journal = Journal(folder, dict(reversed(KEY.items())))  # the order of a key says nothing
    assert journal.rows == 2
    assert journal.measured("a", never) == {"loss": 0.1 + 0.2}  # to the last digit
    assert journal.measured("ünï", never) == [1, None, "x"]
    journal.close()


@pytest.mark.parametrize("cut", [1, 2, 5, 9])
def test_a_last_line_that_is_cut_off_is_measured_again(cut: int, folder: Path) -> None:
    path = folder / "rows.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    journal = Journal(folder, KEY)
    assert journal.measured("a", never) == {"loss": 0.1 + 0.2}
    known = cut == 1  # the end of the line alone
    assert journal.rows == 1 + known
    assert journal.measured("ünï", never if known else lambda: [1, None, "x"]) == [1, None, "x"]
    journal.close()
    assert path.read_bytes() == whole
    for _ in range(2):
        again = Journal(folder, KEY)
        assert again.rows == 2
        again.close()


def test_what_fails_is_not_known(folder: Path) -> None:
    journal = Journal(folder, KEY)
    with pytest.raises(KeyboardInterrupt):
        journal.measured("b", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    assert journal.rows == 2
    assert journal.measured("b", lambda: 3) == 3
    journal.close()


def test_another_search_begins_anew(folder: Path) -> None:
    journal = Journal(folder, {**KEY, "seed": 1})
    assert journal.rows == 0
    assert not (folder / "variants").exists()
    journal.close()
    back = Journal(folder, KEY)
    assert back.rows == 0
    back.close()


def foreign(path: Path) -> None:
    path.mkdir()
    (path / "thesis.txt").write_text("mine", "utf-8")


def file(path: Path) -> None:
    path.write_text("mine", "utf-8")


@pytest.mark.parametrize(("make", "message"), [(foreign, "is no search of edgert's"), (file, "cannot be written")])
def test_a_place_that_is_taken_stays(make: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    place = tmp_path / "search"
    make(place)
    with pytest.raises(UsageError, match=message) as raised:
        Journal(place, KEY)
    assert str(place) in str(raised.value)
    kept = place if place.is_file() else place / "thesis.txt"
    assert kept.read_text("utf-8") == "mine"


def test_an_empty_folder_will_do(tmp_path: Path) -> None:
    journal = Journal(tmp_path, KEY)
    assert journal.measured("a", lambda: 1) == 1
    journal.close()


def test_nothing_is_left_at_the_end(folder: Path) -> None:
    journal = Journal(folder, KEY)
    journal.remove()
    assert not folder.exists()
    assert folder.parent.exists()
