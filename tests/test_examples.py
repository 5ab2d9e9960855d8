"""Every example runs as its first lines say."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))
OF_THE_SERVICE = [path for path in EXAMPLES if path.stem.startswith("service")]


def run(example: Path, *arguments: str, environ: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        [sys.executable, str(example), *arguments], capture_output=True, text=True, check=False, timeout=120,
        env=environ,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) > 10
    return done.stdout


@pytest.mark.parametrize(
    "example", [path for path in EXAMPLES if path not in OF_THE_SERVICE], ids=lambda path: path.stem
)
def test_example(example: Path, demo_path: Path) -> None:
    said = run(example, str(demo_path))
    if example.stem == "placement":
        assert "the same text" in said
    if example.stem == "image":
        assert "takes no images" in said


@pytest.fixture(scope="module")
def service(demo_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, dict[str, str]]]:
    """A service with the demo model: its URL, and the environment in which clients find it."""
    folder = tmp_path_factory.mktemp("service")
    environ = {name: value for name, value in os.environ.items() if not name.startswith("EDGERT_SERVE_")}
    environ |= {"XDG_CONFIG_HOME": str(folder), "APPDATA": str(folder), "EDGERT_CACHE": str(folder / "cache")}
    if sys.platform != "win32":
        environ["XDG_RUNTIME_DIR"] = str(folder)
    command = [sys.executable, "-m", "edgert", "serve", f"demo={demo_path}", "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environ)
    assert process.stdout is not None
    with process, process.stdout as out:
        url = out.readline().split()[-1]
        yield url, environ
        process.terminate()
    assert process.returncode == (0 if sys.platform != "win32" else 1)


@pytest.mark.skipif(sys.platform == "win32", reason="without a Unix socket clients must know the port")
def test_example_of_the_service(service: tuple[str, dict[str, str]]) -> None:
    said = run(OF_THE_SERVICE[0], "demo", environ=service[1])
    assert "UnknownModelError: model 'no-such-model' is not known" in said


def test_example_with_the_client_of_openai(service: tuple[str, dict[str, str]]) -> None:
    said = run(OF_THE_SERVICE[1], "demo", f"{service[0]}/v1", environ=service[1])
    assert "trip: {'city': " in said
    assert 'call: book({"city"' in said
