"""`media.json` of a bundle: what its towers take, and how pictures and sound become that.

Whoever made the bundle wrote it, so every number is checked before anything is sized by it: a limit that is overstepped
names the field, its value and the limit.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from edgert.errors import BundleError, BundleVersionError
from edgert.fields import build

VERSION = 1
FILE = "media.json"
MAX_BYTES = 4 * 1024 * 1024
MAX_SIDE = 4096
MAX_PIXELS = 16 * 1024 * 1024
MAX_TOKENS = 65_536  # that one picture or one sound may take in the prompt
MAX_TOKEN = 2**31 - 1
MAX_FRAMES = 60_000  # ten minutes at the usual 10 ms
MAX_WINDOWED = MAX_FRAMES * 1024  # samples under all windows of a sound: what its spectrum costs
MAX_PIECES = 64
MAX_SECONDS = 600.0  # of one sound
MIN_RATE, MAX_RATE = 1_000, 96_000  # of what a tower takes

_TOWER = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


@dataclass(frozen=True)
class ImageSpec:
    """How a picture becomes the `pixel_values` of a vision tower, f32 [1, 3, height, width], and tokens stand for it.

    Attributes:
        tower: folder under `towers/`.
        placeholder: token of the chat template that stands for an image.
        expansion: tokens that replace it; those equal to `token` get the tower's rows in order.
        token: see `expansion`.
        height, width: pixels that the tower takes.
        fit: how another aspect ratio gets there: `stretch` it, `pad` what is left, or `crop` what is too much.
        resample: filter of Pillow that pictures are resized with.
        scale, mean, std: a value of a pixel becomes `(pixel * scale - mean) / std`.
        longest_edge: resize the longer side to this before anything else; 0 for not (Idefics 3 and SmolVLM do).
        pad_color: what `pad` fills with, 0 to 255.
        pad_at: where `pad` puts the picture, in the middle or at the upper left corner.
        grid: rows and columns of tokens, for M-RoPE.
        bidirectional: the tokens of an image see each other both ways.
    """

    tower: str
    placeholder: int
    expansion: tuple[int, ...]
    token: int
    height: int
    width: int
    fit: Literal["stretch", "pad", "crop"] = "stretch"
    resample: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bicubic"
    scale: float = 1 / 255
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    longest_edge: int = 0
    pad_color: tuple[int, int, int] = (0, 0, 0)
    pad_at: Literal["center", "corner"] = "center"
    grid: tuple[int, int] | None = None
    bidirectional: bool = False

    @property
    def own(self) -> tuple[int, ...]:
        """The tokens that stand in a prompt."""
        return self.expansion

    @property
    def tokens(self) -> int:
        """Rows of the tower's `features`: how many tokens of the expansion they replace."""
        return self.expansion.count(self.token)

    def check(self) -> None:
        """Raise `ValueError` that names the first field out of its limits."""
        _check_tower("image", self.tower)
        _check_tokens("image", expansion=self.expansion, placeholder=[self.placeholder], token=[self.token])
        if not self.tokens:
            raise ValueError(f"image: expansion does not hold token {self.token}")
        _within("image", height=(self.height, 1, MAX_SIDE), width=(self.width, 1, MAX_SIDE))
        _within("image", longest_edge=(self.longest_edge, 0, MAX_SIDE), scale=(self.scale, 1e-6, 1.0))
        if self.height * self.width > MAX_PIXELS:
            raise ValueError(f"image: height × width is {self.height * self.width}, expected up to {MAX_PIXELS}")
        for name, triple, low, high in (
            ("mean", self.mean, -1e4, 1e4),
            ("std", self.std, 1e-4, 1e4),
            ("pad_color", self.pad_color, 0, 255),
        ):
            if len(triple) != 3:
                raise ValueError(f"image: {name} has {len(triple)} values, expected 3")
            for value in triple:
                _within("image", **{name: (value, low, high)})
        grid = self.grid
        if grid is not None and (len(grid) != 2 or min(grid) < 1 or grid[0] * grid[1] != self.tokens):
            raise ValueError(f"image: grid is {grid}, expected rows × columns of {self.tokens} tokens")


@dataclass(frozen=True)
class AudioSpec:
    """How sound becomes the `input_features` of an audio tower, f32 [1, mels, frames], and tokens stand for it.

    Attributes:
        tower: folder under `towers/`.
        placeholder: token of the chat template that stands for a sound.
        token: its n repetitions get the n rows of the tower that count.
        prefix, suffix: tokens around them.
        kind: whose log-mel spectrum it is (edgert/media/mel.py).
        sampling_rate: in Hz; other sound is resampled.
        mels, n_fft, window, hop: bands, and samples of a Fourier transform, of its window, from one window to the next.
        min_frequency, max_frequency: in Hz, where the lowest band begins and the highest ends.
        frames: of the tower's static input; longer sound is refused.
        max_pieces: how many such inputs one sound may fill, where the family cuts a long one into pieces.
        subsampling: (kernel, stride, padding) of each step from frames to tokens.
        whole: the tokens of all the frames count, whatever the sound's length.
        floor: smallest energy of a band, where the logarithm is cut off.
        preemphasis: coefficient of the first-order filter, 0 for none.
        band_mean, band_std: a band's mean and deviation, for `gemma4`; empty for none.
    """

    tower: str
    placeholder: int
    token: int
    frames: int
    kind: Literal["whisper", "phi4", "gemma4"]
    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()
    sampling_rate: int = 16_000
    mels: int = 80
    n_fft: int = 400
    window: int = 400
    hop: int = 160
    min_frequency: float = 0.0
    max_frequency: float = 8_000.0
    max_pieces: int = 1
    subsampling: tuple[tuple[int, int, int], ...] = ()
    whole: bool = False
    floor: float = 1e-10
    preemphasis: float = 0.0
    band_mean: tuple[float, ...] = ()
    band_std: tuple[float, ...] = ()

    @property
    def own(self) -> tuple[int, ...]:
        """The tokens that stand in a prompt."""
        return (*self.prefix, self.token, *self.suffix)

    @property
    def seconds(self) -> float:
        """The longest sound, in seconds."""
        return self.frames * self.max_pieces * self.hop / self.sampling_rate

    def tokens(self, frames: int) -> int:
        """How many tokens so many frames become: the arithmetic of strided convolutions, step by step."""
        for kernel, stride, padding in self.subsampling:
            frames = max(0, (frames + 2 * padding - kernel) // stride + 1)
        return frames

    def check(self) -> None:
        """Raise `ValueError` that names the first field out of its limits."""
        _check_tower("audio", self.tower)
        _check_tokens("audio", prefix=self.prefix, suffix=self.suffix)
        _check_tokens("audio", placeholder=[self.placeholder], token=[self.token])
        _within(
            "audio",
            sampling_rate=(self.sampling_rate, MIN_RATE, MAX_RATE),
            mels=(self.mels, 1, 512),
            n_fft=(self.n_fft, 16, 16_384),
            window=(self.window, 1, self.n_fft),
            hop=(self.hop, 1, self.n_fft),
            max_frequency=(self.max_frequency, 1.0, self.sampling_rate / 2),
            min_frequency=(self.min_frequency, 0.0, self.max_frequency - 1.0),
            frames=(self.frames, 1, MAX_FRAMES),
            max_pieces=(self.max_pieces, 1, MAX_PIECES),
            floor=(self.floor, 1e-30, 1e6),
            preemphasis=(self.preemphasis, 0.0, 1.0),
        )
        spread = self.frames * self.max_pieces
        _within("audio", **{"frames × max_pieces": (spread, 1, MAX_FRAMES)})
        _within("audio", **{"frames × max_pieces × n_fft": (spread * self.n_fft, 1, MAX_WINDOWED)})
        if self.max_pieces > 1 and not self.whole:
            raise ValueError(f"audio: max_pieces is {self.max_pieces}, expected 1 where not the whole counts")
        _within("audio", **{"frames × max_pieces × hop / sampling_rate": (self.seconds, 0.0, MAX_SECONDS)})
        if self.kind == "whisper" and self.window != self.n_fft:
            raise ValueError(f"audio: window is {self.window}, expected n_fft, {self.n_fft}, for whisper")
        for step in self.subsampling:
            if len(step) != 3 or not (1 <= step[0] <= 64 and 1 <= step[1] <= 64 and 0 <= step[2] < step[0]):
                raise ValueError(
                    f"audio: subsampling has {step}, expected kernel and stride 1 to 64, padding below kernel"
                )
        _within("audio", **{"tokens of all frames": (self.tokens(self.frames) * self.max_pieces, 1, MAX_TOKENS)})
        for name, values, low in (("band_mean", self.band_mean, -1e6), ("band_std", self.band_std, 1e-6)):
            if values and len(values) != self.mels:
                raise ValueError(f"audio: {name} has {len(values)} values, expected {self.mels}, one a band")
            for value in values:
                _within("audio", **{name: (value, low, 1e6)})


@dataclass(frozen=True)
class MediaSpec:
    """What a bundle takes beside text; what it does not take is None."""

    version: int = VERSION
    image: ImageSpec | None = None
    audio: AudioSpec | None = None

    @classmethod
    def from_json(cls, data: Any) -> MediaSpec:
        """Of a JSON object.

        Raises:
            ValueError: a field is missing, unknown, of another type or out of its limits; the message names it.
        """
        spec = build(cls, data, "media")
        _within("media", version=(spec.version, 1, VERSION))
        for part in (spec.image, spec.audio):
            if part is not None:
                part.check()
        if spec.image and spec.audio and spec.image.placeholder == spec.audio.placeholder:
            raise ValueError(f"media: token {spec.image.placeholder} is the placeholder of images and of sound")
        return spec

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def read(path: str | Path) -> MediaSpec:
    """What is in a `media.json`.

    Raises:
        BundleError: it cannot be read, is no JSON, or a field is not what it may be; the message names field and limit.
        BundleVersionError: it is of a newer edgert.
    """
    path = Path(path)
    try:
        with path.open("rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise BundleError(f"{path}: {error.strerror}") from error
    if len(raw) > MAX_BYTES:
        raise BundleError(f"{path}: more than {MAX_BYTES} bytes, the limit")
    try:
        data = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path}: no JSON: {error}") from error
    version = data.get("version", VERSION) if isinstance(data, dict) else VERSION
    if isinstance(version, int) and version > VERSION:
        raise BundleVersionError(f"{path}: version {version} is newer than {VERSION}, the newest this edgert reads")
    try:
        return MediaSpec.from_json(data)
    except ValueError as error:
        raise BundleError(f"{path}: {error}") from error


def _check_tower(what: str, name: str) -> None:
    if not _TOWER.fullmatch(name):
        raise ValueError(f"{what}: tower is {name[:80]!r}, expected up to 64 letters, digits, _ and -")


def _check_tokens(what: str, **lists: Sequence[int]) -> None:
    for name, tokens in lists.items():
        if len(tokens) > MAX_TOKENS:
            raise ValueError(f"{what}: {name} has {len(tokens)} tokens, expected up to {MAX_TOKENS}")
        for token in tokens:
            _within(what, **{name: (token, 0, MAX_TOKEN)})


def _within(what: str, **numbers: tuple[float, float, float]) -> None:
    """Raise `ValueError` for the first that is not from its second to its third; NaN is not."""
    for name, (value, low, high) in numbers.items():
        if not (math.isfinite(value) and low <= value <= high):
            raise ValueError(f"{what}: {name} is {value}, expected {low} to {high}")
