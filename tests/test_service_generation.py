"""One request without a device: logits come from a script, or from a hash of what was before."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from edgert.errors import (
    ChatTemplateError,
    ContextOverflowError,
    DeviceFailedError,
    EdgertError,
    EmptyPromptError,
    SamplingError,
    UsageError,
)
from edgert.service.protocol import Embed, Piece, Start, Vectors, encode
from edgert.service.worker import embedding
from edgert.service.worker.generation import Generation, Language, Thoughts
from edgert.service.worker.grammar import Grammars
from edgert.text import Tokenizer

TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>{% endfor %}<|start|>assistant\n"
    "{% if mode == 'open' %}<think>\n{% elif mode == 'closed' %}<think>\n\n</think>\n\n{% endif %}"
)
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "sea": {"enum": ["calm", "rough"]}},
    "required": ["name", "sea"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> Language:
    """Every byte is a token; a template with blocks of thoughts."""
    folder = tmp_path_factory.mktemp("tokenizer")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|start|>", "<|end|>"])
    backend.add_tokens(["<think>", "</think>"])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|end|>"}', "utf-8")
    (folder / "chat_template.jinja").write_text(TEMPLATE, "utf-8")
    tokenizer = Tokenizer.open(folder)
    end = tokenizer.token_id("<|end|>")
    assert end is not None
    vocab = tokenizer.vocab_size + 4  # as models that pad their logits
    return Language(
        tokenizer, Grammars(folder, vocab, [end]), Thoughts.of(tokenizer), frozenset({end}), vocab, 400, 300
    )  # fmt: skip


def start(text: str = "Hi", *, mode: str | None = None, **options: Any) -> Start:
    """A chat in which the template opens a block of thoughts, closes one, or writes none."""
    messages = [{"role": "user", "content": text}]
    template = {} if mode is None else {"mode": mode}
    return Start(1, messages=messages, template=template, **options)


def scripted(language: Language, generation: Generation, text: str) -> list[Piece]:
    """Feed what makes each token of a text the likeliest, until the generation ends."""
    pieces = []
    for token in language.tokenizer.encode(text, special=False):
        logits = np.zeros(language.vocab_size, np.float32)
        logits[token] = 9
        pieces.append(generation.feed(logits))
        if pieces[-1].finish_reason:
            break
    return pieces


def logits_of(tokens: Sequence[int], vocab: int) -> np.ndarray:
    """Of a model: a function of the tokens before."""
    random = np.random.default_rng(zlib.crc32(np.array(tokens).tobytes()))
    return random.standard_normal(vocab).astype(np.float32) * 3


def finish(generation: Generation, vocab: int) -> list[Piece]:
    pieces = []
    while generation.finish_reason is None:
        pieces.append(generation.feed(logits_of(generation.tokens, vocab)))
    return pieces


def texts(pieces: Sequence[Piece]) -> tuple[str, str]:
    """Thoughts and answer."""
    return tuple("".join(p.text for p in pieces if p.reasoning is kind) for kind in (True, False))  # type: ignore


# Thoughts


def test_thoughts_are_told_from_the_answer(language: Language) -> None:
    generation = Generation(start(mode="open"), language)
    pieces = scripted(language, generation, "\nI am 日.\n</think>\n\nYes.<|end|>")
    assert texts(pieces) == ("I am 日.\n", "Yes.")
    assert pieces[-1].finish_reason == "stop"
    assert pieces[-1].reasoning_tokens == len(language.tokenizer.encode("\nI am 日.\n", special=False))


@pytest.mark.parametrize(
    ("mode", "text", "expected"),
    [
        (None, "<think>\nWell</think>Yes", ("Well", "Yes")),  # the model opens the block itself
        (None, "No <think>well</think>", ("", "No <think>well</think>")),  # too late for one
        ("closed", "<think>Yes", ("", "<think>Yes")),
        ("open", "Well<|end|>", ("Well", "")),  # it ends while it thinks
    ],
)
def test_where_thoughts_begin(language: Language, mode: str | None, text: str, expected: tuple[str, str]) -> None:
    generation = Generation(start(mode=mode), language)
    pieces = scripted(language, generation, text)
    if generation.finish_reason is None:
        pieces.append(generation.cancel())
    assert texts(pieces) == expected


def test_what_people_write_opens_no_block(language: Language) -> None:
    generation = Generation(start("what is <think>"), language)
    assert texts(scripted(language, generation, "Hm")) == ("", "Hm")
    plain = Generation(Start(1, prompt="<think>"), language)
    assert texts(scripted(language, plain, "Hm")) == ("", "Hm")


@pytest.mark.parametrize("budget", [0, 1, 5])
def test_a_budget_closes_the_thoughts(language: Language, budget: int) -> None:
    generation = Generation(start(mode="open", reasoning_budget=budget), language)
    pieces = scripted(language, generation, "x" * (budget + 1) + "Yes")
    assert texts(pieces) == ("x" * budget, "Yes")
    assert pieces[budget].token == language.tokenizer.token_id("</think>")
    assert pieces[-1].reasoning_tokens == budget


def test_stop_strings_are_of_the_answer(language: Language) -> None:
    generation = Generation(start(mode="open", sampling={"stop": ["stop"]}), language)
    pieces = scripted(language, generation, "I stop now</think>Yes stop no")
    assert texts(pieces) == ("I stop now", "Yes ")
    assert pieces[-1].finish_reason == "stop"


def test_a_grammar_begins_after_the_thoughts(language: Language) -> None:
    generation = Generation(start(mode="open", constraint="choice", constraint_value=["no", "yes"]), language)
    pieces = scripted(language, generation, "Well, </think>")
    pieces += finish(generation, language.vocab_size)
    assert texts(pieces)[0] == "Well, "
    assert texts(pieces)[1] in ("no", "yes")


def test_a_model_may_think_before_a_grammar(language: Language) -> None:
    asked = start(constraint="choice", constraint_value=["no", "yes"])
    pieces = scripted(language, generation := Generation(asked, language), "<think>Hm</think>")
    assert texts([*pieces, *finish(generation, language.vocab_size)])[1] in ("no", "yes")
    closed = start(mode="closed", constraint="choice", constraint_value=["no", "yes"])
    assert scripted(language, Generation(closed, language), "<think>")[0].text in ("n", "y")


# Grammars


@pytest.mark.parametrize("seed", range(3))
def test_a_schema_is_followed(language: Language, seed: int) -> None:
    sampling = {"temperature": 1.0, "seed": seed}
    generation = Generation(start(sampling=sampling, constraint="json_schema", constraint_value=SCHEMA), language)
    pieces = finish(generation, language.vocab_size)
    assert pieces[-1].finish_reason == "stop"
    found = json.loads(texts(pieces)[1])
    assert len(found["name"]) <= 6
    assert found["sea"] in ("calm", "rough")


@given(
    st.lists(
        st.text(st.characters(exclude_categories=["Cs", "Cc"], include_characters="\n\t"), min_size=1),
        min_size=1,
        max_size=4,
    )
)
@settings(max_examples=40, deadline=None)
def test_a_choice_is_one_of_the_texts(language: Language, choices: list[str]) -> None:
    generation = Generation(Start(1, prompt="x", constraint="choice", constraint_value=choices), language)
    if generation.params.max_tokens > 4 * max(map(len, choices)):
        assert texts(finish(generation, language.vocab_size))[1] in choices


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        ("json_schema", {"type": 12}, "type must be"),
        ("json_schema", ["x"], "a JSON schema is an object, not a list"),
        ("json_schema", {"$ref": "http://localhost/x"}, "not"),
        ("regex", "(a", "unclosed group"),
        ("regex", "a" * (2**20 + 1), "at most 1048576"),
        ("lark", 'start: "a', "lexer error"),
        ("lark", None, "text that is not empty"),
        ("choice", [], "one at least"),
        ("xml", "a", "expected one of json"),
    ],
)
def test_what_is_no_grammar_is_refused(language: Language, kind: str, value: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Generation(start(constraint=kind, constraint_value=value), language)


def test_a_grammar_without_a_text_is_refused(language: Language) -> None:
    generation = Generation(start(constraint="lark", constraint_value='start: start "a"'), language)
    with pytest.raises(UsageError, match="grammar"):
        generation.feed(np.zeros(language.vocab_size, np.float32))


def test_not_a_number_is_a_failure_of_the_device(language: Language) -> None:
    logits = np.full(language.vocab_size, np.nan, np.float32)
    for constraint in (None, "json"):
        with pytest.raises(DeviceFailedError):
            Generation(start(constraint=constraint), language).feed(logits)


# Going on where another worker has died


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sampling": {"temperature": 1.0, "seed": 7, "stop": ["q", "~~"], "frequency_penalty": 0.7}},
        {"sampling": {"temperature": 1.2, "top_p": 0.9, "seed": 5, "repetition_penalty": 1.2, "logprobs": 2}},
        {"sampling": {"temperature": 1.0, "seed": 3}, "constraint": "json_schema", "constraint_value": SCHEMA},
        {"sampling": {"temperature": 1.0, "seed": 4}, "reasoning_budget": 6, "mode": "open"},
        {"sampling": {"temperature": 1.0, "seed": 4, "max_tokens": 60}, "reasoning_budget": 9, "mode": "open",
         "constraint": "regex", "constraint_value": "[a-d]{1,30}"},
    ],
)  # fmt: skip
def test_a_replay_goes_on_as_if_nothing_had_happened(language: Language, options: dict[str, Any]) -> None:
    options = {**options, "sampling": {"max_tokens": 40, **options.get("sampling", {})}}
    whole = finish(Generation(start(**options), language), language.vocab_size)
    tokens = [piece.token for piece in whole]
    assert len(tokens) > 5
    for count in range(len(tokens)):
        again = Generation(start(**options, generated=tokens[:count]), language)
        assert finish(again, language.vocab_size) == whole[count:]


def test_a_replay_may_be_at_its_end(language: Language) -> None:
    begun = Generation(start(sampling={"max_tokens": 2}, generated=[5, 6]), language)
    assert begun.finish_reason == "length"
    last = begun.cancel()
    assert (last.text, last.token, last.finish_reason) == ("", None, "length")
    with pytest.raises(UsageError, match="ended at 2"):
        Generation(start(sampling={"max_tokens": 2}, generated=[5, 6, 7]), language)


# What is asked


def test_logprobs_come_with_texts(language: Language) -> None:
    generation = Generation(start(sampling={"logprobs": 2}), language)
    piece = scripted(language, generation, "a")[0]
    assert piece.token_text == "a"
    assert piece.top[0] == [piece.token, "a", piece.logprob]
    assert len(piece.top) == 2


def test_cancel_tells_what_was_held_back(language: Language) -> None:
    generation = Generation(start(sampling={"stop": ["abc"]}), language)
    assert texts(scripted(language, generation, "xab")) == ("", "x")
    piece = generation.cancel()
    assert (piece.text, piece.finish_reason) == ("ab", "cancelled")


def test_the_answer_is_as_long_as_the_context_lets_it(language: Language) -> None:
    prompt = len(Generation(start(), language).tokens)
    assert Generation(start(), language).params.max_tokens == min(300, 400 - prompt)
    assert Generation(start("x" * 200), language).params.max_tokens == 400 - prompt - 198


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        (Start(1), UsageError, "either a prompt or messages"),
        (Start(1, prompt=""), EmptyPromptError, "holds no token"),
        (Start(1, prompt=[1, 9999]), UsageError, "token 9999"),
        (Start(1, prompt=[1, "x"]), UsageError, "token ids"),  # type: ignore[list-item]
        (Start(1, prompt="x" * 500), ContextOverflowError, "the context holds 400"),
        (start(sampling={"max_tokens": 399}), ContextOverflowError, "399 to generate"),
        (start(sampling={"heat": 1}), SamplingError, "no field 'heat'"),
        (start(sampling={"logit_bias": {"x": 1}}), SamplingError, "logit_bias"),
        (start(reasoning_budget=-1), UsageError, "reasoning_budget is -1"),
        (Start(1, messages=[{"role": "user", "content": "x"}], template={"messages": []}), UsageError, "is taken"),
        (Start(1, messages=[{"role": "user", "content": "x"}], template={"self": 1}), UsageError, "is taken"),
        (Start(1, messages=[]), UsageError, "at least one message"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused(
    language: Language, asked: Start, error: type[EdgertError], message: str
) -> None:
    with pytest.raises(error, match=message):
        Generation(asked, language)


def test_a_model_without_a_template(language: Language, tmp_path: Path) -> None:
    for file in ("tokenizer.json", "tokenizer_config.json"):
        source = language.grammars._folder / file
        (tmp_path / file).write_text(source.read_text("utf-8"), "utf-8")
    bare = Tokenizer.open(tmp_path)
    assert Thoughts.of(bare) is None
    with pytest.raises(ChatTemplateError):
        bare.encode_chat([{"role": "user", "content": "Hi"}], variables={"mode": "open"})


@pytest.mark.parametrize("chat", [True, False])
def test_a_text_that_cannot_fit_is_not_encoded(language: Language, monkeypatch: pytest.MonkeyPatch, chat: bool) -> None:
    """Megabytes would keep the worker's other requests waiting for a minute, to be refused then."""
    encoded: list[int] = []
    monkeypatch.setattr(language.tokenizer, "encode", lambda text, special=True: encoded.append(len(text)) or [1] * 500)
    for length, fits in ((30_000, False), (10**6, False), (20_000, True)):  # 400 tokens of 64 characters
        request = start("x" * length) if chat else Start(1, prompt="x" * length)
        with pytest.raises(ContextOverflowError, match="500 prompt tokens" if fits else "tokens at least") as found:
            Generation(request, language)
        assert found.value.limit == language.context < found.value.tokens
        assert bool(encoded) == fits


def test_vectors_that_fill_more_than_a_message_are_not_begun(
    language: Language, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding, "MAX_LINE_BYTES", 10_000)
    vectors = [[-1.2345678901234567e-05] * 100] * 4
    assert len(encode(Vectors(2**31, vectors, 2**31))) < 10_000
    assert len(embedding.tokenized(Embed(1, ["a"] * 4), language, hidden_size=100).prompts) == 4
    with pytest.raises(UsageError, match="5 texts, at most 4"):
        embedding.tokenized(Embed(1, ["a"] * 5), language, hidden_size=100)
    with pytest.raises(ContextOverflowError, match="tokens at least"):
        embedding.tokenized(Embed(1, ["a", "x" * 10**6]), language, hidden_size=100)
