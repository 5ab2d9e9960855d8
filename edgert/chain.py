"""The stages of one phase, as one sequence goes through them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from edgert.backends.base import Array, Runner, Tensor, as_array
from edgert.device import DeviceConfig
from edgert.errors import DeviceFailedError
from edgert.graph import BOUNDARY
from edgert.guard import guarded
from edgert.kvcache import trim

if TYPE_CHECKING:
    from edgert.stages import Stage


class Chain:
    """The stages of one phase with the infer requests of one sequence, which are made when they are first needed.

    Args:
        made: runners of the sequence by stage: a stage that is in both phases has one, and its cache stays in it.
        timeout_s: how long a device may take for a call; see `edgert.guard`.
    """

    def __init__(self, stages: Sequence[Stage], made: dict[int, Runner], timeout_s: float) -> None:
        self.stages = stages
        self._made = made
        self._timeout_s = timeout_s

    @cached_property
    def runners(self) -> list[Runner]:
        for stage in self.stages:
            if id(stage) not in self._made:
                config = stage.placement.config
                with _on(config):
                    runner = stage.compiled.runner()
                # With static shapes only the device's own part is guarded: the cache is the host's, and can be saved.
                self._made[id(stage)] = runner if config.static else guarded(runner, config, self._timeout_s)
        return [self._made[id(stage)] for stage in self.stages]

    def run(self, inputs: dict[str, Tensor], stages: range) -> dict[str, Tensor]:
        """Send tensors through some stages; gives the outputs of the last one."""
        outputs: dict[str, Tensor] = {}
        for runner, config, boundary in self._steps[stages.start : stages.stop]:
            try:  # as `_on`, which would cost a microsecond a stage
                outputs = runner.infer(inputs)
            except DeviceFailedError as error:
                error.unit = config.unit
                raise
            inputs.update(outputs)
            if boundary is not None:
                inputs[BOUNDARY] = as_array(outputs[BOUNDARY]).astype(boundary)
        return outputs

    @cached_property
    def _steps(self) -> list[tuple[Runner, DeviceConfig, type[np.floating[Any]] | None]]:
        """For each stage also the type that the next one takes, where that is not what this one gives."""
        configs = [stage.placement.config for stage in self.stages]
        after = [*configs[1:], configs[-1]]
        types = [
            None if a.half == b.half else np.float16 if b.half else np.float32
            for a, b in zip(configs, after, strict=True)
        ]
        return list(zip(self.runners, configs, types, strict=True))

    def segments(self) -> list[range]:
        """Neighbouring stages on the same hardware."""
        units = [stage.placement.config.unit for stage in self.stages]
        starts = [i for i, unit in enumerate(units) if i == 0 or units[i - 1] != unit]
        return [range(a, b) for a, b in zip(starts, [*starts[1:], len(units)], strict=True)]

    def read_states(self) -> dict[str, Array]:
        states: dict[str, Array] = {}
        for config, runner in self._keepers():
            with _on(config):
                states |= runner.read_states()
        return states

    def write_states(self, states: Mapping[str, Array], skip: Collection[Runner] = ()) -> None:
        for config, runner in self._keepers():
            if runner not in skip:
                with _on(config):
                    runner.write_states(states)

    def rewind(self, length: int) -> bool:
        """Keep the first tokens of all caches; False where a state does not allow it, and then it must be reset."""
        for config, runner in self._keepers():
            with _on(config):
                if runner.rewind(length):
                    continue
                kept = trim(runner.read_states(), length)
                if kept is None:
                    return False
                runner.write_states(kept)
        return True

    def take_over(self, other: Chain) -> None:
        """Copy the cache of the other phase; what both have in common is there already.

        State by state, so that no second cache is needed on the way.
        """
        for stage, runner in zip(other.stages, other.runners, strict=True):
            for name in () if runner in self.runners else stage.states or ():
                with _on(stage.placement.config):
                    rows = runner.read_states([name])
                self.write_states(rows, skip=other.runners)

    def reset(self) -> None:
        for config, runner in self._keepers() if "runners" in self.__dict__ else ():
            with _on(config):
                runner.reset()

    def _keepers(self) -> list[tuple[DeviceConfig, Runner]]:
        """Those that keep states. The others need not be asked, and one that has failed could not answer."""
        pairs = zip(self.stages, self.runners, strict=True)
        return [(stage.placement.config, runner) for stage, runner in pairs if stage.states is None or stage.states]


@contextmanager
def _on(config: DeviceConfig) -> Iterator[None]:
    """Say of an error on which hardware it happened."""
    try:
        yield
    except DeviceFailedError as error:
        error.unit = config.unit
        raise
