"""What the files of a folder say about tokens and processors."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edgert.converters.sources import read_json
from tokenizers import Tokenizer
from transformers import PretrainedConfig

from edgert.errors import ConversionError, EdgertError, cause

_PIECES = re.compile(r"\{\w+\}|<[^<>]+>|\[[A-Z_]+\]|\*|[^<{*[]+")
# Of families whose files do not have to say it: the defaults of their processors in transformers.
_NAMED = {"image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]"}


class Names:
    """Numbers of tokens by what configuration, processor and tokenizer files call them."""

    def __init__(self, folder: Path, config: PretrainedConfig, tokenizer: Tokenizer) -> None:
        self._folder = folder
        self._config = config
        self._tokenizer = tokenizer
        self._texts: dict[str, Any] = dict(_NAMED)
        for file in ("tokenizer_config.json", "processor_config.json"):
            if (folder / file).is_file():
                found = read_json(folder / file)
                extra = found.get("extra_special_tokens")
                self._texts |= {**found, **(extra if isinstance(extra, dict) else {})}

    def number(self, name: str) -> int:
        """The token called `name`, e.g. `image_token`; raises `ConversionError` where no file says which that is."""
        parts = [getattr(self._config, part, None) for part in ("vision_config", "audio_config")]
        for place in (self._config, *parts):
            for ending in ("_id", "_index"):
                value = getattr(place, name + ending, None)
                if isinstance(value, int):
                    return value
        text = self._texts.get(name)
        text = text.get("content") if isinstance(text, dict) else text
        return self.special(text if isinstance(text, str) else name)

    def special(self, text: str) -> int:
        """The token of this text; raises `ConversionError` where the tokenizer has none."""
        number = self._tokenizer.token_to_id(text)
        if number is None:
            raise ConversionError(
                f"{self._folder}: its tokenizer has no token {text!r}, which stands for an image or a sound"
            )
        return int(number)

    def sequence(self, text: str, between: list[int]) -> list[int]:
        """The tokens of such a text as `Vision.text`, with `between` for `*`."""
        found: list[int] = []
        for piece in _PIECES.findall(text):
            if piece == "*":
                found += between
            elif piece.startswith("{"):
                found.append(self.number(piece[1:-1]))
            elif piece[0] in "<[":
                found.append(self.special(piece))
            else:
                found += self._tokenizer.encode(piece, add_special_tokens=False).ids
        return found


@contextmanager
def understood(folder: Path) -> Iterator[None]:
    """What goes wrong on settings of another type than they should have, as a `ConversionError`."""
    try:
        yield
    except EdgertError:  # UsageError is a ValueError
        raise
    except (TypeError, ValueError, AttributeError, KeyError, IndexError, ArithmeticError) as error:
        raise ConversionError(f"{folder}: the settings of its processor or towers: {cause(error)}") from error


def preprocessor(folder: Path, *names: str) -> dict[str, Any]:
    """The settings of a processor: the first of preprocessor_config.json and parts of processor_config.json.

    Raises:
        ConversionError: there is none.
    """
    whole = folder / "processor_config.json"
    parts = read_json(whole) if whole.is_file() else {}
    for name in names:
        if isinstance(parts.get(name), dict):
            return dict(parts[name])
    if (folder / "preprocessor_config.json").is_file():
        return read_json(folder / "preprocessor_config.json")
    raise ConversionError(f"{folder}: has neither preprocessor_config.json nor {names[0]} in processor_config.json")
