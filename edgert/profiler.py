"""Measures a model's blocks on the devices that are here, and makes a `Profile` of it.

Each distinct block is measured once, however often a model has it: in a chain of such blocks, one submodel each, with
the caches emptied before every call, because in the real chain the other blocks' weights have passed through them in
the meantime. The whole model as one submodel is measured beside it: that tells what a cut costs, and by how much blocks
are faster in their place. A first pass warms up and is not counted. Devices take turns, round by round, so that a
machine that slows down slows all of them.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import combinations, permutations
from pathlib import Path

import numpy as np

from edgert.backends import info_of
from edgert.backends.base import Array
from edgert.bundle import Bundle
from edgert.conditions import conditions
from edgert.device import DeviceConfig, DeviceKind
from edgert.discovery import cpu_facts
from edgert.energy import Energy, Idle, Meters, total
from edgert.errors import BundleError, DeviceError, DeviceFailedError, PlanError, UsageError
from edgert.executor import DEVICE_TIMEOUT_S, Executor, SequenceRun
from edgert.graph import BlockGraph
from edgert.grid import Grid
from edgert.memory import bandwidth_gbps, eviction
from edgert.placement import HOST, Plan, tower_config
from edgert.profile import FORMAT_VERSION, Profile, Provenance, Slowdown
from edgert.samples import Kept, Key, Raw, summary
from edgert.shapes import StaticShapes
from edgert.towers import Towers, example


class Profiler:
    """Measures a bundle's blocks.

    Args:
        bundle: a model of OpenVINO IR with a block graph.
        configs: what to measure on; none of them emulated, unless `emulated` allows it.
        grid: what to measure.
        meters: that count joules; None to measure no energy.
        shapes: for devices with static shapes.
        partial: where unfinished measurements are kept, to go on with; None to keep none.
        budget_s: no second round, no second pass and no slow-down is begun when so much time has passed: what every
            configuration must have is measured in any case.
        progress: told what is done, as a text and a share from 0 to 1.
        emulated: measure emulated devices too: their numbers are `modelled`, and say nothing of any machine.

    Raises:
        UsageError: an emulated device, or a bundle without blocks.
        UnknownDeviceError: a configuration is not there.
    """

    def __init__(
        self,
        bundle: Bundle,
        configs: Sequence[DeviceConfig],
        grid: Grid,
        *,
        meters: Meters | None = None,
        shapes: StaticShapes | None = None,
        partial: Path | None = None,
        budget_s: float | None = None,
        progress: Callable[[str, float], None] | None = None,
        emulated: bool = False,
    ) -> None:
        if bundle.graph is None:
            raise BundleError(f"bundle {bundle.path}: it has no block graph, so there is nothing to measure")
        if bundle.facts.task != "decoder":
            raise UsageError(f"bundle {bundle.path}: profiles are of decoders, and its task is {bundle.facts.task}")
        if not configs:
            raise UsageError("profile: no device configuration to measure")
        for config in configs:
            if info_of(config).emulated and not emulated:
                raise UsageError(f"{config} is emulated: its results are right and its speed means nothing")
        self._bundle = bundle
        self._graph: BlockGraph = bundle.graph
        self._configs = tuple(dict.fromkeys(configs))
        self._grid = grid.within(bundle.facts.context_length)
        self._shapes = shapes
        self._meters = meters
        self._kept = Kept(partial, self._configs, self._grid, self._graph)
        self._end_s = None if budget_s is None else time.monotonic() + budget_s
        self._tell = progress or (lambda _text, _share: None)
        self._tokens = np.random.default_rng(0).integers(0, bundle.facts.vocab_size, 1 << 16).tolist()
        self._raw = {config: Raw(emulated=info_of(config).emulated) for config in self._configs}
        self._done: set[str] = set()
        self._warnings: list[str] = []
        self._conditions = conditions()
        self._reference: list[Array] = []
        seen: dict[str, list[int]] = {}
        for block in self._graph.blocks:
            seen.setdefault(block.signature, []).append(block.index)
        # The second of its kind, as the first may compute what all share.
        self._distinct = [indices[min(1, len(indices) - 1)] for indices in seen.values()]
        self._evict = eviction()

    def measure(self) -> Profile:
        """Measure everything; takes minutes."""
        self._raw, self._done = self._kept.resume(self._raw)
        self._kept.save(self._raw, self._done)  # now, if it cannot be written, and not after a round
        rest = self._rest()
        idle = None if rest is None else Idle.of(rest)
        rounds = [(number, config) for number in range(self._grid.rounds) for config in self._configs]
        for done, (number, config) in enumerate(rounds):
            name = f"{number} {config}"
            if name in self._done or config not in self._raw or (number and self._late()):
                continue
            self._tell(f"{config}, round {number + 1} of {self._grid.rounds}", done / len(rounds))
            try:
                self._round(config, idle)
            except (DeviceError, PlanError) as error:  # the others are worth as much without it
                del self._raw[config]
                self._warnings.append(f"{config} was not measured: {error}")
                if not self._raw:
                    raise
            self._done.add(name)
            self._kept.save(self._raw, self._done)
        if self._late():
            self._warnings.append("the budget was used up before all rounds and slow-downs were measured")
        self._tell("slow-down of devices beside each other", 0.97)
        return self._profile(None if rest is None else total(rest), self._slowdowns())

    def discard(self) -> None:
        """Forget what was kept to go on with; to be called when the profile is in its place."""
        self._kept.discard()

    def _late(self) -> bool:
        return self._end_s is not None and time.monotonic() > self._end_s

    def _round(self, config: DeviceConfig, idle: Idle | None) -> None:
        """Everything of one configuration once."""
        raw, graph = self._raw[config], self._graph
        if len(graph.blocks) > 1:
            chain = self._chain(config)
            blocks = [stage.placement.first for stage in chain.chains[0]]
            signatures = [graph.blocks[index].signature for index in blocks]
            self._compare(config, chain, signatures)
            # Not those that are there because they compute what all share, nor an embedding that stays on the host.
            rows = [
                number
                for number, stage in enumerate(chain.chains[0])
                if blocks[number] in self._distinct and stage.placement.config == config
            ]
            self._passes(chain, raw, raw.blocks, {row: signatures[row] for row in rows}, None)
            del chain
        self._measure_towers(config, raw)
        whole = Executor(self._bundle, Plan.single(graph, config), shapes=self._shapes, complete=True)
        own = [number for number, stage in enumerate(whole.chains[0]) if stage.placement.config == config]
        raw.calls = len(own)
        signature = graph.signature if len(graph.blocks) > 1 else graph.blocks[0].signature
        raw.paces.append(self._pace(whole))
        run = self._passes(whole, raw, raw.whole, dict.fromkeys(own, signature), idle)
        raw.paces.append(self._pace(whole))
        step_us = self._steps(run)
        start = time.perf_counter()
        states = run.read_states()
        run.write_states(run.tokens, states)
        run.forward(self._tokens[:1])  # which converts what was written
        spent_us = (time.perf_counter() - start) * 1e6 - step_us
        raw.moves.append((2.0 * sum(array.nbytes for array in states.values()), max(spent_us, 1.0)))
        del run, whole
        # What a cut costs shows best where there are most of them. Elsewhere every submodel takes minutes to compile.
        if len(graph.blocks) > 1 and not config.static and config.kind in {DeviceKind.CPU, DeviceKind.SIM}:
            plan = Plan.from_configs([config] * len(graph.blocks), "every boundary", merge=False)
            raw.cuts.append(self._pace(Executor(self._bundle, plan)))

    def _measure_towers(self, config: DeviceConfig, raw: Raw) -> None:
        """One call each, the caches emptied before it; a tower that a device does not take is left out."""
        towers = {tower.name: tower_config(config) for tower in self._graph.towers}
        plan = Plan((), "towers", towers=towers)
        runs = Towers(self._bundle, lambda: plan, fallback=None, timeout_s=DEVICE_TIMEOUT_S)
        for tower in self._graph.towers:
            inputs, rows = example(self._bundle, tower.name)
            samples = []
            try:
                for number in range(self._grid.passes + 1):
                    self._evict()
                    start = time.perf_counter_ns()
                    runs.run(tower.name, inputs)
                    if number:
                        samples.append((time.perf_counter_ns() - start) / 1000)
                raw.towers.setdefault((tower.signature, rows, 0), []).extend(samples)
            except DeviceError as error:
                self._warnings.append(f"{config}: tower {tower.name} was not measured: {error}")

    def _chain(self, config: DeviceConfig) -> Executor:
        """One submodel for each distinct block."""
        graph = self._graph
        plan = Plan.from_configs([config] * len(graph.blocks), "one by one", merge=False).with_host(graph)
        return Executor(self._bundle, plan, shapes=self._shapes, complete=True, blocks=self._distinct)

    def _passes(
        self,
        executor: Executor,
        raw: Raw,
        into: dict[Key, list[float]],
        signatures: Mapping[int, str],
        idle: Idle | None,
    ) -> SequenceRun:
        """Prefill chunks and decode steps.

        Args:
            signatures: by stage, those to keep. Where all are of one model their times are added up; else each is a
                block, and the caches are emptied before every call.
        """
        grid, together = self._grid, into is raw.whole
        before = (lambda: None) if together else self._evict
        limit = min(executor.context, self._bundle.facts.context_length)

        def call(run: SequenceRun, count: int, past: int, keep: bool) -> None:
            tokens, slots = (count, past) if executor.shapes is None else _padded(executor.shapes, count, past)
            seen = [latency_us for latency_us, _ in run.observe(self._tokens[run.past : run.past + count], before)]
            if not keep:
                return
            if together:
                key = (next(iter(signatures.values())), tokens, slots)
                into.setdefault(key, []).append(sum(seen[number] for number in signatures))
                return
            for number, signature in signatures.items():  # without a cache of its own the past says nothing
                key = (signature, tokens, slots if executor.chains[0][number].states else 0)
                into.setdefault(key, []).append(seen[number])

        run = executor.open()
        for chunk in (c for c in grid.chunks if c <= min(limit, executor.max_chunk)):
            with self._watching(idle, raw.watts.setdefault("prefill", [])):
                for number in range(grid.passes + 1):
                    if number > 1 and self._late():
                        break
                    run = self._emptied(run)
                    for past in range(0, min(2 * chunk, limit - chunk + 1), chunk):
                        call(run, chunk, past, keep=number > 0)
        run = self._emptied(run)
        for context in (c for c in grid.contexts if c + grid.steps + 2 <= limit):
            largest = min(grid.chunks[-1], executor.max_chunk)
            while run.past < context:
                run.forward(self._tokens[run.past : run.past + min(largest, context - run.past)])
            with self._watching(idle, raw.watts.setdefault("decode", [])):
                for step in range(grid.steps + 2):
                    call(run, 1, context + grid.steps // 2, keep=step > 1)
        return run

    def _emptied(self, run: SequenceRun) -> SequenceRun:
        """A sequence without tokens. With static shapes a new one: an old one would keep its larger slots."""
        if run.executor.shapes is not None:
            return run.executor.open()
        run.rewind(0)
        return run

    def _pace(self, executor: Executor) -> float:
        """Microseconds of a decode step of the whole model, behind few tokens."""
        run = executor.open()
        run.forward(self._tokens[: self._grid.chunks[0]])
        return self._steps(run)

    @contextmanager
    def _watching(self, idle: Idle | None, into: list[float]) -> Iterator[None]:
        """Note the watts above the machine's rest; nothing without meters."""
        if idle is None or self._meters is None:
            yield
            return
        with self._meters.measure(idle) as window:
            yield
        found = total(window.results)
        if found.above_idle_uj is not None and found.resolved:
            into.append(found.above_idle_uj / 1e6 / found.duration_s)

    def _compare(self, config: DeviceConfig, chain: Executor, signatures: Sequence[str]) -> None:
        """How far each block's result is from that of `CPU@f32`; what came in was off already is taken out."""
        if not self._reference:
            reference = self._chain(HOST).open()
            self._reference = [a for _, a in reference.observe(self._tokens[: self._probe], lambda: None)]
        before = 0.0
        outputs = [array for _, array in chain.open().observe(self._tokens[: self._probe], lambda: None)]
        if len(outputs) == len(self._reference):
            for signature, mine, exact in zip(signatures, outputs, self._reference, strict=True):
                squared, norm = float(np.square(mine - exact).sum()), float(np.linalg.norm(exact))
                if not np.isfinite(squared):
                    raise DeviceFailedError(f"{config}: the result of a block ({signature}) is not finite")
                self._raw[config].errors[signature] = max(0.0, squared - before) ** 0.5 / norm if norm else 0.0
                before = squared

    @property
    def _probe(self) -> int:
        return min(64, self._grid.chunks[-1])

    def _rest(self) -> tuple[Energy, ...] | None:
        """What the machine draws at rest; None without meters."""
        if self._meters is None:
            return None
        self._tell("the machine at rest", 0.0)
        with self._meters.measure() as window:
            time.sleep(3.0 if self._grid.rounds > 1 else 1.0)
        return window.results if total(window.results).resolved else None

    def _slowdowns(self) -> tuple[Slowdown, ...]:
        """How much longer decode takes on one device while another decodes too."""
        found = []
        real = [config for config, raw in self._raw.items() if not raw.emulated]
        units = {config.unit: config for config in reversed(real)}
        for pair in combinations(units.values(), 2):
            if self._late():
                break
            runs = {config: self._chain(config).open() for config in pair}
            for run in runs.values():
                run.forward(self._tokens[: self._probe])
            for config, beside in permutations(pair):
                alone = self._steps(runs[config])
                with _working(partial(self._another, runs[beside])):
                    together = self._steps(runs[config])
                found.append(Slowdown(str(config), str(beside), max(1.0, together / alone)))
        return tuple(found)

    def _another(self, run: SequenceRun) -> None:
        """One more token; from the start again before the cache needs more slots."""
        if run.past > 4 * self._probe:
            run.rewind(0)
            run.forward(self._tokens[: self._probe])
        run.forward(self._tokens[:1])

    def _steps(self, run: SequenceRun) -> float:
        """Microseconds of a decode step, median."""
        taken = []
        for _ in range(self._grid.steps + 2):
            run.forward(self._tokens[:1])
            taken.append(run.infer_us)
        return statistics.median(taken[2:])

    def _profile(self, rest: Energy | None, slowdowns: tuple[Slowdown, ...]) -> Profile:
        base = rest.mean_w if rest is not None else None
        provenance: Provenance = "measured" if rest is not None and rest.provenance == "measured" else "estimated"
        source = "" if base is None or rest is None else f"; base_w: {rest.source}, at rest"
        found = [summary(config, raw, self._graph) for config, raw in self._raw.items()]
        if (changed := conditions()) != self._conditions:
            names = [name for name in changed if changed[name] != self._conditions.get(name)]
            self._warnings.append(f"{', '.join(names)} changed while it was measured")
        read_gbps = max([bandwidth_gbps(), *(summed.device.bandwidth_gbps for summed in found)])
        return Profile(
            version=FORMAT_VERSION,
            machine=self._conditions.get("CPU", "unknown"),
            devices=tuple(summed.device for summed in found),
            base_w=base,
            base_provenance=provenance,
            shared_gbps=round(read_gbps, 1),
            memory_bytes=cpu_facts().memory_bytes,
            source=f"edgert profile on {self._bundle.facts.name}{source}",
            slowdowns=slowdowns,
            measurements=tuple(row for summed in found for row in summed.measurements),
            conditions=self._conditions,
            warnings=(*self._warnings, *(warning for summed in found for warning in summed.warnings)),
        )


@contextmanager
def _working(step: Callable[[], object]) -> Iterator[None]:
    """Another thread does something again and again."""
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            step()

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work)
        try:
            yield
        finally:
            stop.set()
        future.result()


def _padded(shapes: StaticShapes, tokens: int, past: int) -> tuple[int, int]:
    shape = shapes.fit(tokens, past)
    return shape.query, shape.past
