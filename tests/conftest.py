"""Bundles that several test files share, each made once, for all processes of `pytest -n`. Nobody changes them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

import edgert
from edgert import bundle as bundles
from edgert.conditions import conditions, path_of
from edgert.profile import DeviceModel, Profile
from edgert.session import Model

DEMO_MODEL = Path(__file__).parents[1] / "examples" / "models" / "bookworm"


def shared(tmp_path_factory: pytest.TempPathFactory, name: str, *, weights: str) -> Path:
    """The demo model's bundle; whichever process needs it first makes it."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # then each process has a folder in that of all
        folder = folder.parent
    out = folder / name
    with FileLock(folder / f"{name}.lock"):
        if not out.exists():
            edgert.compile(DEMO_MODEL, out, weights=weights)
    return out


@pytest.fixture(scope="session", autouse=True)
def shared_exports(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Where `tiny_models.exported` finds what other processes of this run have exported."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        os.environ["EDGERT_TEST_EXPORTS"] = str(tmp_path_factory.getbasetemp().parent)


@pytest.fixture(scope="session")
def demo_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository's own model, compiled at fp16."""
    return shared(tmp_path_factory, "demo.edge", weights="fp16")


@pytest.fixture(scope="session")
def packed_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same at INT8, with its weights packed for the kernels."""
    return shared(tmp_path_factory, "packed.edge", weights="int8")


@pytest.fixture(scope="session")
def demo(demo_path: Path) -> Model:
    """The demo bundle on the exact reference configuration."""
    return edgert.load(demo_path, device="CPU@f32")


@pytest.fixture(scope="session")
def book(demo: Model) -> list[int]:
    """A text of more than a thousand tokens."""
    pages = (Path(__file__).parents[1] / name for name in ("README.md", "docs/architecture.md"))
    return demo.tokenizer.encode("\n".join(page.read_text("utf-8") for page in pages))


@pytest.fixture
def fake_bundle(tmp_path: Path) -> Callable[..., Path]:
    """Writes bundles whose model is no model: for what happens before a model is read."""

    def make(name: str = "fake.edge", **facts: object) -> Path:
        defaults = {
            "name": "fake", "task": "decoder", "format": "openvino", "architecture": "none", "vocab_size": 8,
            "hidden_size": 4, "context_length": 16, "num_layers": 1, "eos_token_ids": (0,), "bos_token_id": None,
            "weights": "fp16", "parameters": 1,
        }  # fmt: skip
        out = tmp_path / name
        with bundles.create(out) as draft:
            (draft.path / "model.xml").write_text("<net/>")
            (draft.path / "model.bin").write_bytes(b"weights")
            report = bundles.Report("test: fake", {"edgert": edgert.__version__})
            draft.finish(bundles.ModelFacts(**{**defaults, **facts}), report, None)  # type: ignore[arg-type]
        return out

    return make


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Writes this machine's profile: `CPU@f32` draws little and is slow, `CPU@f32+dq` the other way round."""
    monkeypatch.setenv("EDGERT_CACHE", str(tmp_path))

    def write(*, watts: bool = True) -> None:
        devices = tuple(
            DeviceModel(
                name, rate, 10 * rate, 20.0, 5.0, active if watts else None, 0.0, "f32", "measured", "made up",
                config=config,
            )
            for name, config, rate, active in (("slow", "CPU@f32", 1.0, 1.0), ("fast", "CPU@f32+dq", 4.0, 40.0))
        )  # fmt: skip
        now = conditions()
        Profile(2, "here", devices, base_w=1.0, conditions=now).write(path_of(now))

    return write
