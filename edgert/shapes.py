"""The static shapes that submodels are compiled for, and what their inputs and outputs are called."""

from __future__ import annotations

from dataclasses import dataclass

from edgert.errors import ContextOverflowError, UsageError

KEEP = "logits_to_keep"  # the head's input that says for how many of the last tokens logits are wanted
PRELUDE = "prelude."  # names of what submodels share beside the residual stream begin so
CARRIED = "carried."  # and those of what one computes of the residual stream or a state for others than the next
PAST, NEW = "past.", "new."  # cache inputs and outputs of static submodels are called so, then the id of the state
MAX_CHUNK, MAX_BUCKET = 4096, 2**20
QUERY, TOTAL = "query", "total"
FORM = 1  # of static submodels: raised whenever `edgert.static.lower` makes others of the same model
Axes = tuple[int | str, ...]
"""What the dimensions of a tensor are: numbers, `query` (rows of new tokens) or `total` (past and new ones)."""


@dataclass(frozen=True, order=True)
class StaticShape:
    """One set of static dimensions.

    Attributes:
        query: rows of new tokens, padding included.
        past: slots for keys and values of earlier tokens; 0 for a submodel without any.
    """

    query: int
    past: int

    def __str__(self) -> str:
        return f"{self.query}+{self.past}"


@dataclass(frozen=True)
class StaticShapes:
    """The shapes that a static submodel is compiled for: every chunk, and a single token, with every bucket.

    Attributes:
        chunks: tokens of a prefill call, ascending, each 2 to 4096.
        buckets: tokens that keys and values have room for, ascending; the last is the limit of a sequence.
    """

    chunks: tuple[int, ...] = (256,)
    buckets: tuple[int, ...] = (512, 1024, 2048, 4096, 8192)

    def __post_init__(self) -> None:
        for name, values, low, high in (
            ("chunks", self.chunks, 2, MAX_CHUNK),
            ("buckets", self.buckets, 1, MAX_BUCKET),
        ):
            if not values or list(values) != sorted(set(values)) or values[0] < low or values[-1] > high:
                raise UsageError(
                    f"static shapes: {name} are {list(values)}, expected ascending numbers {low} to {high}"
                )

    def within(self, context: int) -> StaticShapes:
        """These shapes without buckets that a model of this context length cannot fill."""
        kept = [bucket for bucket in self.buckets if bucket < context]
        last = next((bucket for bucket in self.buckets if bucket >= context), None)
        return StaticShapes(self.chunks, tuple(kept) if last is None else (*kept, min(last, context)))

    def fit(self, tokens: int, past: int) -> StaticShape:
        """The smallest shape that takes `tokens` new tokens after `past` others and has room for all of them."""
        query = next((q for q in (1, *self.chunks) if q >= tokens), None)
        if query is None:
            raise UsageError(f"static shapes: {tokens} tokens at once, the limit is {self.chunks[-1]}")
        return StaticShape(query, self.bucket(past + tokens))

    def bucket(self, tokens: int) -> int:
        """The smallest bucket with room for `tokens`; raises `ContextOverflowError` where there is none."""
        for bucket in self.buckets:
            if bucket >= tokens:
                return bucket
        limit = self.buckets[-1]
        raise ContextOverflowError(
            f"static shapes: {tokens} tokens, the largest bucket holds {limit}", tokens=tokens, limit=limit
        )
