"""The runtimes that are compared, each behind the same few calls. Imports happen late: a process has one of them."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

Session = Any


class Stamps(Protocol):
    def start(self) -> None: ...

    def stamp(self) -> None: ...


class Engine(Protocol):
    """A loaded model."""

    @property
    def packages(self) -> tuple[str, ...]:
        """Those whose versions matter."""

    def __init__(self, model: Path, threads: int, options: Mapping[str, str]) -> None: ...

    def begin(self, tokens: Sequence[int], new: int, clock: Stamps, hold: bool) -> Session:
        """A new sequence: the prompt, and `new` tokens after it, the likeliest each; a stamp when each is known.

        Args:
            hold: whether `resume` will follow.
        """

    def resume(self, session: Session, new: int, clock: Stamps) -> None:
        """Go on with a sequence."""

    def end(self, session: Session) -> None:
        """Forget a sequence, and its cache."""


class Edgert:
    packages = ("edgert", "openvino")

    def __init__(self, model: Path, threads: int, options: Mapping[str, str]) -> None:
        import edgert

        self._model = edgert.load(model, device=options["device"])

    def begin(self, tokens: Sequence[int], new: int, clock: Stamps, hold: bool) -> Session:
        room = self._model.context_length - len(tokens) if hold else new
        session = self._model.stream(tokens, max_tokens=room, temperature=0.0)
        self.resume(session, new, clock)
        return session

    def resume(self, session: Session, new: int, clock: Stamps) -> None:
        for _ in range(new):
            next(session)
            clock.stamp()

    def end(self, session: Session) -> None:
        session.close()
        self._model.release()


class OpenVino:
    """A loop around `compile_model`, as someone writes it who has nothing else."""

    packages = ("openvino",)

    def __init__(self, model: Path, threads: int, options: Mapping[str, str]) -> None:
        import numpy as np
        import openvino as ov

        self._np, self._ov = np, ov
        core = ov.Core()
        read = core.read_model(model / "model.xml")
        _last_logits(read)
        self._compiled = core.compile_model(read, "CPU", {"INFERENCE_NUM_THREADS": threads, **options})
        self._names = [port.get_any_name() for port in self._compiled.inputs]
        self._idle = [self._compiled.create_infer_request()]

    def begin(self, tokens: Sequence[int], new: int, clock: Stamps, hold: bool) -> Session:
        session = {"request": self._idle.pop() if self._idle else self._compiled.create_infer_request(), "past": 0}
        session["request"].reset_state()
        clock.start()
        session["next"] = self._feed(session, tokens)
        clock.stamp()
        self.resume(session, new - 1, clock)
        return session

    def _feed(self, session: Session, tokens: Sequence[int]) -> int:
        np, past = self._np, session["past"]
        total = past + len(tokens)
        values = {
            "input_ids": np.array([tokens], np.int64),
            "attention_mask": np.ones((1, total), np.int64),
            "position_ids": np.arange(past, total, dtype=np.int64)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        for name in self._names:
            session["request"].set_tensor(name, self._ov.Tensor(values[name]))
        session["request"].infer(share_outputs=True)
        session["past"] = total
        return int(session["request"].get_output_tensor(0).data[0, -1].argmax())

    def resume(self, session: Session, new: int, clock: Stamps) -> None:
        for _ in range(new):
            session["next"] = self._feed(session, [session["next"]])
            clock.stamp()

    def end(self, session: Session) -> None:
        session["request"].reset_state()
        self._idle.append(session["request"])


def _last_logits(model: Any) -> None:
    """Let the head see the last token alone: every runtime with a loop of its own does so, and it is a few lines."""
    import openvino as ov
    import openvino.opset13 as ops

    head = model.get_results()[0].input_value(0).get_node()
    while head.get_type_name() != "MatMul":  # a conversion may follow it
        head = head.input_value(0).get_node()
    bounds = [ops.constant([value], ov.Type.i64) for value in (-1, sys.maxsize, 1, 1)]
    head.input(0).replace_source_output(ops.slice(head.input_value(0), *bounds).output(0))
    model.validate_nodes_and_infer_types()


class OpenVinoGenAi:
    packages = ("openvino-genai", "openvino")

    def __init__(self, model: Path, threads: int, options: Mapping[str, str]) -> None:
        import numpy as np
        import openvino as ov
        import openvino_genai as genai

        class Streamer(genai.StreamerBase):  # type: ignore[misc]
            def __init__(self, clock: Stamps) -> None:
                super().__init__()
                self._clock = clock

            def write(self, tokens: int | Sequence[int]) -> Any:
                for _ in tokens if isinstance(tokens, Sequence) else (tokens,):
                    self._clock.stamp()
                return genai.StreamingStatus.RUNNING

            def end(self) -> None:
                pass

        self._np, self._ov, self._genai, self._streamer = np, ov, genai, Streamer
        self._pipeline = genai.LLMPipeline(model, "CPU", INFERENCE_NUM_THREADS=threads, **options)

    def begin(self, tokens: Sequence[int], new: int, clock: Stamps, hold: bool) -> Session:
        prompt = self._ov.Tensor(self._np.array([tokens], self._np.int64))
        self.resume(prompt, new, clock)
        return prompt

    def resume(self, session: Session, new: int, clock: Stamps) -> None:
        # The same prompt again: the pipeline's cache of prompts has it, and its first token is not counted as decode.
        config = self._genai.GenerationConfig(max_new_tokens=new, ignore_eos=True, do_sample=False)
        self._pipeline.generate(session, config, self._streamer(clock))

    def end(self, session: Session) -> None:
        pass


class LlamaCpp:
    """The library's own calls with its own defaults (flash attention where it finds it good), and the likeliest token.

    A context for each sequence, as large as that needs: its cache is allocated whole, and the default size, the
    model's own context, would count gigabytes that nobody uses.
    """

    packages = ("llama-cpp-python",)

    def __init__(self, model: Path, threads: int, options: Mapping[str, str]) -> None:
        sys.path.insert(0, options["folder"])
        import llama_cpp
        import numpy as np

        self._np, self._llama, self._threads = np, llama_cpp, threads
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(str(model).encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp does not load {model.name}")
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))

    def begin(self, tokens: Sequence[int], new: int, clock: Stamps, hold: bool) -> Session:
        llama = self._llama
        params = llama.llama_context_default_params()
        params.n_ctx = -(-(len(tokens) + (512 if hold else new)) // 256) * 256
        params.n_threads = params.n_threads_batch = self._threads
        context = llama.llama_init_from_model(self._model, params)
        if not context:
            raise RuntimeError(f"llama.cpp makes no context of {params.n_ctx} tokens")
        session = {"context": context, "batch": params.n_batch}
        clock.start()
        session["next"] = self._feed(session, tokens)
        clock.stamp()
        self.resume(session, new - 1, clock)
        return session

    def _feed(self, session: Session, tokens: Sequence[int]) -> int:
        llama, context = self._llama, session["context"]
        for start in range(0, len(tokens), session["batch"]):
            part = tokens[start : start + session["batch"]]
            array = (llama.llama_token * len(part))(*part)
            if failed := llama.llama_decode(context, llama.llama_batch_get_one(array, len(part))):
                raise RuntimeError(f"llama_decode gave {failed}")
        logits = self._np.ctypeslib.as_array(llama.llama_get_logits_ith(context, -1), shape=(self._vocabulary,))
        return int(logits.argmax())

    def resume(self, session: Session, new: int, clock: Stamps) -> None:
        for _ in range(new):
            session["next"] = self._feed(session, [session["next"]])
            clock.stamp()

    def end(self, session: Session) -> None:
        self._llama.llama_free(session["context"])


class OnnxRuntimeGenAi:
    packages = ("onnxruntime-genai", "onnxruntime")

    def __init__(self, model: Path, threads: int, options: Mapping[str, str]) -> None:
        import json

        import numpy as np
        import onnxruntime_genai as genai

        self._np, self._genai = np, genai
        config = genai.Config(str(model))
        config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
        self._model = genai.Model(config)

    def begin(self, tokens: Sequence[int], new: int, clock: Stamps, hold: bool) -> Session:
        params = self._genai.GeneratorParams(self._model)
        # The cache is allocated for as many tokens.
        params.set_search_options(do_sample=False, max_length=len(tokens) + (512 if hold else new))
        session = self._genai.Generator(self._model, params)
        clock.start()
        session.append_tokens(self._np.array(tokens, self._np.int32))
        self.resume(session, new, clock)
        return session

    def resume(self, session: Session, new: int, clock: Stamps) -> None:
        for _ in range(new):
            session.generate_next_token()
            clock.stamp()

    def end(self, session: Session) -> None:
        pass


class Transformers:
    packages = ("transformers", "torch")

    def __init__(self, model: Path, threads: int, options: Mapping[str, str]) -> None:
        import torch
        from transformers import AutoModelForCausalLM, DynamicCache

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self._torch, self._cache = torch, DynamicCache
        self._model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()

    def begin(self, tokens: Sequence[int], new: int, clock: Stamps, hold: bool) -> Session:
        session = {"cache": self._cache(config=self._model.config)}
        clock.start()
        session["next"] = self._feed(session, tokens)
        clock.stamp()
        self.resume(session, new - 1, clock)
        return session

    def _feed(self, session: Session, tokens: Sequence[int]) -> int:
        ids = self._torch.tensor([tokens])
        found = self._model(ids, past_key_values=session["cache"], use_cache=True, logits_to_keep=1)
        return int(found.logits[0, -1].argmax())

    def resume(self, session: Session, new: int, clock: Stamps) -> None:
        for _ in range(new):
            session["next"] = self._feed(session, [session["next"]])
            clock.stamp()

    def end(self, session: Session) -> None:
        pass


ENGINES: dict[str, type[Engine]] = {
    "edgert": Edgert,
    "openvino": OpenVino,
    "openvino-genai": OpenVinoGenAi,
    "llama.cpp": LlamaCpp,
    "onnxruntime-genai": OnnxRuntimeGenAi,
    "transformers": Transformers,
}
