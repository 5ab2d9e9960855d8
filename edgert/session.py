"""Tokens in, tokens out: the API that apps embed.

`load` opens a bundle and gives a `Model`; its methods may be called from several threads at once. Each running
generation has a sequence of its own; idle ones keep their KV cache, and the next prompt takes the one whose tokens it
shares the longest beginning with, so a chat prefills only what is new.
"""

from __future__ import annotations

import operator
import os
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
from numpy.typing import NDArray

from edgert.asynchronous import from_thread, in_thread
from edgert.backends import info_of
from edgert.bundle import Bundle
from edgert.choice import as_config, choose_plan
from edgert.device import DeviceConfig
from edgert.engine import Engine
from edgert.errors import ContextOverflowError, EmptyPromptError, UsageError
from edgert.executor import DEVICE_TIMEOUT_S
from edgert.kvcache import KvCache
from edgert.placement import Plan
from edgert.prompts import Prompt, Prompts
from edgert.results import Clock, FinishReason, Piece, Provenance, Result, collect
from edgert.sampling import Sampler, Sampling, SamplingParams
from edgert.shapes import StaticShapes
from edgert.text import StreamDecoder, Tokenizer
from edgert.towers import Towers

if TYPE_CHECKING:
    from edgert.scheduler import Objective

DEFAULT_MAX_TOKENS = 256
MAX_TIMEOUT_S = 86400


class Model:
    """A loaded bundle. Made by `load`; may be used from several threads."""

    def __init__(self, bundle: Bundle, engine: Engine, towers: Towers, *, prefill_chunk: int) -> None:
        self.bundle = bundle
        self.facts = bundle.facts
        self.tokenizer = Tokenizer.open(bundle.tokenizer_path)
        self._engine = engine
        self._towers = towers
        self._prompts = Prompts(towers)
        self._chunk = prefill_chunk

    @property
    def plan(self) -> Plan:
        """Where the blocks run now: after the failure of a device this is not what was asked for."""
        plan, towers = self._engine.executor.plan, self._towers
        if not towers.moved:
            return plan
        return replace(plan, towers={**plan.towers, **towers.moved}, warnings=(*plan.warnings, *towers.warnings))

    @property
    def context_length(self) -> int:
        """The largest number of tokens, prompt and answer together: the model's, or what static shapes hold."""
        return self._engine.executor.context

    def generate(
        self, prompt: str | Sequence[int], *, cancel: threading.Event | None = None, **sampling: Unpack[Sampling]
    ) -> Result:
        """Continue a prompt.

        Args:
            prompt: text, or token ids.
            cancel: set from another thread, it ends the generation with `finish_reason` `cancelled`.
            sampling: see `SamplingParams`; `max_tokens` is 256, or what is left of the context, unless given.

        Raises:
            EmptyPromptError, ContextOverflowError, SamplingError: before any work.
            DeviceFailedError: a device failed.
        """
        return collect(self.stream(prompt, cancel=cancel, **sampling))

    def stream(
        self, prompt: str | Sequence[int], *, cancel: threading.Event | None = None, **sampling: Unpack[Sampling]
    ) -> Iterator[Piece]:
        """Like `generate`, a piece a token. Arguments are checked at once; closing the iterator cancels."""
        self._need("decoder", "generate")
        clock = Clock(self._provenance())
        tokens = self._tokens(prompt)
        params = self._check(tokens, sampling)
        decoder = StreamDecoder(self.tokenizer, params.stop, prompt=tokens)
        clock.checked()
        return self._run(Prompt.of(tokens), params, cancel, decoder, clock)

    def chat(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: list[dict[str, Any]] | None = None,
        cancel: threading.Event | None = None,
        **sampling: Unpack[Sampling],
    ) -> Result:
        """Answer a conversation, e.g. `[{"role": "user", "content": "Hi"}]`, in the model's own chat template.

        Where the model takes them, content may be a list of parts: `{"type": "text", "text": …}`,
        `{"type": "image", "image": …}` with a path, the bytes of a file, a PIL image or uint8 `[height, width, 3]`,
        `{"type": "audio", "audio": …}` with the path or the bytes of a WAV file or `(f32 [samples], rate)`, and
        OpenAI's `image_url` with a `data:` URL and `input_audio`. Other URLs are refused.

        Raises:
            UsageError: an image or a sound cannot be read, or the model takes none.
            ChatTemplateError: the model has no chat template, or it fails.
            Others as `generate`.
        """
        return collect(self.stream_chat(messages, tools=tools, cancel=cancel, **sampling))

    def stream_chat(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: list[dict[str, Any]] | None = None,
        cancel: threading.Event | None = None,
        **sampling: Unpack[Sampling],
    ) -> Iterator[Piece]:
        """Like `chat`, a piece a token."""
        self._need("decoder", "chat")
        clock = Clock(self._provenance())
        prompt = self._chat(messages, tools)
        params = self._check(prompt.ids, sampling)
        clock.checked()
        return self._run(prompt, params, cancel, StreamDecoder(self.tokenizer, params.stop), clock)

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Vectors for texts.

        Returns:
            f32 `[len(texts), hidden]`, of length 1 each, pooled as the model wants (mean or first token).

        Raises:
            UsageError: the model is no encoder, or `texts` is a single string.
            EmptyPromptError, ContextOverflowError: for a text without tokens, or with too many.
        """
        self._need("encoder", "embed")
        if isinstance(texts, str):
            raise UsageError("embed: texts is a string, expected a sequence of strings")
        prompts = [self.tokenizer.encode(text) for text in texts]
        for tokens in prompts:
            self._check_prompt(tokens, room=0)
        vectors = np.empty((len(prompts), self.facts.hidden_size), np.float32)
        run = self._engine.executor.open()
        for row, tokens in enumerate(prompts):
            states = run.forward(tokens, keep=len(tokens))
            run.tokens.clear()  # an encoder keeps nothing
            vector = states[0] if self.facts.pooling == "cls" else states.mean(axis=0)
            vectors[row] = vector / max(float(np.linalg.norm(vector)), 1e-12)
        return vectors

    async def agenerate(self, prompt: str | Sequence[int], **sampling: Unpack[Sampling]) -> Result:
        """`generate` for asyncio; cancelling the task cancels the generation."""
        return await in_thread(lambda cancel: self.generate(prompt, cancel=cancel, **sampling))

    async def achat(
        self, messages: list[dict[str, Any]], *, tools: list[dict[str, Any]] | None = None, **sampling: Unpack[Sampling]
    ) -> Result:
        """`chat` for asyncio; cancelling the task cancels the generation."""
        return await in_thread(lambda cancel: self.chat(messages, tools=tools, cancel=cancel, **sampling))

    async def aembed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """`embed` for asyncio."""
        import asyncio

        return await asyncio.to_thread(self.embed, texts)

    def astream(self, prompt: str | Sequence[int], **sampling: Unpack[Sampling]) -> AsyncIterator[Piece]:
        """`stream` for asyncio; leaving the loop, or cancelling the task, cancels the generation."""
        cancel = threading.Event()
        return from_thread(self.stream(prompt, cancel=cancel, **sampling), cancel)

    def astream_chat(
        self, messages: list[dict[str, Any]], *, tools: list[dict[str, Any]] | None = None, **sampling: Unpack[Sampling]
    ) -> AsyncIterator[Piece]:
        """`stream_chat` for asyncio, as `astream`."""
        cancel = threading.Event()
        return from_thread(self.stream_chat(messages, tools=tools, cancel=cancel, **sampling), cancel)

    def release(self) -> None:
        """Give back the memory of the KV caches that nobody uses; the next prompts prefill from the start."""
        self._engine.clear()

    def export_cache(self, prompt: str | Sequence[int] | list[dict[str, Any]]) -> KvCache:
        """The keys and values of a prompt, or of a conversation, to park it: in a file, or in memory while the model is
        unloaded.

        What is not in a cache yet is prefilled. `import_cache` takes it up again, on whatever device.

        Raises:
            UsageError: the model is recurrent.
        """
        self._need("decoder", "export_cache")
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], dict):
            asked = self._chat(prompt, None)
        else:
            asked = Prompt.of(self._tokens(prompt))  # type: ignore[arg-type]
        self._check_prompt(asked.ids, room=0)
        return self._engine.export(asked.tokens, asked.media)

    def import_cache(self, cache: KvCache) -> None:
        """Keep a cache that `export_cache` gave; the next prompt that begins with its tokens goes on from it.

        Raises:
            UsageError: it belongs to another model, is longer than the context, or the model is recurrent.
            BundleError: it is damaged.
        """
        self._need("decoder", "import_cache")
        self._engine.adopt(cache)

    def score(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Logits `[len(tokens), vocab]` for every position of a token sequence, f32; for parity and quality checks."""
        self._need("decoder", "score")
        tokens = self._tokens(tokens)
        self._check_prompt(tokens, room=0)
        run = self._engine.executor.open()
        size = min(self._chunk, run.executor.max_chunk)
        chunks = [tokens[i : i + size] for i in range(0, len(tokens), size)]
        return np.concatenate([run.forward(chunk, keep=len(chunk)).astype(np.float32) for chunk in chunks])

    def _chat(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> Prompt:
        plain, media = self._prompts.split(messages)
        return self._prompts.expand(self.tokenizer.encode_chat(plain, tools=tools), media)

    def _provenance(self) -> Provenance:
        return "emulated" if self._engine.executor.emulated else "measured"

    def _tokens(self, prompt: str | Sequence[int]) -> list[int]:
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        try:
            if isinstance(prompt, bytes):
                raise TypeError("bytes are neither text nor tokens")
            return [operator.index(token) for token in prompt]
        except TypeError as error:
            raise UsageError(f"prompt: expected text or a sequence of token ids: {error}") from error

    def _need(self, task: str, method: str) -> None:
        if self.facts.task != task:
            raise UsageError(f"{method}: model {self.facts.name!r} is of task {self.facts.task!r}, expected {task!r}")

    def _check_prompt(self, tokens: list[int], *, room: int) -> None:
        limit = self.context_length
        if not tokens:
            raise EmptyPromptError("prompt: holds no token, expected at least 1")
        if len(tokens) + room > limit:
            wanted = f"{len(tokens)} prompt tokens" + (f" and {room} to generate" if room else "")
            raise ContextOverflowError(
                f"prompt: {wanted}, the context holds {limit}", tokens=len(tokens) + room, limit=limit
            )
        wrong = next((t for t in tokens if not 0 <= t < self.facts.vocab_size), None)
        if wrong is not None:
            raise UsageError(f"prompt: token {wrong} is outside the vocabulary of {self.facts.vocab_size}")

    def _check(self, tokens: list[int], sampling: Sampling) -> SamplingParams:
        options: dict[str, Any] = dict(sampling)
        asked = options.get("max_tokens")
        left = max(1, self.context_length - len(tokens))
        params = SamplingParams(**{**options, "max_tokens": min(DEFAULT_MAX_TOKENS, left) if asked is None else asked})
        self._check_prompt(tokens, room=params.max_tokens)
        return params

    def _run(
        self,
        prompt: Prompt,
        params: SamplingParams,
        cancel: threading.Event | None,
        decoder: StreamDecoder,
        clock: Clock,
    ) -> Iterator[Piece]:
        cancel = cancel or threading.Event()
        clock.resume()
        run = self._engine.take(prompt.tokens, prompt.media)
        clock.prompt_tokens, clock.reused = len(prompt.tokens), run.past
        sampler = Sampler(params, prompt_tokens=len(prompt.tokens))
        history = list(prompt.tokens)
        ids = list(prompt.ids) if prompt.media else history  # what the sampler looks at
        healthy = False  # a sequence that a device failed on, or that was left in the middle, is not used again
        try:
            run, logits = self._engine.advance(run, history, clock, cancel)
            clock.events += [event for medium in prompt.media.values() for event in medium.events]
            reason: FinishReason | None = "cancelled" if logits is None or cancel.is_set() else None
            while reason is None:
                assert logits is not None
                sampled = sampler.sample(logits[0], ids)
                token = sampled.token
                history.append(token)
                if ids is not history:
                    ids.append(token)
                clock.new_tokens += 1
                ended = token in self.facts.eos_token_ids
                text = "" if ended else decoder.push(token)
                if ended or decoder.finished:
                    reason = "stop"
                elif clock.new_tokens == params.max_tokens:
                    reason = "length"
                elif cancel.is_set():
                    reason = "cancelled"
                if reason is not None and not decoder.finished:
                    text += decoder.flush()
                healthy = True
                yield Piece(text, token, sampled.logprob, sampled.top, clock.pause(), reason, clock.news())
                healthy = False
                clock.resume()
                if reason is None:
                    run, logits = self._engine.advance(run, history, clock)
            healthy = True
            if not clock.new_tokens:
                yield Piece("", None, None, (), clock.pause(), reason, clock.news())
        finally:
            if healthy and run.tokens:
                self._engine.give_back(run)


def load(
    path: str | os.PathLike[str],
    *,
    plan: Plan | str | os.PathLike[str] | None = None,
    device: str | DeviceConfig | None = None,
    place: str | None = None,
    objective: Objective | None = None,
    prefill_chunk: int = 512,
    max_idle: int = 4,
    fallback: str | DeviceConfig | None = "CPU",
    static_shapes: StaticShapes | None = None,
    device_timeout_s: float = DEVICE_TIMEOUT_S,
    verify: bool = False,
) -> Model:
    """Load a bundle.

    Args:
        path: a bundle (`*.edge`).
        plan: a `Plan`, or a JSON file that holds one.
        device: everything on this device configuration, e.g. `CPU@f32`; `CPU` (or `ORT` for an ONNX bundle) is the
            default.
        place: an explicit placement, e.g. `attention=CPU@bf16,ffn=CPU@f32`; see `Plan.explicit`.
        objective: `tokens_per_joule`, `latency` or `throughput`: the best plan for it by what `edgert profile` measured
            on this machine.
        prefill_chunk: tokens of a prompt that are prefilled in one go, at least 1.
        max_idle: sequences that keep their KV cache when nobody runs them; see also `Model.release`.
        fallback: the configuration that takes over when a GPU or NPU fails, hangs or gives NaN while text is generated;
            the event is in the result and in the log. None lets the error through.
        static_shapes: chunks and buckets for devices with static shapes (NPU); the default is `StaticShapes()`.
        device_timeout_s: seconds that a call into a GPU or NPU may take before it counts as hung; its first call may
            take ten times as long, as it may compile kernels.
        verify: compare every file with its hash first.

    Raises:
        BundleError, PlanError, DeviceError: the bundle, plan or device cannot be used; or, for an objective, this
            machine has no profile, or one that is stale or lacks what the objective needs.
        UsageError: more than one of `plan`, `device`, `place` and `objective`, a number below its limit, or a bundle
            that makes no text (see `load_denoiser`).
    """
    for name, value, least in (("prefill_chunk", prefill_chunk, 1), ("max_idle", max_idle, 0)):
        if not isinstance(value, int) or value < least:
            raise UsageError(f"{name} is {value!r}, expected a whole number from {least}")
    bundle = Bundle.open(Path(path), verify=verify)
    bundle.require_text()
    chosen = choose_plan(bundle, plan=plan, device=device, place=place, objective=objective, shapes=static_shapes)
    if not isinstance(device_timeout_s, (int, float)) or not 0 < device_timeout_s <= MAX_TIMEOUT_S:
        raise UsageError(
            f"device_timeout_s is {device_timeout_s!r}, expected a number above 0, at most {MAX_TIMEOUT_S}"
        )
    takes_over = as_config(fallback)
    if takes_over is not None and bundle.facts.format == "openvino":
        info_of(takes_over)  # now, and not when a device has failed
    engine = Engine(
        bundle,
        chosen,
        chunk=prefill_chunk,
        max_idle=max_idle,
        fallback=takes_over,
        shapes=static_shapes,
        timeout_s=device_timeout_s,
    )
    width = engine.executor.taken.width
    towers = Towers(bundle, lambda: engine.executor.plan, fallback=takes_over, timeout_s=device_timeout_s, width=width)
    return Model(bundle, engine, towers, prefill_chunk=prefill_chunk)
