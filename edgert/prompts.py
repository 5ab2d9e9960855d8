"""From the messages of a conversation, with images and sound among them, to the tokens of a prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from edgert.errors import ContextOverflowError, UsageError
from edgert.features import Kind, Media, Medium, media_of
from edgert.towers import Towers

# Types of parts, as this API and those of others call them, and what they are.
_KINDS: dict[str, Kind] = {
    "image": "image", "image_url": "image", "input_image": "image", "audio": "audio", "input_audio": "audio",
}  # fmt: skip
MAX_HELD_BYTES = 512 * 2**20  # of what towers take, for all images and sounds of one conversation
_REFUSED = ("video", "video_url", "file", "input_file")
_PLURAL = {"image": "images", "audio": "sounds"}


@dataclass(frozen=True)
class Prompt:
    """The tokens of a prompt.

    Attributes:
        tokens: with negative ones for images and sound; see `edgert.features`. What caches are compared by.
        ids: the model's own in their place.
        media: what is behind the negative ones.
    """

    tokens: list[int]
    ids: list[int]
    media: Media = field(default_factory=dict)

    @classmethod
    def of(cls, tokens: list[int]) -> Prompt:
        """One of text only."""
        return cls(tokens, tokens)


class Prompts:
    """Takes messages apart.

    Args:
        towers: of the model.
        local: whether parts may hold paths, and what else only a program in this process can give.
    """

    def __init__(self, towers: Towers, *, local: bool = True) -> None:
        self._towers = towers
        self._local = local

    def split(self, messages: Any) -> tuple[Any, list[Medium]]:
        """Messages as a chat template takes them, `{"type": "image"}` in the place of each image, and the media.

        Raises:
            UsageError: an image or a sound cannot be read, or the model takes none; the message says which part it is.
            ContextOverflowError: they are more tokens than the context holds; those behind are not looked at.
        """
        if not isinstance(messages, list) or not any(
            isinstance(message, Mapping) and isinstance(message.get("content"), (list, tuple)) for message in messages
        ):
            return messages, []
        found: list[Medium] = []
        plain = []
        for number, message in enumerate(messages):
            content = message.get("content") if isinstance(message, Mapping) else None
            if isinstance(content, (list, tuple)):
                parts = [
                    self._part(part, found, f"messages[{number}].content[{place}]")
                    for place, part in enumerate(content)
                ]
                message = {**message, "content": parts}
            plain.append(message)
        return plain, found

    def expand(self, tokens: list[int], media: Sequence[Medium]) -> Prompt:
        """A prompt of a chat template's tokens: its places for images and sound hold these, in order.

        Raises:
            UsageError: there are more or fewer places.
        """
        spec = self._towers.media
        places: dict[int, Kind] = {}
        if spec is not None and spec.image is not None:
            places[spec.image.placeholder] = "image"
        if spec is not None and spec.audio is not None:
            places[spec.audio.placeholder] = "audio"
        for kind in places.values():
            given = sum(medium.kind == kind for medium in media)
            made = sum(places.get(token) == kind for token in tokens)
            if given != made:
                raise UsageError(
                    f"messages: hold {given} {_PLURAL[kind]}, the chat template made {made} places for them; a text "
                    "must not hold the token that stands for one"
                )
        if not media:
            return Prompt.of(tokens)
        waiting = {kind: iter([medium for medium in media if medium.kind == kind]) for kind in places.values()}
        prompt = Prompt([], [], media_of(media))
        for token in tokens:
            if token in places:
                medium = next(waiting[places[token]])
                prompt.tokens.extend(medium.tokens)
                prompt.ids.extend(medium.ids)
            else:
                prompt.tokens.append(token)
                prompt.ids.append(token)
        return prompt

    def _part(self, part: Any, found: list[Medium], where: str) -> Any:
        kind = _KINDS.get(str(part.get("type"))) if isinstance(part, Mapping) else None
        if isinstance(part, Mapping) and part.get("type") in _REFUSED:
            raise UsageError(f"{where}: parts of type {part['type']} are not supported, only text, images and sound")
        if kind is None:
            return part
        try:
            source = self._source(part, str(part["type"]))
            found.append(self._towers.image(source) if kind == "image" else self._towers.audio(source))
        except UsageError as error:
            raise UsageError(f"{where}: {error}") from error
        self._check_room(found, where)
        return {"type": kind}

    def _check_room(self, found: Sequence[Medium], where: str) -> None:
        """Raise where media are too many, before time and memory go into more of them."""
        tokens, limit = sum(len(medium.ids) for medium in found), self._towers.context_length
        if tokens > limit:
            raise ContextOverflowError(
                f"{where}: with it images and sound are {tokens} tokens, the context holds {limit}",
                tokens=tokens, limit=limit,
            )  # fmt: skip
        held = sum(medium.held_bytes for medium in media_of(found).values())
        if held > MAX_HELD_BYTES:
            raise UsageError(f"{where}: with it images and sound take {held} bytes of memory, the limit is "
                             f"{MAX_HELD_BYTES}")  # fmt: skip

    def _source(self, part: Mapping[str, Any], kind: str) -> Any:
        """What is to be read: never a URL that is not `data:`, and paths only of programs in this process."""
        from edgert.media import decode_data_url
        from edgert.media.dataurl import decode_base64

        value = part.get(kind)
        if kind in ("image_url", "input_image"):
            if kind == "input_image" and value is None:
                value = part.get("image_url")
            url = value.get("url") if isinstance(value, Mapping) else value
            if not isinstance(url, str):
                raise UsageError(f"{kind}: url is missing, expected a data: URL")
            return decode_data_url(url)
        if kind == "input_audio":
            given = value if isinstance(value, Mapping) else {}
            data, form = given.get("data"), given.get("format", "wav")
            if not isinstance(data, str):
                raise UsageError("input_audio: data is missing, expected a WAV file in base64")
            if form != "wav":
                raise UsageError(f"input_audio: format is {str(form)[:40]!r}, expected 'wav'")
            return decode_base64(data, "input_audio")
        if not self._local:
            raise UsageError(f"parts of type {kind} are for programs that load the model themselves")
        if value is None:
            raise UsageError(f"a part of type {kind} needs its {kind}: a path, the bytes of a file, or an array")
        return value
