"""Measures a model's blocks on the devices that are here, and makes a `Profile` of it.

Each distinct block is measured once, however often a model has it: in a chain of such blocks, one submodel each, with
the caches emptied before every call, because in the real chain the other blocks' weights have passed through them in
the meantime. The whole model as one submodel is measured beside it: that tells what a cut costs, and by how much blocks
are faster in their place. A first pass warms up and is not counted. Devices take turns, round by round, so that a
machine that slows down slows all of them.
"""

from __future__ import annotations

import json
import statistics
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import combinations, permutations
from pathlib import Path

import numpy as np
import psutil

from edgert.backends import info_of
from edgert.backends.base import Array
from edgert.bundle import Bundle
from edgert.conditions import conditions
from edgert.device import DeviceConfig, DeviceInfo, DeviceKind
from edgert.discovery import cpu_facts
from edgert.energy import Energy, Idle, Meters, total
from edgert.errors import BundleError, UsageError
from edgert.executor import Executor, SequenceRun
from edgert.graph import BlockGraph
from edgert.placement import HOST, Plan
from edgert.profile import FORMAT_VERSION, Profile, Provenance, Slowdown
from edgert.samples import Key, Raw, summary
from edgert.shapes import StaticShapes

LARGEST_CACHE = 64 * 2**20  # of a last level, where the operating system does not tell


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


class Profiler:
    """Measures a bundle's blocks.

    Args:
        bundle: a model of OpenVINO IR with a block graph.
        configs: what to measure on; none of them emulated, unless `emulated` allows it.
        grid: what to measure.
        meters: that count joules; None to measure no energy.
        declared_w: watts by device above the base, and of the `base`, for where no meter tells; marked estimated.
        shapes: for devices with static shapes.
        partial: where unfinished measurements are kept, to go on with; None to keep none.
        budget_s: no further round or pass is begun when so much time has passed; what is there is enough for a profile.
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
        declared_w: Mapping[str, float] | None = None,
        shapes: StaticShapes | None = None,
        partial: Path | None = None,
        budget_s: float | None = None,
        progress: Callable[[str, float], None] | None = None,
        emulated: bool = False,
    ) -> None:
        if bundle.graph is None:
            raise BundleError(f"bundle {bundle.path}: it has no block graph, so there is nothing to measure")
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
        self._declared_w = declared_w or {}
        self._partial = partial
        self._end_s = None if budget_s is None else time.monotonic() + budget_s
        self._tell = progress or (lambda _text, _share: None)
        self._tokens = np.random.default_rng(0).integers(0, bundle.facts.vocab_size, 1 << 16).tolist()
        self._raw = {config: Raw(emulated=info_of(config).emulated) for config in self._configs}
        self._done: set[str] = set()
        self._reference: list[Array] = []
        seen: dict[str, list[int]] = {}
        for block in self._graph.blocks:
            seen.setdefault(block.signature, []).append(block.index)
        # The second of its kind, as the first may compute what all share.
        self._distinct = [indices[min(1, len(indices) - 1)] for indices in seen.values()]
        self._evict = _eviction()

    def measure(self) -> Profile:
        """Measure everything; takes minutes."""
        self._resume()
        rest = self._rest()
        idle = None if rest is None else Idle.of(rest)
        rounds = [(number, config) for number in range(self._grid.rounds) for config in self._configs]
        for done, (number, config) in enumerate(rounds):
            name = f"{number} {config}"
            if name in self._done or (number and self._late()):
                continue
            self._tell(f"{config}, round {number + 1} of {self._grid.rounds}", done / len(rounds))
            self._round(config, idle)
            self._done.add(name)
            self._save()
        self._tell("slow-down of devices beside each other", 0.97)
        return self._profile(None if rest is None else total(rest), self._slowdowns())

    def discard(self) -> None:
        """Forget what was kept to go on with; to be called when the profile is in its place."""
        if self._partial is not None:
            self._partial.unlink(missing_ok=True)

    def _late(self) -> bool:
        return self._end_s is not None and time.monotonic() > self._end_s

    def _round(self, config: DeviceConfig, idle: Idle | None) -> None:
        """Everything of one configuration once."""
        raw, graph = self._raw[config], self._graph
        if len(graph.blocks) > 1:
            chain = self._chain(config)
            blocks = [stage.placement.first for stage in chain.chains[0]]
            signatures = [graph.blocks[index].signature for index in blocks]
            run = chain.open()
            self._compare(config, run, signatures)
            # Not those that are there because they compute what all share, nor an embedding that stays on the host.
            rows = [
                number
                for number, stage in enumerate(chain.chains[0])
                if blocks[number] in self._distinct and stage.placement.config == config
            ]
            self._passes(chain, run, raw, raw.blocks, signatures, rows, None)
            del run, chain
        whole = Executor(self._bundle, Plan.single(graph, config), shapes=self._shapes, complete=True)
        raw.calls = len(whole.chains[0])
        run = whole.open()
        self._passes(whole, run, raw, raw.whole, [graph.signature], None, idle)
        start = time.perf_counter()
        states = run.read_states()
        run.write_states(run.tokens, states)
        spent_us = (time.perf_counter() - start) * 1e6
        raw.moves.append((2.0 * sum(array.nbytes for array in states.values()), spent_us))

    def _chain(self, config: DeviceConfig) -> Executor:
        """One submodel for each distinct block."""
        graph = self._graph
        plan = Plan.from_configs([config] * len(graph.blocks), "one by one", merge=False).with_host(graph)
        return Executor(self._bundle, plan, shapes=self._shapes, complete=True, blocks=self._distinct)

    def _passes(
        self,
        executor: Executor,
        run: SequenceRun,
        raw: Raw,
        into: dict[Key, list[float]],
        signatures: Sequence[str],
        rows: Collection[int] | None,
        idle: Idle | None,
    ) -> None:
        """Prefill chunks and decode steps; `rows` are the stages to keep, None adds all of them up."""
        grid, before = self._grid, (lambda: None) if rows is None else self._evict
        limit = min(executor.context, self._bundle.facts.context_length)

        def call(count: int, past: int, keep: bool) -> float:
            shape = (count, past) if executor.shapes is None else _padded(executor.shapes, count, past)
            seen = [latency_us for latency_us, _ in run.observe(self._tokens[run.past : run.past + count], before)]
            if keep and rows is None:
                into.setdefault((signatures[0], *shape), []).append(sum(seen))
            for row in rows or () if keep else ():  # without a cache of its own the past says nothing
                tokens, slots = shape
                key = (signatures[row], tokens, slots if executor.states_of(executor.chains[0][row]) else 0)
                into.setdefault(key, []).append(seen[row])
            return sum(seen)

        for chunk in (c for c in grid.chunks if c <= min(limit, executor.max_chunk)):
            with self._watching(idle, raw.watts.setdefault("prefill", [])):
                for number in range(grid.passes + 1):
                    if number > 1 and self._late():
                        break
                    run.rewind(0)
                    for past in range(0, min(2 * chunk, limit - chunk + 1), chunk):
                        call(chunk, past, keep=number > 0)
        run.rewind(0)
        for context in (c for c in grid.contexts if c + grid.steps + 2 <= limit):
            largest = min(grid.chunks[-1], executor.max_chunk)
            while run.past < context:
                run.forward(self._tokens[run.past : run.past + min(largest, context - run.past)])
            with self._watching(idle, raw.watts.setdefault("decode", [])):
                taken = [call(1, context + grid.steps // 2, keep=step > 1) for step in range(grid.steps + 2)]
            if rows is None and len(taken) >= 8:
                half = len(taken) // 2
                raw.drifts.append(statistics.median(taken[half:]) / statistics.median(taken[2:half]))

    @contextmanager
    def _watching(self, idle: Idle | None, into: list[float]) -> Iterator[None]:
        """Note the watts above the machine's rest; nothing without meters."""
        if idle is None or self._meters is None:
            yield
            return
        with self._meters.measure(idle) as window:
            yield
        found = total(window.results)
        if found.above_idle_uj is not None and found.duration_s > 0:
            into.append(found.above_idle_uj / 1e6 / found.duration_s)

    def _compare(self, config: DeviceConfig, run: SequenceRun, signatures: Sequence[str]) -> None:
        """How far each block's result is from that of `CPU@f32`; what came in was off already is taken out."""
        if not self._reference:
            reference = self._chain(HOST).open()
            self._reference = [a for _, a in reference.observe(self._tokens[: self._probe], lambda: None)]
        before = 0.0
        outputs = [array for _, array in run.observe(self._tokens[: self._probe], lambda: None)]
        if len(outputs) == len(self._reference):
            for signature, mine, exact in zip(signatures, outputs, self._reference, strict=True):
                norm = float(np.linalg.norm(exact))
                squared = (float(np.linalg.norm(mine - exact)) / norm) ** 2 if norm else 0.0
                self._raw[config].errors[signature] = max(0.0, squared - before) ** 0.5
                before = squared
        run.rewind(0)

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
        return window.results

    def _slowdowns(self) -> tuple[Slowdown, ...]:
        """How much longer decode takes on one device while another decodes too."""
        found = []
        real = [config for config in self._configs if not self._raw[config].emulated]
        units = {config.unit: config for config in reversed(real)}
        for pair in combinations(units.values(), 2):
            if self._late():
                break
            runs = {config: self._chain(config).open() for config in pair}
            for run in runs.values():
                run.forward(self._tokens[: self._probe])
            for config, beside in permutations(pair):
                alone = self._steps(runs[config])
                with _working(lambda run=runs[beside]: run.forward(self._tokens[:1])):  # type: ignore[misc]
                    together = self._steps(runs[config])
                found.append(Slowdown(str(config), str(beside), max(1.0, together / alone)))
        return tuple(found)

    def _steps(self, run: SequenceRun) -> float:
        taken = []
        for _ in range(self._grid.steps + 2):
            run.forward(self._tokens[:1])
            taken.append(run.infer_us)
        return statistics.median(taken[2:])

    def _profile(self, rest: Energy | None, slowdowns: tuple[Slowdown, ...]) -> Profile:
        base = rest.mean_w if rest is not None else None
        provenance: Provenance = "measured" if rest is not None and rest.provenance == "measured" else "estimated"
        source = "" if base is None or rest is None else f"; base_w: {rest.source}, at rest"
        if base is None and "base" in self._declared_w:
            base, source = self._declared_w["base"], "; base_w: declared"
        found = [summary(config, raw, self._graph, self._declared_w) for config, raw in self._raw.items()]
        now = conditions()
        return Profile(
            version=FORMAT_VERSION,
            machine=now.get("CPU", "unknown"),
            devices=tuple(summed.device for summed in found),
            base_w=base,
            base_provenance=provenance,
            shared_gbps=bandwidth_gbps(),
            memory_bytes=cpu_facts().memory_bytes,
            source=f"edgert profile on {self._bundle.facts.name}{source}",
            slowdowns=slowdowns,
            measurements=tuple(row for summed in found for row in summed.measurements),
            conditions=now,
            warnings=tuple(warning for summed in found for warning in summed.warnings),
        )

    def _resume(self) -> None:
        """Take up what an earlier run of the same measurement has left."""
        if self._partial is None:
            return
        with suppress(OSError, ValueError, KeyError, TypeError):
            data = json.loads(self._partial.read_text("utf-8"))
            if data["of"] == self._what:
                raw = {config: Raw.from_json(data["raw"][str(config)]) for config in self._configs}
                self._raw, self._done = raw, set(data["done"])

    @property
    def _what(self) -> dict[str, object]:
        """What is measured, as JSON gives it back."""
        grid = {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self._grid).items()}
        return {**grid, "model": self._graph.signature, "configs": [str(config) for config in self._configs]}

    def _save(self) -> None:
        if self._partial is not None:
            raw = {str(config): raw.to_json() for config, raw in self._raw.items()}
            self._partial.parent.mkdir(parents=True, exist_ok=True)
            beside = self._partial.with_suffix(".tmp")
            beside.write_text(json.dumps({"of": self._what, "done": sorted(self._done), "raw": raw}), "utf-8")
            beside.replace(self._partial)


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


def last_level_cache(root: Path = Path("/")) -> int:
    """Bytes of the CPU's last level of cache; 64 MiB where the operating system does not tell."""
    sizes = []
    for size in root.glob("sys/devices/system/cpu/cpu0/cache/index*/size"):
        with suppress(OSError, ValueError, KeyError):
            text = size.read_text("ascii").strip()
            sizes.append(int(text[:-1]) * {"K": 2**10, "M": 2**20}[text[-1]])
    return max(sizes, default=LARGEST_CACHE)


def _eviction() -> Callable[[], object]:
    """What empties the CPU's caches: reading twice as much as they hold."""
    other = np.ones(2 * last_level_cache() // 8, np.int64)
    return lambda: np.bitwise_or.reduce(other)


def bandwidth_gbps() -> float:
    """10^9 bytes a second that all cores together read from memory, by reading what no cache holds."""
    threads = psutil.cpu_count(logical=False) or 1
    parts = [np.ones(4 * last_level_cache() // 8 // threads, np.int64) for _ in range(threads)]
    rates = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(6):
            start = time.perf_counter()
            list(pool.map(np.bitwise_or.reduce, parts))
            rates.append(sum(part.nbytes for part in parts) / (time.perf_counter() - start) / 1e9)
    return max(rates[1:])
