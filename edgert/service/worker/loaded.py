"""A bundle on a plan, ready for the loop: compiled, its lanes open, and proven by a token."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgert.backends.openvino import use_threads
from edgert.batch import Lanes, open_lanes
from edgert.bundle import Bundle
from edgert.errors import CacheFullError, DeviceFailedError, DeviceNonsenseError
from edgert.executor import Executor
from edgert.placement import Plan
from edgert.prompts import Prompts
from edgert.service.protocol import Load
from edgert.service.worker.generation import Language, Thoughts
from edgert.service.worker.grammar import Grammars
from edgert.service.worker.loop import Speed
from edgert.service.worker.plans import unit_of_logits
from edgert.text import Tokenizer
from edgert.towers import Towers

MOST_IDLE = 64


@dataclass(frozen=True)
class OnPlan:
    """A model on a plan.

    Attributes:
        lanes: None for an encoder.
        context: tokens of a sequence: the model's, what static shapes hold, or what the memory for caches does.
        speed: of a single token, as measured just now.
    """

    plan: Plan
    executor: Executor
    lanes: Lanes | None
    context: int
    speed: Speed

    @property
    def unit(self) -> str:
        return unit_of_logits(self.plan)

    @property
    def most_idle(self) -> int:
        """Idle lanes to keep; where each holds a copy of the weights, one."""
        return 1 if self.executor.exclusive else MOST_IDLE

    def places(self, asked: int) -> int:
        """Requests that run at once; where each holds a copy of the weights, one."""
        return 1 if self.executor.exclusive else asked


def open_bundle(load: Load) -> Bundle:
    """The bundle of a worker, and the threads that it may use.

    Raises:
        BundleError: it is damaged.
        UsageError: its model makes no text.
    """
    bundle = Bundle.open(Path(load.bundle), verify=load.verify)
    bundle.require_text()
    if load.threads > 0 and bundle.facts.format == "openvino":
        use_threads(load.threads)
    return bundle


def put_on(bundle: Bundle, plan: Plan, load: Load) -> OnPlan:
    """Compile a bundle for a plan, and let it compute two tokens, which are forgotten.

    Raises:
        PlanError, DeviceError, BundleError: as `Executor`; or the tokens fail.
    """
    executor = Executor(bundle, plan, timeout_s=load.device_timeout_s)
    token = bundle.facts.bos_token_id or 0
    if bundle.facts.task != "decoder":
        run = executor.open()
        _check(run.forward([token]), plan)
        return OnPlan(plan, executor, None, executor.context, Speed(batched=False))
    lanes = open_lanes(executor, kv_bytes=load.kv_bytes)
    speed = Speed(lanes.batched)
    context = min(lanes.context, lanes.room())
    lane = lanes.open()
    try:
        for number in range(min(2, context)):
            (logits,) = lanes.step([(lane, [token])])
            if number:  # the first one made what the device keeps
                speed.saw(1, 0, lanes.infer_us)
        _check(logits, plan)
    except CacheFullError:
        context = 0
    finally:
        lane.close()
    if context < 2:
        raise CacheFullError(
            f"keys and values: kv_bytes is {load.kv_bytes}, which does not hold 2 tokens of this model"
        )
    return OnPlan(plan, executor, lanes, context, speed)


def language_of(bundle: Bundle, context: int, load: Load, towers: Towers) -> Language:
    """What generations must know of a bundle.

    Raises:
        BundleError: its tokenizer is damaged.
    """
    tokenizer = Tokenizer.open(bundle.tokenizer_path)
    facts = bundle.facts
    return Language(
        tokenizer,
        Grammars(bundle.tokenizer_path, facts.vocab_size, facts.eos_token_ids),
        Thoughts.of(tokenizer),
        frozenset(facts.eos_token_ids),
        facts.vocab_size,
        context,
        load.max_tokens,
        Prompts(towers, local=False),
    )


def _check(logits: np.ndarray, plan: Plan) -> None:
    if not np.isfinite(logits).all():
        error: DeviceFailedError = DeviceNonsenseError(f"{unit_of_logits(plan)} failed: its first token is no number")
        error.unit = unit_of_logits(plan)
        raise error
