"""Text to tokens and tokens to text: the tokenizer of a bundle, chats, and decoding as a stream.

A tokenizer folder holds, as Hugging Face writes it, `tokenizer.json` and beside it, both optional,
`tokenizer_config.json` (special tokens, chat template) and `chat_template.jinja` (which then counts).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers

from edgert.errors import BundleError, ChatTemplateError, UsageError

if TYPE_CHECKING:
    from edgert.chat_template import ChatTemplate

MAX_FILE_BYTES = 256 * 1024 * 1024
MAX_TEMPLATE_BYTES = 1024 * 1024  # four for each character that `edgert.chat_template` takes
REPLACEMENT = "\ufffd"
# What a stream needs of the text before it; one word does, more cover tokens without text.
CONTEXT_TOKENS = 8
# `encode` of the library holds Python's lock, for seconds where a text has megabytes; `encode_batch` lets other threads
# run, but wakes up threads of its own, which takes longer than a short text does.
LONG_CHARS = 1 << 14
LONGEST_CHARS = 64


class Tokenizer:
    """Text to token ids and back. Immutable, so it may be shared between threads; `open` is the way to get one.

    Attributes:
        vocab_size: number of ids, added tokens included (a model's logits may have more, as padding).
        bos_id, eos_id, pad_id: ids of the tokens of these names; None where there is none.
        special_ids: ids that are no text (`<|im_end|>` …); decoding leaves them out.
    """

    def __init__(self, backend: tokenizers.Tokenizer, config: dict[str, Any], templates: dict[str, str]) -> None:
        self._backend = backend
        self._backend.no_truncation()  # a file may ask for either, and would cut prompts in silence
        self._backend.no_padding()
        self._templates = templates
        self._compiled: dict[str, ChatTemplate] = {}
        self._named = {name: text for name in config if (text := _token_text(config, name)) is not None}
        self._add_bos = config.get("add_bos_token")
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self.bos_id = self._id("bos_token")
        self.eos_id = self._id("eos_token")
        self.pad_id = self._id("pad_token")
        self.special_ids = frozenset(
            index for index, token in backend.get_added_tokens_decoder().items() if token.special
        )

    @classmethod
    def open(cls, folder: str | Path) -> Tokenizer:
        """Read a tokenizer folder.

        Raises:
            BundleError: a file is missing, damaged, a link or too large; the message names it.
        """
        folder = Path(folder)
        raw = _read(folder, "tokenizer.json")
        if raw is None:
            raise BundleError(f"tokenizer {folder}: tokenizer.json is missing")
        try:
            backend = tokenizers.Tokenizer.from_str(raw)
        except BaseException as error:  # a panic of the Rust library is no Exception
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
            raise BundleError(f"tokenizer {folder}: tokenizer.json: {error}") from error
        config: Any = {}
        if (raw := _read(folder, "tokenizer_config.json")) is not None:
            try:
                config = json.loads(raw)
            except (ValueError, RecursionError) as error:
                raise BundleError(f"tokenizer {folder}: tokenizer_config.json is no JSON: {error}") from error
        if not isinstance(config, dict):
            raise BundleError(
                f"tokenizer {folder}: tokenizer_config.json holds a {type(config).__name__}, expected an object"
            )
        templates = _templates(config.get("chat_template"))
        if templates is None:
            raise BundleError(f"tokenizer {folder}: tokenizer_config.json: chat_template is neither text nor a list")
        if (source := _read(folder, "chat_template.jinja")) is not None:
            templates = {"default": source}
        return cls(backend, config, templates)

    @property
    def has_chat_template(self) -> bool:
        return bool(self._templates)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of a text; with `special` also those that the model expects around one (usually bos in front).

        Raises:
            UsageError: the text is no str, or holds half a surrogate pair.
        """
        if not isinstance(text, str):
            raise UsageError(f"text is a {type(text).__name__}, expected str")
        try:
            ids = self._ids(text, special)
        except (UnicodeEncodeError, TypeError) as error:  # which one depends on where the surrogate is noticed
            raise UsageError("text is no valid Unicode: it holds half a surrogate pair") from error
        # As in transformers, an explicit add_bos_token overrules what tokenizer.json does.
        if special and self.bos_id is not None:
            starts = ids[:1] == [self.bos_id]
            if self._add_bos is True and not starts:
                ids = [self.bos_id, *ids]
            elif self._add_bos is False and starts:
                ids = self._ids(text, False)
        return ids

    def least_tokens(self, text: str) -> int:
        """Not more than the tokens of a text, without encoding it: as if each was the longest of the vocabulary.

        Not so for text that a tokenizer leaves out or takes together (white space, unknown words), unless each token
        has `LONGEST_CHARS` characters on average.
        """
        return len(text) // self._longest_chars if len(text) >= LONG_CHARS else 0

    @cached_property
    def _longest_chars(self) -> int:
        return max(LONGEST_CHARS, max(map(len, self._backend.get_vocab(with_added_tokens=True)), default=0))

    def _ids(self, text: str, special: bool) -> list[int]:
        if len(text) < LONG_CHARS:
            encoding = self._backend.encode(text, add_special_tokens=special)
        else:
            encoding = self._backend.encode_batch([text], add_special_tokens=special)[0]
        ids: list[int] = encoding.ids
        return ids

    def encode_with_ends(self, text: str) -> tuple[list[int], list[int]]:
        """Token ids of a text, without special ones, and for each the index of the character behind it in `text`.

        Raises:
            UsageError: as `encode`.
        """
        if not isinstance(text, str):
            raise UsageError(f"text is a {type(text).__name__}, expected str")
        try:
            encoding = self._backend.encode(text, add_special_tokens=False)
        except (UnicodeEncodeError, TypeError) as error:
            raise UsageError("text is no valid Unicode: it holds half a surrogate pair") from error
        return encoding.ids, [end for _, end in encoding.offsets]

    def prefix(self) -> int | None:
        """The first of the tokens that the model expects before a text, usually bos; None where there is none."""
        bare, whole = self.encode("a", special=False), self.encode("a")
        return whole[0] if len(whole) > len(bare) and whole[0] != bare[0] else None

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids; special tokens and ids outside of the vocabulary have none."""
        text: str = self._backend.decode([i for i in ids if 0 <= i < 2**32], skip_special_tokens=True)
        return text

    def token(self, token_id: int) -> str | None:
        """The entry of the vocabulary as it is written there, or None outside of it."""
        text: str | None = self._backend.id_to_token(token_id) if 0 <= token_id < 2**32 else None
        return text

    def encode_chat(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of a conversation. The template places bos, so nothing is added to what it writes.

        Args:
            messages: `{"role": str, "content": str or list of parts, …}`, oldest first; content may be None or
                missing where there are `tool_calls`.
            tools: JSON schemas of functions that the model may call.
            add_generation_prompt: end with the opening of the assistant's answer.
            variables: more of them for the template, e.g. `{"enable_thinking": False}`.

        Raises:
            UsageError: messages or tools have another form, or a variable has the name of one that is set here.
            ChatTemplateError: there is no template, or it fails.
        """
        return self.encode(self.render_chat(messages, tools, add_generation_prompt, variables), special=False)

    def render_chat(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The text that `encode_chat` encodes."""
        _check_messages(messages, tools)
        if not self._templates:
            raise ChatTemplateError("the model has no chat template; use generate with a plain prompt")
        name = "tool_use" if tools is not None and "tool_use" in self._templates else "default"
        if name not in self._templates:
            raise ChatTemplateError(f"no chat template is named default, only {', '.join(sorted(self._templates))}")
        if name not in self._compiled:
            from edgert.chat_template import ChatTemplate  # and Jinja, which a plain prompt need not wait for

            self._compiled[name] = ChatTemplate(self._templates[name])
        own = {
            **self._named,
            "messages": messages,
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        if taken := [name for name in variables or () if name in own or name == "self"]:  # Jinja's own argument
            raise UsageError(f"template variable {taken[0]!r} is taken, expected another name")
        return self._compiled[name].render(**(variables or {}), **own)

    def template_has(self, text: str) -> bool:
        """Whether a chat template has this text in it."""
        return any(text in template for template in self._templates.values())

    def token_id(self, token: str) -> int | None:
        """The id of an entry of the vocabulary, or None where there is none."""
        index: int | None = self._backend.token_to_id(token)
        return index

    def _id(self, name: str) -> int | None:
        text = self._named.get(name)
        index: int | None = None if text is None else self._backend.token_to_id(text)
        return index


class StreamDecoder:
    """Turns tokens, one at a time, into text that will not change any more.

    The pieces together are `tokenizer.decode` of all ids. A piece ends before an unfinished character and before what
    may become a stop string. Each step decodes only the tokens since the last piece and, as their context, those of
    that piece (many decoders treat the first token differently): the prefix-offset method of vLLM and
    text-generation-inference.

    Attributes:
        finished: a stop string was seen; all text before it has been returned and no more will come.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), *, prompt: Sequence[int] = ()) -> None:
        """Begin a stream that ends at any of the `stop` strings (the one completed first).

        `prompt` is what the text continues, so that its first word keeps the space before it; leave it out where the
        answer stands for itself, as in a chat.
        """
        if isinstance(stop, str) or not all(isinstance(text, str) and text for text in stop):
            raise UsageError(f"stop is {stop!r}, expected a sequence of strings that are not empty")
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self.finished = False
        self._held = ""  # decoded, but perhaps the beginning of a stop string
        begin = max(0, len(prompt) - CONTEXT_TOKENS)
        while begin > 0 and self._is_byte(prompt[begin]):
            begin -= 1
        self._window = [i for i in prompt[begin:] if self._has_text(i)]
        self._fresh = len(self._window)  # tokens of the window before this index gave the last piece
        # Characters of the window's text given away; not those that the prompt leaves unfinished.
        self._given = len(tokenizer.decode(self._window).rstrip(REPLACEMENT))

    def push(self, token_id: int) -> str:
        """Take the next token; the text that is now certain, often empty."""
        if self.finished or not self._has_text(token_id):
            return ""
        self._window.append(token_id)
        if self._is_byte(token_id):
            return ""  # a run of them is decoded as one, and is all U+FFFD if its end is bad
        text = self._tokenizer.decode(self._window)
        certain = _certain(text)
        piece = certain[self._given :]
        self._given = max(self._given, len(certain))
        if piece and certain == text:
            self._slide(self._fresh)
        elif len(self._window) > 4 * CONTEXT_TOKENS:
            # A run without a clean end, such as invalid bytes. It may be cut where both sides decode for themselves
            # to the same text: a character over the cut would have made one of two.
            last = self._tokenizer.decode(self._window[-1:])
            if last and self._tokenizer.decode(self._window[:-1]) + last == text:
                self._window, self._fresh, self._given = [token_id], 0, len(_certain(last))
        return self._release(piece)

    def flush(self) -> str:
        """The rest of the text, when no more tokens come; an unfinished character becomes U+FFFD."""
        if self.finished:
            return ""
        text = self._tokenizer.decode(self._window)
        piece = text[self._given :]
        self._given = len(text)
        released = self._release(piece)
        rest, self._held = self._held, ""
        return released + rest

    def _has_text(self, token_id: int) -> bool:
        return token_id not in self._tokenizer.special_ids and self._tokenizer.token(token_id) is not None

    def _is_byte(self, token_id: int) -> bool:
        """Whether this is a byte-fallback token, `<0x0A>`."""
        token = self._tokenizer.token(token_id) or ""
        return len(token) == 6 and token.startswith("<0x") and token.endswith(">")

    def _slide(self, start: int) -> None:
        self._window = self._window[start:]
        self._fresh = len(self._window)
        self._given = len(self._tokenizer.decode(self._window))

    def _release(self, piece: str) -> str:
        """Add a piece to what is held back and return what can be no part of a stop string."""
        if not self._stop:
            return piece
        text = self._held + piece
        # The stop string whose last character came first ends the stream, however the text fell into tokens.
        ends = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if ends:
            self.finished, self._held = True, ""
            return text[: min(ends)[1]]
        keep = max(_overlap(text, stop) for stop in self._stop)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _certain(text: str) -> str:
    """The text without a U+FFFD at its end, which may be the beginning of a character."""
    return text.removesuffix(REPLACEMENT)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def _token_text(config: dict[str, Any], name: str) -> str | None:
    value = config[name]
    if isinstance(value, dict):
        value = value.get("content")
    return value if name.endswith("_token") and isinstance(value, str) else None


def _templates(value: Any) -> dict[str, str] | None:
    """Templates by name; None for a form that is not known."""
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    try:
        templates = {entry["name"]: entry["template"] for entry in value}
    except (TypeError, KeyError):
        return None
    return templates if all(isinstance(text, str) for pair in templates.items() for text in pair) else None


def _check_messages(messages: Any, tools: Any) -> None:
    if not isinstance(messages, list) or not messages:
        raise UsageError(f"messages is {_form(messages)}, expected a list of at least one message")
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            raise UsageError(f"messages[{index}] is {_form(message)}, expected a dict with role and content")
        if not isinstance(message.get("role"), str):
            raise UsageError(f"messages[{index}]: role is {_form(message.get('role'))}, expected a string")
        content = message.get("content")
        if not isinstance(content, (str, list)) and not (content is None and message.get("tool_calls")):
            raise UsageError(f"messages[{index}]: content is {_form(content)}, expected a string or a list")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise UsageError(f"tools is {_form(tools)}, expected a list of JSON schemas")


def _form(value: Any) -> str:
    if value is None:
        return "missing"
    return "an empty list" if value == [] else f"a {type(value).__name__}"


def _read(folder: Path, name: str) -> str | None:
    """Text of a file, or None where there is none."""
    path = folder / name
    limit = MAX_TEMPLATE_BYTES if name.endswith(".jinja") else MAX_FILE_BYTES
    try:
        if path.is_symlink():
            raise BundleError(f"tokenizer {folder}: {name} is a symbolic link, which bundles may not hold")
        if not path.is_file():
            return None
        if path.stat().st_size > limit:
            raise BundleError(f"tokenizer {folder}: {name} has {path.stat().st_size} bytes, at most {limit} allowed")
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(f"tokenizer {folder}: {name} cannot be read: {error}") from error
