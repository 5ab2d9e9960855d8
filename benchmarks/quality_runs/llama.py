"""llama.cpp as something that predicts, by its library's own calls and in its own arithmetic."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np
from numpy.typing import NDArray
from runtimes.catalogue import PEERS, THEIRS

from edgert.evaluation import Scorer

WORKER = Path(__file__).with_name("llama_worker.py")


class LlamaFailedError(Exception):
    """llama.cpp's own words."""


class Llama(Scorer):
    """A process of llama.cpp (see `llama_worker.py`), which predicts once a model is loaded.

    Args:
        log: where its standard error goes.
    """

    def __init__(self, log: IO[bytes]) -> None:
        folder = PEERS / json.loads((PEERS / "llama.json").read_text("utf-8"))["all"]["folder"]
        self._process = subprocess.Popen(
            [str(THEIRS), str(WORKER), str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log
        )
        self.name, self.vocab_size = "llama.cpp", 0

    def quantize(self, source: Path, target: Path) -> None:
        """To Q4_K_M, by llama.cpp's own rules and without an importance matrix."""
        self._ask(do="quantize", source=str(source), target=str(target))

    def load(self, model: Path, context: int, threads: int) -> None:
        answer, _ = self._ask(do="load", model=str(model), context=context, threads=threads)
        self.name, self.vocab_size = f"{model.name} on llama.cpp", answer["vocabulary"]

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """`[tokens, vocabulary]`, from an empty cache."""
        _, data = self._ask(do="logits", tokens=[int(token) for token in tokens])
        return np.frombuffer(data, np.float32).reshape(len(tokens), self.vocab_size)

    def _ask(self, **request: Any) -> tuple[dict[str, Any], bytes]:
        to, back = self._process.stdin, self._process.stdout
        assert to is not None
        assert back is not None
        try:
            to.write(json.dumps(request).encode() + b"\n")
            to.flush()
            answer = json.loads(back.readline())
        except (OSError, ValueError) as error:  # a broken pipe, or an empty line at its end
            raise LlamaFailedError(f"the process ended with {self._process.wait()}") from error
        if "error" in answer:
            raise LlamaFailedError(answer["error"])
        return answer, back.read(answer["bytes"])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.kill()
        self._process.communicate()
