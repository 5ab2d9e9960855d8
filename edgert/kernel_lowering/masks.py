"""Masks that say no more than that tokens see what came before them: the attention kernel knows that by itself.

A mask is as large as all scores of a head, and a few dozen small operations make it. There is one sequence, so that its
`attention_mask` is all ones and hides nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from edgert.graph import BOUNDARY
from edgert.kernel_lowering.attention import State
from edgert.kernel_lowering.view import Item, Tensor, dims_of, integers, scalar

HIDDEN = -30000.0  # what is at most this is hidden, for the kernel too
_AND = {"BitwiseAnd", "LogicalAnd"}
_SAME_NUMBERS = {"Convert", "Reshape", "Unsqueeze", "Squeeze"}
_SOME_OF_THEM = _SAME_NUMBERS | {"Broadcast", "Gather", "GatherND", "Slice", "StridedSlice", "Transpose"}


@dataclass(frozen=True)
class _Size:
    """A number that follows from how many tokens there are: `past` times the past ones, and so on."""

    past: int
    new: int
    fixed: int = 0

    def plus(self, other: _Size, times: int = 1) -> _Size:
        return _Size(self.past + times * other.past, self.new + times * other.new, self.fixed + times * other.fixed)


_PAST, _NEW, _TOTAL, _ZERO = _Size(1, 0), _Size(0, 1), _Size(1, 1), _Size(0, 0)


class Masks:
    """Looks at masks, each once.

    Args:
        caches: by the number of the Concat where new rows join.
    """

    def __init__(self, caches: Mapping[int, State]) -> None:
        self._tokens = dict.fromkeys(caches, _TOTAL)
        for state in caches.values():
            self._tokens |= {item.number: _PAST for item in state.past}
        self._known: dict[Tensor, bool] = {}

    def is_causal(self, mask: Tensor) -> bool:
        """Whether a mask shows token m of the new ones the past and the new ones up to itself, and nothing else."""
        if mask not in self._known:
            self._known[mask] = self._is_causal(mask)
        return self._known[mask]

    def _is_causal(self, tensor: Tensor) -> bool:
        item = tensor[0]
        while item.type in {"Broadcast", "Unsqueeze"} or (item.type == "Convert" and item.element() == "f32"):
            if item.type == "Unsqueeze" and integers(item.inputs[1]) not in ([0], [0, 1], [1]):
                return False
            item = item.source(0)
        if item.type == "Select":
            shown, hidden = scalar(item.inputs[1]), scalar(item.inputs[2])
            if shown != 0 or hidden is None or hidden > HIDDEN:
                return False
            item = item.source(0)
        elif item.element() != "boolean":
            return False
        parts = [part for part in self._conjunction(item) if not self._is_true(part)]
        return len(parts) == 1 and self._compares(parts[0])

    def _conjunction(self, item: Item) -> list[Item]:
        parts = [item]
        while any(part.type in _AND for part in parts):
            parts = [p for part in parts for p in ([s for s, _ in part.inputs] if part.type in _AND else [part])]
        return parts

    def _is_true(self, item: Item) -> bool:
        """Whether all that a tensor holds is true."""
        if item.value is not None:
            return bool(item.value.all())
        while item.type in _SOME_OF_THEM:
            item = item.source(0)
        return item.type == "Parameter" and "attention_mask" in item.op.output(0).get_names()

    def _compares(self, item: Item) -> bool:
        """Whether `item` is true where the place of a column, `0 … total`, is at most that of a row, `past … total`."""
        if item.type == "LessEqual":
            columns, rows = item.inputs
        elif item.type == "GreaterEqual":
            rows, columns = item.inputs
        else:
            return False
        places = self._places(columns), self._places(rows)
        return places == ((_ZERO, _TOTAL), (_PAST, _TOTAL)) and _axis(columns) == 1 and _axis(rows) == 2

    def _places(self, tensor: Tensor) -> tuple[_Size, _Size] | None:
        """The first and the end of consecutive numbers."""
        item = tensor[0]
        while item.type in _SAME_NUMBERS:
            item = item.source(0)
        if item.type == "Add":
            for inner, other in (item.inputs, item.inputs[::-1]):
                places, shift = self._places(inner), self._size(other[0])
                if places is not None and shift is not None:
                    return places[0].plus(shift), places[1].plus(shift)
        if item.type != "Range" or scalar(item.inputs[2]) != 1:
            return None
        first, end = (self._size(source) for source, _ in item.inputs[:2])
        return None if first is None or end is None else (first, end)

    def _size(self, item: Item) -> _Size | None:
        """What number of tokens a tensor of one element is."""
        number = scalar((item, 0))
        if number is not None:
            return _Size(0, 0, int(number))
        while item.type in _SAME_NUMBERS:
            item = item.source(0)
        if item.type in {"Add", "Subtract"}:
            left, right = (self._size(source) for source, _ in item.inputs)
            sign = -1 if item.type == "Subtract" else 1
            return None if left is None or right is None else left.plus(right, sign)
        chosen = integers(item.inputs[1]) if item.type == "Gather" else None
        if chosen is None or len(chosen) != 1:
            return None
        shape = item.source(0)
        if shape.type == "Concat" and all(dims_of(part) == (1,) for part in shape.inputs):
            return self._size(shape.source(chosen[0])) if 0 <= chosen[0] < len(shape.inputs) else None
        return self._dimension(shape.inputs[0], chosen[0]) if shape.type == "ShapeOf" else None

    def _dimension(self, tensor: Tensor, axis: int) -> _Size | None:
        item = tensor[0]
        if item.number in self._tokens:
            return self._tokens[item.number] if axis in (2, -2) else None
        if item.type != "Parameter" or axis not in (1, -1):
            return None
        names = item.op.output(0).get_names()
        return _NEW if names & {"input_ids", BOUNDARY} else _TOTAL if "attention_mask" in names else None


def _axis(tensor: Tensor) -> int | None:
    """Which dimension is the only one larger than 1, from the end."""
    dims = dims_of(tensor) or ()
    large = [len(dims) - axis for axis, size in enumerate(dims) if size != 1]
    return large[0] if len(large) == 1 else None
