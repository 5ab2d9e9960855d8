"""Images and sound among the tokens of a prompt.

A model that takes them has an input `features`, with rows that stand in the place of embeddings. Here each such row is
a token of its own, a negative number made of the hash of what it shows and of the row's number. So everything that
compares, keeps, or cuts sequences works on them as on text: two prompts share a cache only as far as their images are
the same. Only what feeds the model (`Taken.fill`) looks at what is behind a token.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from edgert.backends.base import Array
from edgert.bundle import Bundle
from edgert.errors import BundleError, DeviceFailedError, PlanError

if TYPE_CHECKING:
    from edgert.results import Event

Kind = Literal["image", "audio"]
FEATURES, FEATURE_MASK, IMAGE_IDS = "features", "feature_mask", "image_ids"
MAX_WIDTH = 2**17  # of features: a hidden size with those of deepstack's layers behind it
_INDEX_BITS = 17  # more rows than `edgert.media.spec.MAX_TOKENS`


class Medium:
    """An image or a sound of a prompt. May be used from several threads.

    Args:
        digest: a hash of what the tower takes; what has the same one is the same.
        tokens: that stand for it in the prompt, `token` for each of its rows.
        compute: gives the rows, f32 `[count, width]`, and what went wrong meanwhile.

    Attributes:
        identity: the digest and the kind.
        events: what went wrong when the rows were computed.
        held_bytes: of what the tower takes, held until the rows are computed.
    """

    def __init__(
        self,
        kind: Kind,
        digest: bytes,
        tokens: Sequence[int],
        token: int,
        compute: Callable[[], tuple[Array, Sequence[Event]]],
    ) -> None:
        self.kind = kind
        self.identity = int.from_bytes(digest[:16], "big") << 1 | (kind == "audio")
        self.ids = tuple(tokens)
        self.token = token
        self.events: list[Event] = []
        self.held_bytes = 0
        self._compute: Callable[[], tuple[Array, Sequence[Event]]] | None = compute
        self._rows: Array | None = None
        self._lock = threading.Lock()

    @property
    def tokens(self) -> list[int]:
        """Those of `ids`, with one of its own for each row."""
        row, found = 0, []
        for token in self.ids:
            own = token == self.token
            found.append(-1 - (self.identity << _INDEX_BITS | row) if own else token)
            row += own
        return found

    @property
    def rows(self) -> Array:
        """f32 `[count, width]`; computed when they are first asked for.

        Raises:
            DeviceFailedError: the tower failed, and nothing can take over.
            BundleError: it gives fewer rows than there are tokens, or for an image more.
        """
        with self._lock:
            if self._rows is None:
                assert self._compute is not None
                rows, events = self._compute()
                count = self.ids.count(self.token)
                if len(rows) < count or (len(rows) > count and self.kind == "image"):  # sound may be padded
                    raise BundleError(f"tower: it gives {len(rows)} rows for {count} tokens of an {self.kind}")
                self._rows, self._compute = rows, None  # what the tower took is not needed any more
                self.events += events
            return self._rows


Media = Mapping[int, Medium]
"""What is behind the tokens of a sequence, by `Medium.identity`."""


def media_of(found: Iterable[Medium]) -> Media:
    """Some media by their identity."""
    return {medium.identity: medium for medium in found}


def needed(tokens: Iterable[int], media: Media) -> list[Medium]:
    """What is behind some tokens, each once."""
    shown = dict.fromkeys(row_of(token)[0] for token in tokens if token < 0)
    return [media[identity] for identity in shown if identity in media]


def row_of(token: int) -> tuple[int, int]:
    """The identity of what a negative token shows, and the number of the row."""
    value = -1 - token
    return value >> _INDEX_BITS, value & ((1 << _INDEX_BITS) - 1)


def _is_image(token: int) -> bool:
    return token < 0 and not row_of(token)[0] & 1


def beginning(tokens: Sequence[int], at: int) -> int:
    """Where the image begins that `at` is inside of; `at` itself where it is inside of none."""
    if not 0 < at < len(tokens) or not _is_image(tokens[at]):
        return at
    return max(at - row_of(tokens[at])[1], 0)


def whole(tokens: Sequence[int], start: int, end: int) -> int:
    """Where a call that begins at `start` ends so that images stay whole: at `end`, or before or behind an image."""
    first = beginning(tokens, end)
    if first == end:
        return end
    if first > start:
        return first
    end += 1
    while end < len(tokens) and _is_image(tokens[end]) and row_of(tokens[end])[1]:
        end += 1
    return end


@dataclass(frozen=True)
class Taken:
    """What a decoder takes beside tokens, by its inputs.

    Attributes:
        width: of `features`; 0 for a model that takes text only.
        together: it has `image_ids`, so that the tokens of an image see each other both ways and come in one call.
        axes: rows of `position_ids`: 3 for M-RoPE (height and width of an image beside time), else 0, for none.
        vocab_size: rows of the table of embeddings.
        grid: rows and columns of an image's tokens, for M-RoPE.
    """

    width: int = 0
    together: bool = False
    axes: int = 0
    vocab_size: int = 0
    grid: tuple[int, int] | None = None

    @classmethod
    def of(cls, model: Any, vocab_size: int = 0, grid: tuple[int, int] | None = None) -> Taken:
        """What an `ov.Model` takes.

        Raises:
            BundleError: `features` is not [batch, tokens, width], or `position_ids` are not of 3 axes or none.
        """
        shapes = {name: port.get_partial_shape() for port in model.inputs for name in port.get_names()}
        width = _fixed(FEATURES, shapes.get(FEATURES), 3, 2, MAX_WIDTH)
        if width and FEATURE_MASK not in shapes:
            raise BundleError(f"model: it has an input {FEATURES!r}, but no {FEATURE_MASK!r}")
        positions = shapes.get("position_ids")
        spatial = positions is not None and positions.rank.is_static and len(positions) == 3
        return cls(
            width=width,
            together=IMAGE_IDS in shapes,
            axes=_fixed("position_ids", positions, 3, 0, 3, least=3) if spatial else 0,
            vocab_size=vocab_size,
            grid=grid,
        )

    def zeros(self, count: int) -> dict[str, Array]:
        """Inputs for `count` tokens of text, by name."""
        if not self.width:
            return {}
        inputs: dict[str, Array] = {
            FEATURES: np.zeros((1, count, self.width), np.float32),
            FEATURE_MASK: np.zeros((1, count), np.bool_),
        }
        if self.together:
            inputs[IMAGE_IDS] = np.zeros((1, count), np.int64)
        return inputs

    def fill(self, inputs: Mapping[str, Array], tokens: Sequence[int], media: Media, at: int = 0) -> None:
        """Put tokens into `input_ids`, from column `at` on, and what is behind them into the inputs of `zeros`."""
        ids = inputs["input_ids"][0]
        if not self.width or min(tokens) >= 0:
            ids[at : at + len(tokens)] = tokens
            return
        features, mask = inputs[FEATURES][0], inputs[FEATURE_MASK][0]
        numbers = inputs[IMAGE_IDS][0] if self.together else None
        image = 0
        for column, token in enumerate(tokens, at):
            if token >= 0:
                ids[column] = token
                continue
            identity, row = row_of(token)
            medium = media.get(identity)
            if medium is None:
                raise DeviceFailedError("prompt: an image or a sound is not there any more")
            # A family's own token for images may lie behind the embeddings: what is looked up is not used.
            ids[column] = medium.token if medium.token < self.vocab_size else 0
            features[column], mask[column] = medium.rows[row], True
            if numbers is not None and medium.kind == "image":
                image += not row or not image
                numbers[column] = image


def _fixed(name: str, shape: Any, rank: int, axis: int, most: int, least: int = 1) -> int:
    """The size of an axis of an input; 0 where there is no such input."""
    if shape is None:
        return 0
    known = shape.rank.is_static and len(shape) == rank and shape[axis].is_static
    if not known or not least <= shape[axis].get_length() <= most:
        bounds = f"{least}" if least == most else f"{least} to {most}"
        raise BundleError(f"model: input {name!r} is {shape}, expected {rank} axes, axis {axis} of {bounds}")
    return int(shape[axis].get_length())


def check_media(bundle: Bundle, taken: Taken, max_chunk: int) -> None:
    """Compare a bundle's `media.json` with what its model takes.

    Raises:
        BundleError: it promises what the model does not take.
        PlanError: the devices take chunks of `max_chunk` tokens, which do not hold an image.
    """
    media = bundle.media
    if media is None or (media.image is None and media.audio is None):
        return
    if not taken.width:
        raise BundleError(f"bundle {bundle.path}: media.json names towers, but the model takes no features")
    image = media.image
    if image is None:
        return
    if image.bidirectional != taken.together:
        raise BundleError(
            f"bundle {bundle.path}: media.json: bidirectional is {image.bidirectional}, but the model has "
            f"{'an' if taken.together else 'no'} input {IMAGE_IDS!r}"
        )
    if (image.grid is None) != (not taken.axes):
        raise BundleError(
            f"bundle {bundle.path}: media.json: grid is {image.grid}, but the model has {taken.axes or 'no'} axes "
            "of positions"
        )
    if taken.together and image.tokens > max_chunk:
        raise PlanError(
            f"plan: static shapes of {max_chunk} tokens a chunk do not hold an image, which takes "
            f"{image.tokens} that see each other; give static_shapes with a larger chunk"
        )


@dataclass
class Places:
    """The positions of a sequence's tokens: their numbers, but for M-RoPE, where an image takes fewer than it has rows.

    As `get_rope_index` of Qwen2-VL to Qwen3-VL in transformers: the tokens of an image stand at its rows and columns,
    and the text behind it goes on after the largest of these.
    """

    taken: Taken
    _seen: int = field(default=0, init=False)  # tokens that `_saved` is of
    _saved: int = field(default=0, init=False)

    def reset(self) -> None:
        """The sequence was cut back, or is another one."""
        self._seen = self._saved = 0

    def after(self, before: Sequence[int], tokens: Sequence[int]) -> Array:
        """i64 `[len(tokens)]`, or `[3, len(tokens)]` for M-RoPE.

        Args:
            before: those before them; since the last call, or `reset`, only longer.
        """
        past, count = len(before), len(tokens)
        plain = np.arange(past, past + count, dtype=np.int64)
        if not self.taken.axes:
            return plain
        grid = self.taken.grid
        if grid is not None:
            for token in before[self._seen :]:
                self._step(token, grid)
            self._seen = past
        if grid is None or min(tokens) >= 0:
            return np.broadcast_to(plain - self._saved, (3, count)).copy()
        places, saved = np.empty((3, count), np.int64), self._saved
        for column, token in enumerate(tokens):
            if _is_image(token):
                row = row_of(token)[1]
                first = past + column - row - self._saved
                places[:, column] = first, first + row // grid[1], first + row % grid[1]
            else:
                places[:, column] = past + column - self._saved
            self._step(token, grid)
        self._saved = saved  # they are not yet among those before
        return places

    def _step(self, token: int, grid: tuple[int, int]) -> None:
        """An image's last row makes up for what its rows are more than its positions."""
        if _is_image(token) and row_of(token)[1] == grid[0] * grid[1] - 1:
            self._saved += grid[0] * grid[1] - max(grid)
