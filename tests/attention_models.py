"""Small hand-made models: an attention over a cache in all its forms, a product with a compressed weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import openvino as ov
import openvino.opset13 as ops
from openvino.op.util import Variable, VariableInfo
from openvino.utils.node_factory import NodeFactory

Array = np.ndarray[Any, np.dtype[Any]]
Given = Callable[[int, int], dict[str, Array]]
WIDTH = 32


def rows(tokens: int, past: int, width: int = WIDTH) -> Array:
    """Random rows `[1, tokens, width]`, the same for the same place in a sequence."""
    return np.random.default_rng(past).standard_normal((1, tokens, width)).astype(np.float32)


def attention_model(**options: Any) -> tuple[ov.Model, Given]:
    """A model from `hidden` to the rows that an attention gives, and its further inputs for new tokens after others."""
    return _Attention(**options).model()


class _Attention:
    def __init__(
        self,
        heads: int = 4,
        kv_heads: int = 4,
        head_dim: int = 16,
        value_dim: int | None = None,
        scale: float | str | None = None,
        causal: bool = False,
        mask: str | None = None,
        mask_rank: int = 4,
        sinks: bool | str = False,
        softcap: float | None = None,
        softcap_after: float | None = None,
        spelled_out: bool = False,
        repeated: bool = True,
        interleaved: bool = False,
        also: str = "",
        rows_from: str = "hidden",
        places: str = "",
    ) -> None:
        self.heads, self.kv_heads, self.dims = heads, kv_heads, (head_dim, value_dim or head_dim)
        self.scale, self.causal, self.mask_kind, self.mask_rank = scale, causal, mask, mask_rank
        self.softcap, self.softcap_after = softcap, softcap_after or softcap
        self.spelled_out, self.repeated, self.interleaved, self.also = spelled_out, repeated, interleaved, also
        self.random = np.random.default_rng(1)
        self.rows_from, self.places = rows_from, places
        self.hidden = ops.parameter([-1, -1, WIDTH], np.float32, name="hidden")
        self.beam = ops.parameter([-1], np.int32, name="beam_idx")
        self.parameters, self.sinks, self.results = [self.hidden, self.beam], [], []
        self.sink = None
        if sinks:
            self.sink = ops.constant(self.random.standard_normal((1, heads, 1, 1)).astype(np.float32))
            self.sink = ops.add(self.sink, self._number()) if sinks == "computed" else self.sink

    def model(self) -> tuple[ov.Model, Given]:
        query = self._projected(self.heads, self.dims[0])
        key, value = self._cached("k", self.dims[0]), self._cached("v", self.dims[1])
        mask = None
        if self.mask_kind:
            mask = ops.parameter([-1] * self.mask_rank, getattr(ov.Type, self.mask_kind), name="mask")
            mask.output(0).set_names({"mask"})
            self.parameters.append(mask)
        if self.places:
            mask = self._from_places()
        result = (self._by_hand if self.spelled_out else self._fused)(query, key, value, mask)
        result = ops.transpose(result, np.int64([0, 2, 1, 3]))
        result = ops.reshape(result, np.int64([0, 0, self.heads * self.dims[1]]), special_zero=True)
        for parameter, name in zip(self.parameters, (self.rows_from, "beam_idx"), strict=False):
            parameter.output(0).set_names({name})
        model = ov.Model([ops.result(result), *self.results], self.sinks, self.parameters, "attention")
        model.output(0).set_names({"rows"})
        for number, port in enumerate(model.outputs[1:]):
            port.set_names({f"extra.{number}"})
        return model, self._given

    def _given(self, tokens: int, past: int) -> dict[str, Array]:
        if not self.mask_kind:
            return {}
        seen = np.random.default_rng(past + tokens).random((tokens, past + tokens)) < 0.7
        seen[:, 0] = True
        mask = seen if self.mask_kind == "boolean" else np.where(seen, 0.5, np.finfo(np.float32).min).astype(np.float32)
        return {"mask": mask.reshape([1] * (self.mask_rank - 2) + [tokens, past + tokens])}

    def _from_places(self) -> ov.Node:
        """A mask that compares places in the sequence; in `places` what is special about it."""
        ones = ops.parameter([-1, -1], np.int64, name="attention_mask")
        ones.output(0).set_names({"attention_mask"})
        self.parameters.append(ones)
        new = ops.gather(ops.shape_of(self.hidden), np.int64(1), np.int64(0))
        total = ops.gather(ops.shape_of(ones), np.int64(1), np.int64(0))
        past = ops.subtract(total, new)
        first = ops.add(past, np.int64(1)) if "later" in self.places else past
        every = ops.unsqueeze(ops.range(np.int64(0), total, np.int64(1), "i64"), np.int64([0]))
        rows = ops.range(first, ops.add(first, new), np.int64(1), "i64")
        if "shifted" in self.places:
            rows = ops.add(ops.range(np.int64(0), new, np.int64(1), "i64"), past)
        rows = ops.unsqueeze(rows, np.int64([1]))
        if "greater" in self.places:
            seen = ops.greater_equal(rows, every)
        else:
            seen = ops.less(every, rows) if "less" in self.places else ops.less_equal(every, rows)
        if "window" in self.places:
            seen = ops.logical_and(seen, ops.greater(every, ops.subtract(rows, np.int64(4))))
        if "padding" in self.places:
            seen = ops.logical_and(seen, ops.convert(ones, "boolean"))
        if "added" in self.places:
            least = -5.0 if "little" in self.places else np.finfo(np.float32).min
            seen = ops.select(seen, np.float32(0), np.float32(least))
        return ops.unsqueeze(seen, np.int64([0, 1]))

    def _number(self) -> ov.Node:
        """A number that depends on the input."""
        return ops.reduce_max(self.hidden, np.int64([0, 1, 2]))

    def _projected(self, heads: int, width: int) -> ov.Node:
        weights = self.random.standard_normal((heads * width, WIDTH)).astype(np.float32) / 4
        product = ops.matmul(self.hidden, ops.constant(weights), False, True)
        split = ops.reshape(product, np.int64([0, 0, heads, width]), special_zero=True)
        return ops.transpose(split, np.int64([0, 2, 1, 3]))

    def _cached(self, name: str, width: int) -> ov.Node:
        batch = ops.gather(ops.shape_of(self.hidden), np.int64([0]), np.int64(0))
        empty = ops.broadcast(np.float32(0), ops.concat([batch, np.int64([self.kv_heads, 0, width])], 0))
        info = VariableInfo()
        info.data_shape, info.data_type = ov.PartialShape([-1, self.kv_heads, -1, width]), ov.Type.f32
        info.variable_id = name
        variable = Variable(info)
        read = ops.read_value(empty, variable)
        past = ops.gather(read, self.beam, np.int64(0))
        full = ops.concat([past, self._projected(self.kv_heads, width)], -2)
        self.sinks.append(ops.assign(full, variable))
        other = {"state": read, "past": past, "keys": full}.get(self.also)
        if name == "k" and other is not None:
            self.results.append(ops.result(ops.abs(other)))
        groups = self.heads // self.kv_heads
        if groups == 1 or not self.repeated:
            return full
        shape = ops.shape_of(full)
        size = {axis: ops.gather(shape, np.int64([axis]), np.int64(0)) for axis in (0, 2)}
        order = [groups, self.kv_heads] if self.interleaved else [self.kv_heads, groups]
        target = ops.concat([size[0], np.int64(order), size[2], np.int64([width])], 0)
        wide = ops.broadcast(ops.unsqueeze(full, np.int64(1 if self.interleaved else 2)), target)
        return ops.reshape(wide, np.int64([0, self.heads, -1, width]), special_zero=True)

    def _fused(self, query: ov.Node, key: ov.Node, value: ov.Node, mask: ov.Node | None) -> ov.Node:
        inputs = [query, key, value]
        scale = self._number() if self.scale == "computed" else self.scale
        if mask is not None or scale is not None or self.sink is not None:
            inputs.append(ops.constant(np.float32(0)) if mask is None else mask)
        if scale is not None or self.sink is not None:
            default = self.dims[0] ** -0.5 if scale is None else scale
            inputs.append(scale if isinstance(scale, ov.Node) else ops.constant(np.float32(default)))
        if self.sink is not None:
            inputs.append(self.sink)
        return NodeFactory().create("ScaledDotProductAttention", inputs, {"causal": self.causal})

    def _by_hand(self, query: ov.Node, key: ov.Node, value: ov.Node, mask: ov.Node | None) -> ov.Node:
        scores = ops.matmul(query, ops.transpose(key, np.int64([0, 1, 3, 2])), False, False)
        if self.scale is not None:
            scores = ops.multiply(scores, np.float32(self.scale))
        if self.softcap is not None:
            scores = ops.tanh(ops.divide(scores, np.float32(self.softcap)))
            scores = ops.multiply(scores, np.float32(self.softcap_after))
        if mask is not None:
            scores = ops.add(scores, mask)
        if self.sink is not None:
            size = ops.gather(ops.shape_of(scores), np.int64([0, 1, 2]), np.int64(0))
            column = ops.broadcast(self.sink, ops.concat([size, np.int64([1])], 0))
            scores = ops.concat([scores, column], -1)
            scores = ops.subtract(scores, ops.reduce_max(scores, np.int64([-1]), keep_dims=True))
        shares = ops.softmax(scores, -1)
        if self.sink is not None:
            shares = ops.slice(shares, np.int64([0]), np.int64([-1]), np.int64([1]), np.int64([3]))
        return ops.matmul(shares, value, False, False)


def weights_of(
    columns: int = 64,
    kind: str = "u4",
    groups: int = 1,
    scale: float | None = None,
    zero: float | None = None,
    transposed: bool = True,
    columns_first: bool = False,
    experts: bool = False,
    compressed: bool = True,
    data: ov.Node | None = None,
    seed: int = 0,
) -> ov.Model:
    """A product with a weight of 48 rows, or 4 times 48; its codes are called `codes`, its scales are f32."""
    random = np.random.default_rng(seed)
    data = data or ops.parameter([1, -1, columns], np.float32, name="hidden")
    shape = [48, columns] if transposed else [columns, 48]
    axis = -1
    if experts:
        shape = [4, *shape]
    elif columns_first:
        shape, axis, transposed = [columns, 48] if groups == 1 else [groups, columns // groups, 48], -2, False
    elif groups > 1:
        shape = [48, groups, columns // groups]
    low, high = {"u4": (0, 16), "u8": (0, 256), "i8": (-128, 128)}[kind]
    codes = ops.constant(random.integers(low, high, shape), dtype=getattr(ov.Type, kind))
    codes.set_friendly_name("codes")
    weight = ops.convert(codes, "f32")
    if zero is not None:
        weight = ops.subtract(weight, np.float32(zero))
    sizes = [1 if n == len(shape) + axis else size for n, size in enumerate(shape)]
    scales = random.uniform(0.5, 1, sizes) if scale is None else np.full(sizes, scale)
    weight = ops.multiply(weight, scales.astype(np.float32))
    if groups > 1 and not experts:
        weight = ops.reshape(weight, np.int64([columns, 48] if columns_first else [48, columns]), special_zero=False)
    if not compressed:
        weight = ops.constant(random.standard_normal(shape).astype(np.float32))
    product = ops.matmul(data, weight, False, transposed)
    return ov.Model([ops.result(product)], [data], "product")
