"""A worker whose device does harm when it is told to.

SIGUSR1    the logits of the next step are NaN
SIGUSR2    the next step never ends
"""

from __future__ import annotations

import signal
import sys
from typing import Any

import numpy as np

from edgert import batch

harm: set[int] = set()


def open_lanes(*arguments: Any, **options: Any) -> Any:
    lanes = opened(*arguments, **options)
    step = lanes.step

    def harmed(work: Any) -> Any:
        while signal.SIGUSR2 in harm:
            signal.pause()
        rows = step(work)
        if signal.SIGUSR1 in harm:
            harm.clear()
            return [np.full_like(row, np.nan) for row in rows]
        return rows

    lanes.step = harmed
    return lanes


opened, batch.open_lanes = batch.open_lanes, open_lanes
for number in (signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, lambda got, frame: harm.add(got))

if __name__ == "__main__":
    from edgert.service.worker import __main__ as worker  # after the change above

    sys.exit(worker.main())
