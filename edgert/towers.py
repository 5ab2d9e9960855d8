"""Towers: what makes rows of features of an image or a sound, on the devices that a plan says."""

from __future__ import annotations

import hashlib
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from edgert.backends import info_of, require
from edgert.backends.base import Array, Compiled, Runner, as_array
from edgert.bundle import Bundle
from edgert.device import DeviceConfig
from edgert.errors import BundleError, DeviceError, DeviceFailedError, DeviceNonsenseError, UsageError
from edgert.features import FEATURES, Kind, Medium
from edgert.guard import guarded
from edgert.placement import Plan
from edgert.results import Event

if TYPE_CHECKING:
    from edgert.media.spec import AudioSpec, ImageSpec, MediaSpec

log = logging.getLogger("edgert")
MAX_KEPT_BYTES = 64 * 2**20


class Towers:
    """The towers of a bundle; may be used from several threads. Each is compiled when it is first needed.

    Args:
        bundle: with `media`, or without: then nothing is taken but text.
        plan: gives the plan in use.
        fallback: the configuration that takes over where a tower's device fails; None to let the error through.
        timeout_s: seconds that a call into a GPU or NPU may take; see `edgert.guard`.
        width: of the rows that the decoder takes; 0 for whatever the towers give.
        max_kept_bytes: of rows, kept for images and sounds that come again.
    """

    def __init__(
        self,
        bundle: Bundle,
        plan: Callable[[], Plan],
        *,
        fallback: DeviceConfig | None,
        timeout_s: float,
        width: int = 0,
        max_kept_bytes: int = MAX_KEPT_BYTES,
    ) -> None:
        self._bundle = bundle
        self._plan = plan
        self._fallback = fallback
        self._timeout_s = timeout_s
        self._width = width
        self._max_kept_bytes = max_kept_bytes
        self._kept: OrderedDict[bytes, Array] = OrderedDict()  # the longest unused first
        self._runners: dict[str, tuple[DeviceConfig, Compiled, Runner]] = {}
        self._lock = threading.Lock()
        self.moved: dict[str, DeviceConfig] = {}
        """Where towers run whose own device has failed."""
        self.warnings: tuple[str, ...] = ()
        """Why they do."""

    @property
    def context_length(self) -> int:
        """Of the model: more tokens no prompt has."""
        return self._bundle.facts.context_length

    @property
    def media(self) -> MediaSpec | None:
        """What the model takes beside text."""
        return self._bundle.media

    def config(self, name: str) -> DeviceConfig:
        """Where a tower runs."""
        return self.moved.get(name) or self._plan().tower(name)

    def image(self, source: Any) -> Medium:
        """A picture: a path, bytes of a file, a PIL image or uint8 `[height, width, 3]`.

        Raises:
            UsageError: it is no picture, is too large, or the model takes none.
        """
        from edgert.media import prepare_image, read_image

        spec = self._image()
        return self._medium("image", prepare_image(read_image(source), spec), spec.expansion, spec)

    def audio(self, source: Any) -> Medium:
        """A sound: the path or the bytes of a WAV file, or f32 `[samples]` with their rate.

        Raises:
            UsageError: it is no sound, is too long, or the model takes none.
        """
        from edgert.media import prepare_audio, read_audio

        spec = self._audio()
        samples = read_audio(source, spec.sampling_rate, seconds=spec.seconds + 1)  # the rest is `prepare_audio`'s
        inputs, count = prepare_audio(samples, spec)
        return self._medium("audio", inputs, (*spec.prefix, *[spec.token] * count, *spec.suffix), spec)

    def _image(self) -> ImageSpec:
        media = self._bundle.media
        if media is None or media.image is None:
            raise UsageError(f"model {self._bundle.facts.name!r} takes no images")
        return media.image

    def _audio(self) -> AudioSpec:
        media = self._bundle.media
        if media is None or media.audio is None:
            raise UsageError(f"model {self._bundle.facts.name!r} takes no sound")
        return media.audio

    def _medium(
        self, kind: Kind, inputs: Mapping[str, Array], tokens: tuple[int, ...], spec: ImageSpec | AudioSpec
    ) -> Medium:
        hashed = hashlib.sha256(f"{spec.tower}/{len(tokens)}".encode())
        for name, array in sorted(inputs.items()):
            hashed.update(f"/{name}/{array.shape}/".encode())
            hashed.update(np.ascontiguousarray(array).data)
        digest = hashed.digest()
        medium = Medium(kind, digest, tokens, spec.token, lambda: self._rows(spec.tower, digest, inputs))
        medium.held_bytes = sum(array.nbytes for array in inputs.values())
        return medium

    def _rows(self, name: str, digest: bytes, inputs: Mapping[str, Array]) -> tuple[Array, list[Event]]:
        with self._lock:
            if digest in self._kept:
                self._kept.move_to_end(digest)
                return self._kept[digest], []
            events: list[Event] = []
            try:
                rows = self.run(name, inputs)
            except DeviceError as error:
                events.append(self._fail_over(name, error))
                rows = self.run(name, inputs)
            self._kept[digest] = rows
            while sum(kept.nbytes for kept in self._kept.values()) > self._max_kept_bytes:
                self._kept.popitem(last=False)
            return rows, events

    def run(self, name: str, inputs: Mapping[str, Array]) -> Array:
        """The rows of all pieces, one below the other: a tower takes one piece at a time. For one thread at once.

        Raises:
            DeviceError: the tower's device cannot be used, or failed.
            BundleError: the tower is no tower.
        """
        config, compiled, runner = self._runner(name)
        pieces = max((len(array) for array in inputs.values()), default=0)
        found = []
        for piece in range(pieces):
            own = {key: np.ascontiguousarray(array[piece : piece + 1]) for key, array in inputs.items()}
            if missing := sorted(compiled.inputs - own.keys()):
                raise BundleError(f"bundle {self._bundle.path}: tower {name} wants an input {missing[0]!r}")
            try:
                outputs = runner.infer(dict(own))
            except DeviceFailedError as error:
                error.unit = config.unit
                raise
            if FEATURES not in outputs:
                raise BundleError(f"bundle {self._bundle.path}: tower {name} gives no {FEATURES!r}")
            rows = as_array(outputs[FEATURES])
            if rows.ndim != 2 or rows.shape[1] != (self._width or rows.shape[1]):
                expected = f"[rows, {self._width or 'width'}]"
                raise BundleError(
                    f"bundle {self._bundle.path}: tower {name} gives {FEATURES} {list(rows.shape)}, expected {expected}"
                )
            found.append(rows.astype(np.float32))  # a copy: the device's buffer is reused
            if not np.isfinite(found[-1]).all():
                nonsense = DeviceNonsenseError(f"{config} failed: tower {name} gives infinite values or NaN")
                nonsense.unit = config.unit
                raise nonsense
        return found[0] if pieces == 1 else np.concatenate(found)

    def _runner(self, name: str) -> tuple[DeviceConfig, Compiled, Runner]:
        config = self.config(name)
        if name not in self._runners or self._runners[name][0] != config:
            blocks = [tower for tower in self._bundle.graph.towers if tower.name == name] if self._bundle.graph else []
            compiled = require(config).compile(self._bundle.tower_path(name), config, blocks)
            log.info("tower %s runs on %s", name, config)
            self._runners[name] = config, compiled, guarded(compiled.runner(), config, self._timeout_s)
        return self._runners[name]

    def _fail_over(self, name: str, error: DeviceError) -> Event:
        config, fallback = self.config(name), self._fallback
        if fallback is None or fallback.unit == config.unit:
            raise error
        info_of(fallback)
        self.moved[name] = fallback
        self._runners.pop(name, None)
        reason = f"tower {name}: {error}; {fallback} goes on"
        self.warnings = (*self.warnings, reason)
        log.warning("failover of tower %s", reason.removeprefix("tower "))
        return Event("failover", config.unit, 0, reason)


def example(bundle: Bundle, name: str) -> tuple[dict[str, Array], int]:
    """Inputs that a tower takes, of zeros, and how many rows it gives for them.

    Raises:
        BundleError: `media` names no such tower.
    """
    media = bundle.media
    if media is not None and media.image is not None and media.image.tower == name:
        image = media.image
        return {"pixel_values": np.zeros((1, 3, image.height, image.width), np.float32)}, image.tokens
    if media is not None and media.audio is not None and media.audio.tower == name:
        audio = media.audio
        frames = np.zeros((1, audio.mels, audio.frames), np.float32)
        mask = np.ones((1, audio.frames), np.float32)
        return {"input_features": frames, "feature_mask": mask}, audio.tokens(audio.frames)
    raise BundleError(f"bundle {bundle.path}: the block graph has a tower {name!r}, media.json has none of that name")
