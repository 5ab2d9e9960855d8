"""One tiny Hugging Face folder of each task for the converters' tests."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import openvino as ov
import pytest
from edgert.converters import pretrained
from tiny_folders import TEXT, write_model
from tiny_models import exported
from transformers import PreTrainedModel


@pytest.fixture(scope="session")
def decoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("source") / "tiny-qwen3", "qwen3")


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("source") / "tiny-bert", "bert")


@pytest.fixture
def known_export(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of what comes after it: the export of the tiny models is taken from memory, where it was made once."""

    def known(model: PreTrainedModel) -> ov.Model:
        family = model.config.model_type
        assert model.config.num_hidden_layers == 2
        return exported(family)[1]

    monkeypatch.setattr(pretrained, "export_decoder", known)
    monkeypatch.setattr(pretrained, "export_encoder", known)


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    """Some hundred tokens of text."""
    path = tmp_path / "text.txt"
    path.write_text(TEXT, "utf-8")
    return path


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[Path], Path]:
    """Copies a folder, to damage the copy."""
    return lambda folder: Path(shutil.copytree(folder, tmp_path / "copy"))
