"""One request, from its messages to its last token: prompt, sampler, text, grammar, and the model's thoughts.

A generation is a function of its `Start` and of the logits it is fed: what `Start.generated` replays leaves it as if it
had sampled these tokens itself, so another worker goes on where one has died. Nothing in here touches a device.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgert.errors import ContextOverflowError, EmptyPromptError, SamplingError, UsageError
from edgert.features import Medium
from edgert.prompts import Prompt, Prompts
from edgert.results import FinishReason
from edgert.sampling import Sampled, Sampler, SamplingParams
from edgert.service.protocol import Piece, Start
from edgert.service.worker.grammar import Grammar, Grammars
from edgert.text import StreamDecoder, Tokenizer

Floats = NDArray[np.float32]

# How published models mark their thoughts: Qwen, DeepSeek and most others; Magistral; Command; Seed.
_MARKS = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<seed:think>", "</seed:think>"),
)


@dataclass(frozen=True)
class Thoughts:
    """The tokens around a block of thoughts."""

    opens: int
    closes: int

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Thoughts | None:
        """Those of a model; None where its chat template knows no such block."""
        for opening, closing in _MARKS:
            opens, closes = tokenizer.token_id(opening), tokenizer.token_id(closing)
            if opens is not None and closes is not None and tokenizer.template_has(closing):
                return cls(opens, closes)
        return None


@dataclass(frozen=True)
class Language:
    """What a generation must know of its model.

    Attributes:
        tokenizer, grammars, thoughts: of the model.
        ends: tokens that end a text.
        vocab_size: of the logits.
        context: the largest number of tokens, prompt and answer together.
        max_tokens: of an answer whose request does not say.
        prompts: takes images and sound out of messages.
    """

    tokenizer: Tokenizer
    grammars: Grammars
    thoughts: Thoughts | None
    ends: frozenset[int]
    vocab_size: int
    context: int
    max_tokens: int
    prompts: Prompts | None = None

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """As the tokenizer's; a text that cannot fit is turned away before minutes are spent on it.

        Raises:
            UsageError: as `Tokenizer.encode`.
            ContextOverflowError: the context holds fewer tokens than the text has at least.
        """
        least = self.tokenizer.least_tokens(text)
        if least > self.context:
            message = f"prompt: {len(text)} characters are {least} tokens at least, the context holds {self.context}"
            raise ContextOverflowError(message, tokens=least, limit=self.context)
        return self.tokenizer.encode(text, special=special)

    def check(self, tokens: Sequence[int], room: int) -> None:
        """Raise what `Model.generate` would for a prompt and so many tokens to generate."""
        if not tokens:
            raise EmptyPromptError("prompt: holds no token, expected at least 1")
        if len(tokens) + room > self.context:
            wanted = f"{len(tokens)} prompt tokens" + (f" and {room} to generate" if room else "")
            raise ContextOverflowError(
                f"prompt: {wanted}, the context holds {self.context}", tokens=len(tokens) + room, limit=self.context
            )
        wrong = next((t for t in tokens if not 0 <= t < self.vocab_size), None)
        if wrong is not None:
            raise UsageError(f"prompt: token {wrong} is outside the vocabulary of {self.vocab_size}")


class Generation:
    """A request that is being answered.

    Attributes:
        id: the server's number of it.
        background: whether interactive ones come first.
        tokens: prompt and answer so far, with negative ones for images and sound: see `edgert.features`.
        ids: the model's own in their place.
        media: what is behind the negative ones.
        prompt_tokens: how many of them are the prompt.
        new_tokens, reasoning_tokens: generated, and how many of them were thoughts.
        finish_reason: None while it goes on.

    Raises:
        UsageError and its kin, ChatTemplateError: the request cannot be done.
    """

    def __init__(self, start: Start, language: Language) -> None:
        self.id = start.id
        self.background = start.background
        self._language = language
        prompt = _prompt(start, language)
        self.tokens, self.ids, self.media = prompt.tokens, prompt.ids, prompt.media
        self.prompt_tokens = len(self.tokens)
        self.new_tokens = self.reasoning_tokens = 0
        self.finish_reason: FinishReason | None = None
        self.params = _params(start, language, self.prompt_tokens)
        language.check(self.ids, self.params.max_tokens)
        self._sampler = Sampler(self.params, prompt_tokens=self.prompt_tokens)
        if start.reasoning_budget is not None and start.reasoning_budget < 0:
            raise UsageError(f"reasoning_budget is {start.reasoning_budget}, expected 0 or more")
        self._budget = start.reasoning_budget
        self._grammar: Grammar | None = None
        if start.constraint is not None:
            self._grammar = language.grammars.compile(start.constraint, start.constraint_value)
        chat = start.messages is not None
        marks = language.thoughts if chat else None  # a plain text may hold such a token, and shows it
        state = None if marks is None else _state(self.ids, marks, language.tokenizer)
        self._marks = marks
        self._thinking = state == "open"
        self._may_think = state == "none"  # until the first token
        self._trim = self._thinking  # white space that only parts thoughts and answer
        self._thoughts = StreamDecoder(language.tokenizer)
        self._answer = StreamDecoder(language.tokenizer, self.params.stop, prompt=() if chat else self.ids)
        self._replay(start.generated)

    def feed(self, logits: Floats) -> Piece:
        """The next token.

        Args:
            logits: f32 `[vocab]` after the last of `tokens`.

        Raises:
            DeviceFailedError: they are no numbers.
            UsageError: the grammar has become too complex.
        """
        sampled = self._sample(logits)
        text, reasoning = self._take(sampled.token)
        asked = self.params.logprobs is not None
        return Piece(
            self.id,
            text,
            sampled.token,
            reasoning,
            token_text=self._text_of(sampled.token) if asked else None,
            logprob=sampled.logprob,
            top=[[token, self._text_of(token), logprob] for token, logprob in sampled.top],
            finish_reason=self.finish_reason,
            reasoning_tokens=self.reasoning_tokens,
        )

    def cancel(self) -> Piece:
        """The last piece, without a token, of a generation that ends now or that its replay has ended."""
        text = ""
        if self.finish_reason is None:
            self.finish_reason = "cancelled"
            text = self._shown(self._decoder.flush())
        return Piece(
            self.id, text, reasoning=self._thinking, finish_reason=self.finish_reason,
            reasoning_tokens=self.reasoning_tokens,
        )  # fmt: skip

    @property
    def _decoder(self) -> StreamDecoder:
        return self._thoughts if self._thinking else self._answer

    def _sample(self, logits: Floats) -> Sampled:
        if self._must_answer:
            return self._forced(logits)
        allowed = None
        if self._grammar is not None and not self._thinking:
            allowed = self._grammar.allowed()
            if self._marks is not None and self._may_think:
                allowed[self._marks.opens] = True
        return self._sampler.sample(logits, self.ids, allowed)

    @property
    def _must_answer(self) -> bool:
        """Whether the thoughts have used up their budget, so that the next token closes them."""
        return self._thinking and self._budget is not None and self.reasoning_tokens >= self._budget

    def _forced(self, logits: Floats) -> Sampled:
        """The token that closes the thoughts; the random state stays as it is."""
        assert self._marks is not None
        token = self._marks.closes
        params = SamplingParams(logprobs=self.params.logprobs)
        allowed = np.zeros(np.asarray(logits).size, dtype=np.bool_)
        allowed[token] = True
        return Sampler(params).sample(logits, (), allowed)

    def _take(self, token: int) -> tuple[str, bool]:
        """Go on after a token, sampled or replayed; its text, and whether that is a thought."""
        self.tokens.append(token)
        if self.ids is not self.tokens:
            self.ids.append(token)
        self.new_tokens += 1
        text, reasoning = self._read(token)
        if self.finish_reason is None and self.new_tokens >= self.params.max_tokens:
            self.finish_reason = "length"
        if self.finish_reason is not None:
            text += self._shown(self._decoder.flush())
        return text, reasoning

    def _read(self, token: int) -> tuple[str, bool]:
        marks, may_think = self._marks, self._may_think
        self._may_think = False
        if token in self._language.ends:
            self.finish_reason = "stop"
            return "", self._thinking
        if marks is not None and may_think and token == marks.opens:
            self._thinking = self._trim = True
            return "", True
        if marks is not None and self._thinking:
            if token != marks.closes:
                self.reasoning_tokens += 1
                return self._shown(self._thoughts.push(token)), True
            text = self._shown(self._thoughts.flush())
            self._thinking, self._trim = False, self._grammar is None
            return text, True
        if self._grammar is not None:
            self._grammar.take(token)
        text = self._shown(self._answer.push(token))
        if self._answer.finished or (self._grammar is not None and self._grammar.complete):
            self.finish_reason = "stop"
        return text, False

    def _shown(self, text: str) -> str:
        """Text without the white space that only parts marks from what they hold."""
        if self._trim:
            text = text.lstrip()
            self._trim = not text
        return text

    def _replay(self, generated: Sequence[int]) -> None:
        sampled = 0
        for token in generated:
            if self.finish_reason is not None:
                raise UsageError(f"generated: {len(generated)} tokens, but the text ended at {self.new_tokens}")
            sampled += not self._must_answer
            self._take(token)
        self._sampler.skip(sampled)

    def _text_of(self, token: int) -> str:
        tokenizer = self._language.tokenizer
        return tokenizer.decode([token]) or tokenizer.token(token) or ""


def _prompt(start: Start, language: Language) -> Prompt:
    if (start.prompt is None) == (start.messages is None):
        raise UsageError("request: expected either a prompt or messages")
    if start.messages is not None:
        messages: list[dict[str, Any]] = start.messages
        media: list[Medium] = []
        if language.prompts is not None:
            messages, media = language.prompts.split(messages)
        text = language.tokenizer.render_chat(messages, start.tools, variables=start.template)
        tokens = language.encode(text, special=False)  # the template places bos
        return Prompt.of(tokens) if language.prompts is None else language.prompts.expand(tokens, media)
    if isinstance(start.prompt, str):
        return Prompt.of(language.encode(start.prompt))
    try:
        return Prompt.of([operator.index(token) for token in start.prompt or ()])
    except TypeError as error:
        raise UsageError(f"prompt: expected text or a sequence of token ids: {error}") from error


def _params(start: Start, language: Language, prompt_tokens: int) -> SamplingParams:
    options = dict(start.sampling)
    known = SamplingParams.__dataclass_fields__
    if unknown := [name for name in options if name not in known]:
        raise SamplingError(f"sampling has no field {unknown[0]!r}, only {', '.join(known)}")
    if options.get("max_tokens") is None:
        options["max_tokens"] = max(1, min(language.max_tokens, language.context - prompt_tokens))
    return SamplingParams(**options)


def _state(tokens: Sequence[int], marks: Thoughts, tokenizer: Tokenizer) -> Literal["open", "closed", "none"]:
    """Whether a prompt ends in a block of thoughts that the template has opened, in one that it has closed, or neither.

    Only white space may follow the mark: what stands earlier belongs to other turns, or to what people write.
    """
    for index in range(len(tokens) - 1, -1, -1):
        if tokens[index] in (marks.opens, marks.closes):
            rest = tokens[index + 1 :]
            if not tokenizer.special_ids.isdisjoint(rest) or tokenizer.decode(rest).strip():
                break
            return "open" if tokens[index] == marks.opens else "closed"
    return "none"
