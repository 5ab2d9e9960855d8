"""The API that apps embed, on the repository's own model."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgert
from edgert.backends.simulated import Fault, SimulatedBackend
from edgert.errors import (
    ContextOverflowError,
    DeviceFailedError,
    EmptyPromptError,
    PlanError,
    SamplingError,
    UnknownDeviceError,
    UsageError,
)
from edgert.executor import SequenceRun
from edgert.placement import Plan
from edgert.session import Model

PROMPT = "It was a dark night, and the old man"


def test_greedy_text_is_the_models_own(demo: Model) -> None:
    """Token by token the same as the arg-max of all logits computed in one go."""
    result = demo.generate(PROMPT, max_tokens=24)
    prompt = demo.tokenizer.encode(PROMPT)
    tokens = [*prompt, *result.tokens]
    chosen = demo.score(tokens)[len(prompt) - 1 : -1].argmax(axis=1)
    assert list(chosen) == list(result.tokens)
    assert result.text == demo.tokenizer.decode(result.tokens)


def test_stream_is_generate_in_pieces(demo: Model) -> None:
    pieces = list(demo.stream(PROMPT, max_tokens=16))
    result = demo.generate(PROMPT, max_tokens=16)
    assert "".join(p.text for p in pieces) == result.text
    assert [p.token for p in pieces] == list(result.tokens)
    assert [p.finish_reason for p in pieces] == [None] * 15 + ["length"]
    assert [p.timings.new_tokens for p in pieces] == list(range(1, 17))


def test_timings_add_up(demo: Model) -> None:
    timings = demo.generate(PROMPT, max_tokens=8).timings
    assert timings.provenance == "measured"
    assert timings.prompt_tokens == len(demo.tokenizer.encode(PROMPT))
    assert timings.new_tokens == 8
    assert timings.prefill_us > 0
    assert timings.decode_us > 0
    assert timings.host_us > 0
    assert timings.tpot_us == pytest.approx(timings.decode_us / 7)
    assert timings.ttft_us >= timings.prefill_us


def test_long_prompts_are_prefilled_in_chunks(demo_path: Path, demo: Model) -> None:
    chunked = edgert.load(demo_path, device="CPU@f32", prefill_chunk=7)
    long = PROMPT * 6
    assert chunked.generate(long, max_tokens=8).tokens == demo.generate(long, max_tokens=8).tokens
    tokens = demo.tokenizer.encode(long)
    np.testing.assert_allclose(chunked.score(tokens), demo.score(tokens), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("place", ["attention=CPU@f32,ffn=SIM@f32", "attention=SIM@f32,*=CPU@f32,0-2=SIM@f32"])
def test_placements_write_the_same_text(demo_path: Path, demo: Model, place: str) -> None:
    placed = edgert.load(demo_path, place=place)
    assert len(placed.plan.placements) > 1
    assert placed.generate(PROMPT, max_tokens=16).tokens == demo.generate(PROMPT, max_tokens=16).tokens


def test_mixed_precision_placement(demo_path: Path, demo: Model) -> None:
    model = edgert.load(demo_path, place="attention=SIM@f16,ffn=CPU@f32")
    tokens = demo.tokenizer.encode(PROMPT)
    expected = demo.score(tokens)
    assert np.abs(model.score(tokens) - expected).max() <= 2e-2 * np.abs(expected).max()


def test_emulated_devices_report_no_speed(demo_path: Path) -> None:
    timings = edgert.load(demo_path, place="ffn=SIM@f32,attention=CPU@f32").generate(PROMPT, max_tokens=4).timings
    assert timings.provenance == "emulated"
    assert timings.tpot_us is None
    assert timings.tokens_per_second is None


def test_the_common_prefix_is_reused(demo_path: Path) -> None:
    model = edgert.load(demo_path, device="CPU@f32")
    prompt = model.tokenizer.encode(PROMPT)
    first = model.generate(prompt, max_tokens=8)
    assert first.timings.reused_tokens == 0
    model.generate(prompt, max_tokens=30)
    again = model.generate(prompt, max_tokens=8)  # cut back into the prompt
    assert again.timings.reused_tokens == len(prompt) - 1
    assert again.tokens == first.tokens
    longer = [*prompt, *first.tokens, 300, 301]  # continued from its end; the last token was never run
    reused = model.generate(longer, max_tokens=8)
    assert reused.timings.reused_tokens == len(prompt) + 7
    assert reused.tokens == edgert.load(demo_path, device="CPU@f32").generate(longer, max_tokens=8).tokens


def test_the_prefix_survives_a_cut_model(demo_path: Path) -> None:
    model = edgert.load(demo_path, place="attention=CPU@f32,ffn=SIM@f32")
    first = model.generate(PROMPT, max_tokens=8)
    again = model.generate(PROMPT, max_tokens=8)
    assert again.timings.reused_tokens > 0
    assert again.tokens == first.tokens


def test_another_conversation_leaves_the_cache_alone(demo_path: Path) -> None:
    model = edgert.load(demo_path, device="CPU@f32", max_idle=2)
    model.generate(PROMPT, max_tokens=4)
    assert model.generate("Something else entirely", max_tokens=4).timings.reused_tokens == 0
    assert model.generate(PROMPT, max_tokens=4).timings.reused_tokens > 0


def test_chat_turns_reuse_the_cache(demo: Model) -> None:
    messages = [{"role": "user", "content": "Good evening, sir. Where have you been?"}]
    answer = demo.chat(messages, max_tokens=16)
    assert answer.tokens
    messages += [{"role": "assistant", "content": answer.text}, {"role": "user", "content": "Why?"}]
    assert demo.chat(messages, max_tokens=4).timings.reused_tokens >= 8
    assert "<|im_" not in answer.text


def test_several_threads(demo: Model) -> None:
    prompts = [f"Chapter {i}. The {noun}" for i, noun in enumerate(("sea", "house", "king", "dog"))]
    alone = [demo.generate(p, max_tokens=12).tokens for p in prompts]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda p: demo.generate(p, max_tokens=12).tokens, prompts * 3))
    assert together == alone * 3


def test_seeded_sampling_is_repeatable(demo: Model) -> None:
    options = {"max_tokens": 20, "temperature": 1.0, "top_p": 0.95}
    texts = [demo.generate(PROMPT, seed=seed, **options).text for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_stop_strings(demo: Model) -> None:
    text = demo.generate(PROMPT, max_tokens=32).text
    stop = text[5:9]
    result = demo.generate(PROMPT, max_tokens=32, stop=[stop])
    assert result.finish_reason == "stop"
    assert result.text == text[: text.index(stop)]


def test_logprobs(demo: Model) -> None:
    pieces = list(demo.stream(PROMPT, max_tokens=4, logprobs=3))
    prompt = demo.tokenizer.encode(PROMPT)
    rows = demo.score([*prompt, *(p.token for p in pieces if p.token is not None)])[len(prompt) - 1 : -1]
    for piece, row in zip(pieces, rows.astype(np.float64), strict=True):
        expected = row - row.max() - np.log(np.exp(row - row.max()).sum())
        assert piece.logprob == pytest.approx(expected[piece.token], abs=1e-3)
        assert piece.top[0][0] == piece.token
        assert len(piece.top) == 3


def test_cancel_from_another_thread(demo: Model) -> None:
    cancel = threading.Event()
    pieces = demo.stream(PROMPT, max_tokens=64, cancel=cancel)
    seen = [next(pieces), next(pieces)]
    cancel.set()
    seen += list(pieces)
    assert len(seen) <= 4
    assert seen[-1].finish_reason == "cancelled"


def test_cancel_before_the_first_token(demo: Model) -> None:
    cancel = threading.Event()
    cancel.set()
    result = demo.generate(PROMPT, cancel=cancel)
    assert (result.finish_reason, result.tokens, result.text) == ("cancelled", (), "")


def test_a_stream_left_early_leaves_the_model_usable(demo: Model) -> None:
    expected = demo.generate(PROMPT, max_tokens=12).tokens
    stream = demo.stream(PROMPT, max_tokens=12)
    next(stream)
    stream.close()
    assert demo.generate(PROMPT, max_tokens=12).tokens == expected


def test_async_twins(demo: Model) -> None:
    async def work() -> None:
        expected = demo.generate(PROMPT, max_tokens=8)
        both = await asyncio.gather(*(demo.agenerate(PROMPT, max_tokens=8) for _ in range(2)))
        assert [r.tokens for r in both] == [expected.tokens] * 2
        assert "".join([p.text async for p in demo.astream(PROMPT, max_tokens=8)]) == expected.text
        messages = [{"role": "user", "content": "Hello"}]
        answer = await demo.achat(messages, max_tokens=4)
        assert [p.token async for p in demo.astream_chat(messages, max_tokens=4)] == list(answer.tokens)
        with pytest.raises(SamplingError):
            demo.astream(PROMPT, top_p=7)

    asyncio.run(work())


def test_a_cancelled_task_ends_its_generation(demo: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []
    forward = SequenceRun.forward

    async def work() -> None:
        started = asyncio.Event()
        loop = asyncio.get_running_loop()

        def counted(self: SequenceRun, tokens: list[int], *, keep: int = 1) -> np.ndarray:
            steps.append(len(tokens))
            loop.call_soon_threadsafe(started.set)
            return forward(self, tokens, keep=keep)

        monkeypatch.setattr(SequenceRun, "forward", counted)
        task = asyncio.create_task(demo.agenerate([5] * 20, max_tokens=1000))
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(work())
    assert len(steps) < 500  # it would have gone on to the end of the context


def test_a_failing_device_is_an_error_and_the_model_lives_on(
    demo_path: Path, demo: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = SimulatedBackend(Fault(5))
    monkeypatch.setattr("edgert.backends._load", lambda module, load=edgert.backends._load: (
        backend if module == "simulated" else load(module)
    ))  # fmt: skip
    model = edgert.load(demo_path, place="ffn=SIM@f32,attention=CPU@f32", fallback=None)
    with pytest.raises(DeviceFailedError, match="SIM@f32 failed"):
        model.generate(PROMPT, max_tokens=8)
    assert model.generate(PROMPT, max_tokens=3).tokens == demo.generate(PROMPT, max_tokens=3).tokens


@pytest.mark.parametrize("prompt", ["", []])
def test_empty_prompt(demo: Model, prompt: str | list[int]) -> None:
    with pytest.raises(EmptyPromptError):
        demo.stream(prompt)


def test_context_overflow_is_told_before_any_work(demo: Model) -> None:
    limit = demo.facts.context_length
    with pytest.raises(ContextOverflowError, match=f"the context holds {limit}") as caught:
        demo.stream([5] * limit)
    assert (caught.value.tokens, caught.value.limit) == (limit + 1, limit)
    with pytest.raises(ContextOverflowError, match="100 prompt tokens and 1000 to generate"):
        demo.stream([5] * 100, max_tokens=1000)


def test_the_last_place_of_the_context_can_be_used(demo: Model) -> None:
    result = demo.generate([5] * (demo.facts.context_length - 2))
    assert len(result.tokens) <= 2


@pytest.mark.parametrize("prompt", [None, 5, ["a"], [1.5], ["12"], b"abc", [[1, 2]], [None]])
def test_prompts_that_are_neither_text_nor_tokens(demo: Model, prompt: object) -> None:
    with pytest.raises(UsageError, match="prompt: expected text or a sequence of token ids"):
        demo.stream(prompt)  # type: ignore[arg-type]


def test_numpy_tokens_are_tokens(demo: Model) -> None:
    assert demo.generate(np.array([5, 6, 7]), max_tokens=3).tokens == demo.generate([5, 6, 7], max_tokens=3).tokens


def test_released_caches_are_gone(demo_path: Path) -> None:
    model = edgert.load(demo_path, device="CPU@f32")
    model.generate(PROMPT, max_tokens=2)
    model.release()
    assert model.generate(PROMPT, max_tokens=2).timings.reused_tokens == 0


def test_a_cancelled_prefill_keeps_no_empty_cache(demo_path: Path) -> None:
    model = edgert.load(demo_path, device="CPU@f32", max_idle=1)
    model.generate(PROMPT, max_tokens=2)
    cancel = threading.Event()
    cancel.set()
    model.generate("Something else entirely", cancel=cancel)
    assert all(run.tokens for run in model._engine._idle)


def test_time_to_first_token_counts_from_the_call(demo: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 10**15, 10**9))  # a second passes at every look
    monkeypatch.setattr("edgert.results.time.perf_counter_ns", lambda: next(clock))
    pieces = demo.stream(PROMPT, max_tokens=1)
    assert next(pieces).timings.ttft_us >= 2e6  # one look before the text was encoded, one after


def test_only_the_last_logits_are_computed(demo: Model) -> None:
    run = demo._engine.executor.open()
    prompt = demo.tokenizer.encode(PROMPT)
    assert run.forward(prompt).shape == (1, demo.facts.vocab_size)
    assert run._home.runners[-1]._request.get_output_tensor(0).shape == [1, 1, demo.facts.vocab_size]


@pytest.mark.parametrize("token", [-1, 4096, 2**40])
def test_tokens_outside_the_vocabulary(demo: Model, token: int) -> None:
    with pytest.raises(UsageError, match=f"token {token} is outside the vocabulary of 4096"):
        demo.stream([1, token])


@pytest.mark.parametrize("options", [{"temperature": -1}, {"top_p": 0}, {"max_tokens": 0}, {"stop": "x"}])
def test_sampling_out_of_range(demo: Model, options: dict) -> None:
    with pytest.raises(SamplingError):
        demo.stream(PROMPT, **options)


def test_a_decoder_embeds_nothing(demo: Model) -> None:
    with pytest.raises(UsageError, match="expected 'encoder'"):
        demo.embed(["a"])


@pytest.mark.parametrize("device", ["CPU@f8", "GPU.7@f16", "NPU", "ORT"])
def test_unavailable_devices(demo_path: Path, device: str) -> None:
    with pytest.raises((UnknownDeviceError, PlanError)):
        edgert.load(demo_path, device=device)


def test_options_that_exclude_each_other(demo_path: Path) -> None:
    with pytest.raises(UsageError, match="exclude each other"):
        edgert.load(demo_path, device="CPU", place="ffn=CPU")
    with pytest.raises(UsageError, match="prefill_chunk is 0"):
        edgert.load(demo_path, prefill_chunk=0)


def test_a_plan_for_another_model(demo_path: Path, demo: Model) -> None:
    config = demo.plan.placements[0].config
    with pytest.raises(PlanError, match="the model has 10"):
        edgert.load(demo_path, plan=Plan.from_configs([config] * 4, "too short"))


def test_as_many_idle_sequences_as_asked_for(demo_path: Path) -> None:
    model = edgert.load(demo_path, device="CPU@f32", max_idle=4)
    prompts = [[100 * i + j for j in range(1, 9)] for i in range(1, 7)]
    kept = []
    for prompt in prompts:
        model.generate(prompt, max_tokens=1)
        kept.append(len(model._engine._idle))
    assert kept == [1, 2, 3, 4, 4, 4]
    assert model.generate(prompts[3], max_tokens=1).timings.reused_tokens == 7


def test_a_short_prompt_leaves_a_long_cache_alone(demo_path: Path) -> None:
    model = edgert.load(demo_path, device="CPU@f32")
    long = list(range(1, 40))
    model.generate(long, max_tokens=1)
    model.generate([1], max_tokens=1)
    model.generate([1, 500], max_tokens=1)
    assert model.generate(long, max_tokens=1).timings.reused_tokens == 38


@pytest.mark.parametrize("seconds", [0, -1, float("inf"), float("nan"), 1e9, "60"])
def test_bad_timeouts(demo_path: Path, seconds: Any) -> None:
    with pytest.raises(UsageError, match="device_timeout_s is"):
        edgert.load(demo_path, device_timeout_s=seconds)


def test_the_fallback_must_be_there(demo_path: Path) -> None:
    with pytest.raises(UnknownDeviceError, match="NPU"):
        edgert.load(demo_path, fallback="NPU")
