"""What of a model is measured, and where."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edgert.device import DeviceConfig, DeviceInfo, DeviceKind
from edgert.errors import UsageError


@dataclass(frozen=True)
class Grid:
    """What is measured.

    Attributes:
        contexts: numbers of tokens in the cache at which decode is measured, ascending.
        chunks: new tokens of a prefill call, ascending; each at the start of a prompt and behind another one.
        passes: how often a prefill is measured in a round, at least 1; one more warms up.
        steps: decode calls at each context in a round, at least 1; two more warm up.
        rounds: how often devices take turns.
    """

    contexts: tuple[int, ...] = (32, 512, 2048)
    chunks: tuple[int, ...] = (16, 64, 256, 512)
    passes: int = 2
    steps: int = 12
    rounds: int = 2

    def __post_init__(self) -> None:
        for name, values, low in (("contexts", self.contexts, 1), ("chunks", self.chunks, 2)):
            if not values or list(values) != sorted(set(values)) or values[0] < low:
                raise UsageError(f"grid: {name} are {list(values)}, expected ascending numbers from {low}")
        for name in ("passes", "steps", "rounds"):
            if getattr(self, name) < 1:
                raise UsageError(f"grid: {name} is {getattr(self, name)}, the least is 1")

    def within(self, context: int) -> Grid:
        """This grid without what a model of this context length has no room for."""
        room = context - self.steps - 3
        contexts = tuple(c for c in self.contexts if c <= room) or (max(1, room // 2),)
        chunks = tuple(c for c in self.chunks if c <= context) or (max(2, context // 2),)
        return Grid(contexts, chunks, self.passes, self.steps, self.rounds)


QUICK = Grid(contexts=(32, 256), chunks=(16, 64, 256), passes=2, steps=6, rounds=1)


def default_configs(devices: Sequence[DeviceInfo]) -> tuple[DeviceConfig, ...]:
    """The configurations that a plan may want: all of a CPU but the static one, the usual one of the others."""
    found: list[DeviceConfig] = []
    for info in devices:
        if info.emulated or not info.variants or DeviceKind(info.name.partition(".")[0]) is DeviceKind.ORT:
            continue
        found += [c for c in info.configs if not c.static] if info.name == DeviceKind.CPU else info.configs[:1]
    return tuple(found)
