"""The bundle: written whole or not at all, and not believed before it is checked."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from edgert import bundle as bundles
from edgert.bundle import Bundle
from edgert.errors import BundleError, BundleVersionError, UsageError

MakeBundle = Callable[..., Path]


def edit_manifest(path: Path, change: Callable[[dict], None]) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


def test_what_is_written_is_read_back(fake_bundle: MakeBundle) -> None:
    bundle = Bundle.open(fake_bundle(eos_token_ids=(3, 5)), verify=True)
    assert bundle.facts.eos_token_ids == (3, 5)
    assert bundle.report.source == "test: fake"
    assert set(bundle.files) == {"model.xml", "model.bin"}


def test_a_bundle_can_be_moved(fake_bundle: MakeBundle, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere" / "renamed.edge"
    moved.parent.mkdir()
    shutil.move(fake_bundle(), moved)
    assert Bundle.open(moved, verify=True).model_path == moved / "model.xml"
    assert str(tmp_path) not in (moved / "manifest.json").read_text()


@pytest.mark.parametrize("name", ["model.xml", "model.bin", "manifest.json"])
def test_missing_file(fake_bundle: MakeBundle, name: str) -> None:
    path = fake_bundle()
    (path / name).unlink()
    with pytest.raises(BundleError, match=f"{name} is missing"):
        Bundle.open(path)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no such folder"):
        Bundle.open(tmp_path / "none.edge")


def test_truncated_file(fake_bundle: MakeBundle) -> None:
    path = fake_bundle()
    (path / "model.bin").write_bytes(b"weigh")
    with pytest.raises(BundleError, match=r"model.bin has 5 bytes, expected 7"):
        Bundle.open(path)


def test_wrong_hash_is_found_on_demand(fake_bundle: MakeBundle) -> None:
    path = fake_bundle()
    (path / "model.bin").write_bytes(b"WEIGHTS")
    Bundle.open(path)
    with pytest.raises(BundleError, match=r"model.bin has hash"):
        Bundle.open(path, verify=True)


def test_newer_format(fake_bundle: MakeBundle) -> None:
    path = fake_bundle()
    edit_manifest(path, lambda m: m.update(format_version=bundles.FORMAT_VERSION + 1))
    with pytest.raises(BundleVersionError, match="format version 2 is newer than 1"):
        Bundle.open(path)


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/passwd", "a/../../secret", "..\\secret", "C:\\secret", "C:secret", "", "."]
)
def test_manifest_may_not_point_outside(fake_bundle: MakeBundle, name: str) -> None:
    path = fake_bundle()
    (path.parent / "secret").write_text("x")
    edit_manifest(path, lambda m: m["files"].update({name: {"bytes": 1, "sha256": "0"}}))
    with pytest.raises(BundleError, match="outside the folder"):
        Bundle.open(path)


def test_symbolic_link(fake_bundle: MakeBundle, tmp_path: Path) -> None:
    path = fake_bundle()
    outside = tmp_path / "outside.bin"
    outside.write_bytes(b"weights")
    (path / "model.bin").unlink()
    (path / "model.bin").symlink_to(outside)
    with pytest.raises(BundleError, match="symbolic link"):
        Bundle.open(path)


def test_linked_folder_inside(fake_bundle: MakeBundle, tmp_path: Path) -> None:
    path = fake_bundle()
    (tmp_path / "away").mkdir()
    (tmp_path / "away" / "x").write_bytes(b"1")
    (path / "tokenizer").symlink_to(tmp_path / "away")
    edit_manifest(path, lambda m: m["files"].update({"tokenizer/x": {"bytes": 1, "sha256": "0"}}))
    with pytest.raises(BundleError, match="symbolic link"):
        Bundle.open(path)


@pytest.mark.parametrize("text", ["", "[1, 2]", "{", '{"format_version": "1"}', '{"format_version": 1}', "\x00"])
def test_damaged_manifest(fake_bundle: MakeBundle, text: str) -> None:
    path = fake_bundle()
    (path / "manifest.json").write_text(text)
    with pytest.raises(BundleError):
        Bundle.open(path)


@pytest.mark.parametrize(
    ("fact", "value"),
    [("vocab_size", -1), ("context_length", 2**40), ("task", "poet"), ("hidden_size", "x"), ("surprise", 1)],
)
def test_absurd_facts(fake_bundle: MakeBundle, fact: str, value: object) -> None:
    path = fake_bundle()
    edit_manifest(path, lambda m: m["model"].update({fact: value}))
    with pytest.raises(BundleError, match=fact if fact != "surprise" else "unknown field"):
        Bundle.open(path)


@pytest.mark.parametrize(
    ("field", "value"),
    [("tools", []), ("precisions", None), ("precisions", [{}]), ("checks", ["x"]), ("checks", [{"check": 1}])],
)
def test_absurd_reports(fake_bundle: MakeBundle, field: str, value: object) -> None:
    path = fake_bundle()
    edit_manifest(path, lambda m: m["report"].update({field: value}))
    with pytest.raises(BundleError, match=field):
        Bundle.open(path)


QUALITY = {
    "budget": 0.01, "met": True, "increase": 0.0083, "standard_error": 0.001, "bound": 0.0099, "perplexity": 5.04,
    "reference": 5, "text": "held-out.txt", "sha256": "ab" * 32, "tokens": 8192, "config": "CPU@f32",
}  # fmt: skip


def test_quality_is_read_back(fake_bundle: MakeBundle) -> None:
    path = fake_bundle()
    edit_manifest(path, lambda m: m["report"].update(quality=QUALITY))
    assert Bundle.open(path).report.quality == QUALITY


def test_a_manifest_from_before_there_was_quality(fake_bundle: MakeBundle) -> None:
    path = fake_bundle()
    edit_manifest(path, lambda m: m["report"].pop("quality"))
    assert Bundle.open(path).report.quality is None


@pytest.mark.parametrize(
    "quality",
    [
        {}, [], "good", 1,
        *({**QUALITY, name: value} for name in QUALITY for value in (None, [], {"x": 1})),
        {**QUALITY, "met": 1}, {**QUALITY, "budget": "1%"}, {**QUALITY, "text": 5}, {**QUALITY, "tokens": 0.5},
        {**QUALITY, "increase": float("nan")}, {**QUALITY, "bound": float("inf")}, {**QUALITY, "tokens": 10**400},
    ],
)  # fmt: skip
def test_absurd_quality(fake_bundle: MakeBundle, quality: object) -> None:
    path = fake_bundle()
    edit_manifest(path, lambda m: m["report"].update(quality=quality))
    with pytest.raises(BundleError, match="quality"):
        Bundle.open(path)


@pytest.mark.parametrize("name", ["tokenizer/chat_template.jinja", "model.onnx", "model.xml.bak"])
def test_what_the_manifest_does_not_list_is_refused(fake_bundle: MakeBundle, name: str) -> None:
    path = fake_bundle()
    (path / name).parent.mkdir(exist_ok=True)
    (path / name).write_text("not hashed")
    with pytest.raises(BundleError, match="not listed"):
        Bundle.open(path)


def test_a_linked_folder_that_is_not_listed(fake_bundle: MakeBundle, tmp_path: Path) -> None:
    path = fake_bundle()
    (tmp_path / "away").mkdir()
    (path / "tokenizer").symlink_to(tmp_path / "away")
    with pytest.raises(BundleError, match="symbolic link"):
        Bundle.open(path)


@pytest.mark.parametrize("text", ['{"format_version": ' + "9" * 5000 + "}", "[" * 100_000, '{"format_version": true}'])
def test_hostile_json(fake_bundle: MakeBundle, text: str) -> None:
    path = fake_bundle()
    (path / "manifest.json").write_text(text)
    with pytest.raises(BundleError):
        Bundle.open(path)


def test_an_absurdly_long_name(fake_bundle: MakeBundle) -> None:
    path = fake_bundle()
    edit_manifest(path, lambda m: m["files"].update({"x" * 5000: {"bytes": 1, "sha256": "0"}}))
    with pytest.raises(BundleError, match="at most 255"):
        Bundle.open(path)


def leftovers(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir()]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("boom"), SystemExit(1)])
def test_nothing_remains_of_an_interrupted_write(tmp_path: Path, error: BaseException) -> None:
    def write() -> None:
        with bundles.create(tmp_path / "out.edge") as draft:
            (draft.path / "model.bin").write_bytes(b"half")
            raise error

    with pytest.raises(type(error)):
        write()
    assert leftovers(tmp_path) == []


def test_full_disk(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="No space left"), bundles.create(tmp_path / "out.edge"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert leftovers(tmp_path) == []


def test_full_disk_keeps_the_old_bundle(fake_bundle: MakeBundle) -> None:
    path = fake_bundle()
    with pytest.raises(BundleError), bundles.create(path, overwrite=True):
        raise OSError(errno.ENOSPC, "No space left on device")
    Bundle.open(path, verify=True)
    assert leftovers(path.parent) == [path.name]


def test_an_existing_bundle_is_kept_unless_asked(fake_bundle: MakeBundle) -> None:
    path = fake_bundle()
    with pytest.raises(UsageError, match="--force"), bundles.create(path):
        pass
    with bundles.create(path, overwrite=True) as draft:
        for name in ("model.xml", "model.bin"):
            (draft.path / name).write_text("new")
        draft.finish(Bundle.open(path).facts, bundles.Report("test: new", {}), None)
    assert Bundle.open(path, verify=True).report.source == "test: new"
    assert leftovers(path.parent) == [path.name]


def test_a_folder_that_is_no_bundle_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.txt").write_text("…")
    with pytest.raises(UsageError, match="no bundle"), bundles.create(tmp_path / "thesis", overwrite=True):
        pass
    assert (tmp_path / "thesis" / "chapter1.txt").exists()


def test_a_failed_replacement_puts_the_old_bundle_back(
    fake_bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = fake_bundle()
    rename = Path.rename

    def fail_for_the_new(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_for_the_new)

    def replace() -> None:
        with bundles.create(path, overwrite=True) as draft:
            for name in ("model.xml", "model.bin"):
                (draft.path / name).write_text("new")
            draft.finish(Bundle.open(path).facts, bundles.Report("test: new", {}), None)

    with pytest.raises(KeyboardInterrupt):
        replace()
    assert Bundle.open(path, verify=True).report.source == "test: fake"
    assert leftovers(path.parent) == [path.name]


def test_a_linked_output_is_refused(fake_bundle: MakeBundle, tmp_path: Path) -> None:
    (tmp_path / "link.edge").symlink_to(fake_bundle())
    with pytest.raises(UsageError, match="symbolic link"), bundles.create(tmp_path / "link.edge", overwrite=True):
        pass
