"""The CPU's caches and the memory behind them, as measuring needs to know them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil

LARGEST_CACHE = 64 * 2**20  # of a last level, where the operating system does not tell


def last_level_cache(root: Path = Path("/")) -> int:
    """Bytes of the CPU's last level of cache; 64 MiB where the operating system does not tell."""
    sizes = []
    for size in root.glob("sys/devices/system/cpu/cpu0/cache/index*/size"):
        with suppress(OSError, ValueError, KeyError):
            text = size.read_text("ascii").strip()
            sizes.append(int(text[:-1]) * {"K": 2**10, "M": 2**20}[text[-1]])
    return max(sizes, default=LARGEST_CACHE)


def eviction() -> Callable[[], object]:
    """What empties the CPU's caches: reading twice as much as they hold."""
    other = np.ones(2 * last_level_cache() // 8, np.int64)
    return lambda: np.bitwise_or.reduce(other)


def bandwidth_gbps() -> float:
    """10^9 bytes a second that all cores together read from memory, median, by reading what no cache holds."""
    threads = psutil.cpu_count(logical=False) or 1
    parts = [np.ones(4 * last_level_cache() // 8 // threads, np.int64) for _ in range(threads)]
    rates = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(12):
            start = time.perf_counter()
            list(pool.map(np.bitwise_or.reduce, parts))
            rates.append(sum(part.nbytes for part in parts) / (time.perf_counter() - start) / 1e9)
    return statistics.median(rates[1:])
