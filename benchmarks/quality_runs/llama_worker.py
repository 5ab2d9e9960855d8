"""llama.cpp in a process and an environment of its own. Started by `llama.py`.

    python llama_worker.py FOLDER       FOLDER: where llama-cpp-python is

A request is a line of JSON on standard input. An answer on standard output is a line of JSON, after which as many
bytes follow as its field "bytes" says:

    {"do": "quantize", "source": "f32.gguf", "target": "q4_k_m.gguf"}       {"bytes": 0}
    {"do": "load", "model": "q4_k_m.gguf", "context": 512, "threads": 2}    {"vocabulary": 4096, "bytes": 0}
    {"do": "logits", "tokens": [1, …]}                                      f32 [tokens, vocabulary]

An answer with "error" ends nothing; end of input ends the process.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

sys.path.insert(0, sys.argv[1])
import llama_cpp as llama
import numpy as np


class Worker:
    """One model at a time; each sequence starts from an empty cache."""

    def __init__(self) -> None:
        llama.llama_backend_init()
        self._context: Any = None
        self._model: Any = None
        self._vocabulary = self._window = 0

    def answer(self, request: Mapping[str, Any]) -> tuple[dict[str, Any], bytes]:
        match request["do"]:
            case "quantize":
                self._quantize(request["source"], request["target"])
                return {}, b""
            case "load":
                self._load(request["model"], request["context"], request["threads"])
                return {"vocabulary": self._vocabulary}, b""
            case "logits":
                return {}, self._logits(request["tokens"])
            case other:
                raise ValueError(f"request {other!r} is not known")

    def _quantize(self, source: str, target: str) -> None:
        params = llama.llama_model_quantize_default_params()
        params.ftype = llama.LLAMA_FTYPE_MOSTLY_Q4_K_M
        if failed := llama.llama_model_quantize(source.encode(), target.encode(), params):
            raise RuntimeError(f"llama_model_quantize gave {failed} for {source}")

    def _load(self, model: str, context: int, threads: int) -> None:
        if self._context:
            llama.llama_free(self._context)
            llama.llama_model_free(self._model)
        self._context, self._window = None, context
        self._model = llama.llama_model_load_from_file(model.encode(), llama.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp does not load {model}")
        self._vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self._model))
        params = llama.llama_context_default_params()
        params.n_ctx = params.n_batch = context
        params.n_threads = params.n_threads_batch = threads
        self._context = llama.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError(f"llama.cpp makes no context of {context} tokens")

    def _logits(self, tokens: Sequence[int]) -> bytes:
        if not 0 < len(tokens) <= self._window:
            raise ValueError(f"{len(tokens)} tokens, the context has {self._window}")
        llama.llama_memory_clear(llama.llama_get_memory(self._context), True)
        batch = llama.llama_batch_init(len(tokens), 0, 1)
        try:
            batch.n_tokens = len(tokens)
            for index, token in enumerate(tokens):
                batch.token[index], batch.pos[index], batch.logits[index] = token, index, 1
                batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
            if failed := llama.llama_decode(self._context, batch):
                raise RuntimeError(f"llama_decode gave {failed}")
        finally:
            llama.llama_batch_free(batch)
        shape = (len(tokens), self._vocabulary)
        return np.ctypeslib.as_array(llama.llama_get_logits(self._context), shape=shape).astype(np.float32).tobytes()


def main() -> None:
    # The library prints what it likes; only answers may get to the other side.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    worker = Worker()
    for line in sys.stdin:
        try:
            found, data = worker.answer(json.loads(line))
        except Exception as error:  # the other side reports it
            found, data = {"error": f"{type(error).__name__}: {error}"}, b""
        answers.write(json.dumps({**found, "bytes": len(data)}).encode() + b"\n" + data)
        answers.flush()


if __name__ == "__main__":
    main()
