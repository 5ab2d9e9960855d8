"""Put the kernels' operations in the place of what patterns found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import openvino as ov
import openvino.opset13 as ops
from openvino.op import Constant

from edgert.errors import PlanError
from edgert.graph import BOUNDARY
from edgert.kernel_lowering.attention import Attention, State
from edgert.kernel_lowering.linears import Linear, Lookup
from edgert.kernel_lowering.projections import Projections, Rows, Tables
from edgert.kernel_lowering.view import Item, Tensor, View, dims_of, element_of, integers, last_dim
from edgert.kernel_lowering.weights import Packable
from edgert.kvlayout import CACHE, PAST, KvLayout
from edgert.packing import Array


class Factory(Protocol):
    """Makes nodes of the extension's operations: OpenVINO's `NodeFactory`."""

    def create(self, name: str, inputs: Sequence[ov.Output], attributes: dict[str, Any], /) -> ov.Node: ...


class Rewriter:
    """Changes a model in place, tensor by tensor in topological order.

    Args:
        content: gives packed weights.
    """

    def __init__(self, view: View, factory: Factory, content: Callable[[Packable], Array]) -> None:
        self._view = view
        self._create = factory.create
        self._content = content
        self._replaced: dict[Tensor, ov.Output] = {}
        self._weights: dict[int, ov.Output] = {}
        self._tables: dict[tuple[Tensor, int], ov.Output] = {}
        self._variables = {variable.get_info().variable_id: variable for variable in view.model.get_variables()}
        self._past: ov.Node | None = None
        self._numbers: dict[tuple[bool, str, bool], ov.Output] = {}
        self.arrays: list[Array] = []  # that constants of the model share the memory of
        self.parameters: list[ov.Node] = []

    def lookup(self, found: Lookup) -> None:
        shape = found.weights.shape
        attributes = {
            "in_features": shape.in_features,
            "out_features": shape.out_features,
            "bits": shape.bits,
            "group": shape.group,
            "asymmetric": shape.asymmetric,
        }
        node = self._create("EmbeddingLookup", [self._output(found.ids), self._weight(found.weights)], attributes)
        self._replace(found.end, node.output(0))

    def linear(self, found: Linear) -> ov.Output:
        """The product; in the place of the tensor that it gives, if it gives one."""
        shape = found.weights.shape
        inputs = [self._output(found.data), self._weight(found.weights)]
        if found.norm is not None:
            inputs.append(_constant(found.norm.ones_or_weight))
        if found.bias is not None:
            inputs.append(_constant(found.bias))
        if found.residual is not None:
            inputs.append(self._output(found.residual))
        attributes = {
            "in_features": shape.in_features,
            "out_features": shape.out_features,
            "bits": shape.bits,
            "group": shape.group,
            "asymmetric": shape.asymmetric,
            "norm": "" if found.norm is None else "rms",
            "epsilon": 0.0 if found.norm is None else found.norm.epsilon,
            "gated": shape.gated,
            "activation": found.activation,
            "bias": found.bias is not None,
            "residual": found.residual is not None,
        }
        node = self._create("QuantizedLinear", inputs, attributes)
        node.set_friendly_name(found.products[0].name)
        if found.end is not None:
            self._replace(found.end, node.output(0))
        return node.output(0)

    def attention(self, found: Attention, taken: Projections, layout: KvLayout, number: int) -> None:
        """The attention, over a cache that is a new input of the model."""
        cache = ops.parameter([-1, layout.heads, layout.block_bytes], ov.Type.u8, f"{CACHE}{number}")
        cache.output(0).set_names({f"{CACHE}{number}"})
        self.parameters.append(cache)
        inputs = [self._projected(taken), cache.output(0), self._past_parameter().output(0)]
        if found.mask is not None:
            inputs.append(self._mask(found.mask))
        if taken.rope is not None:
            inputs += [self._table(table, taken.rope) for table in (taken.rope.cos, taken.rope.sin)]
        if taken.norms is not None:
            inputs += [_constant(norm.ones_or_weight) for norm in taken.norms]
        if found.sinks is not None:
            assert found.sinks.value is not None
            inputs.append(_constant(found.sinks.value.astype(np.float32).reshape(-1)))
        attributes = {
            "heads": found.heads,
            "kv_heads": found.kv_heads,
            "head_dim": found.head_dim,
            "value_dim": found.value_dim,
            "scale": found.scale,
            "softcap": found.softcap,
            "precision": layout.precision,
            "rope": "" if taken.rope is None else "half",
            "norm": "" if taken.norms is None else "rms",
            "epsilon": 0.0 if taken.norms is None else taken.norms[0].epsilon,
            "causal": found.causal,
            "mask": found.mask is not None,
            "sinks": found.sinks is not None,
        }
        node = self._create("CachedAttention", inputs, attributes)
        node.set_friendly_name(found.result[0].name)
        self._attended(found, node.output(0))

    def forget(self, state: State, extra: Sequence[Item]) -> None:
        """Take a state out of the model; whoever asked for its shape is answered with `past`.

        Args:
            extra: operations between its Concat and the attention.
        """
        for item in state.past:
            self._answer_shape(item, total=False)
        for item in (state.concat, *extra):
            self._answer_shape(item, total=True)
        self._view.model.remove_sink(state.assign.op)
        self._view.model.remove_variable(self._variables[state.id])

    def answer_shapes(self, linear: Linear) -> None:
        """Whoever asked for the shape of a norm's result asks for that of its data instead."""
        if linear.norm is not None:
            for product in linear.products:
                source, port = product.inputs[0]
                for user, at in source.users.get(port, ()):
                    if user.type == "ShapeOf":
                        user.op.input(at).replace_source_output(self._output(linear.norm.data))

    def _output(self, tensor: Tensor) -> ov.Output:
        return self._replaced[tensor] if tensor in self._replaced else tensor[0].op.output(tensor[1])

    def _replace(self, tensor: Tensor, new: ov.Output) -> None:
        for consumer in tensor[0].op.output(tensor[1]).get_target_inputs():
            consumer.replace_source_output(new)
        self._replaced[tensor] = new

    def _weight(self, packable: Packable) -> ov.Output:
        array = self._content(packable)
        at = array.ctypes.data
        if at not in self._weights:
            self._weights[at] = Constant(array, shared_memory=True).output(0)
            self.arrays.append(array)
        return self._weights[at]

    def _projected(self, taken: Projections) -> ov.Output:
        """Queries, keys and values side by side: f32 `[1, tokens, columns]`."""
        if taken.whole is not None:
            given = taken.whole
            output = self.linear(given) if isinstance(given, Linear) else self._output(given)
            dims = dims_of(given.data if isinstance(given, Linear) else given) or ()
            columns = sum(rows.heads * rows.width for rows in (taken.query, taken.key, taken.value))
            return output if len(dims) == 3 else _shaped(output, [1, -1, columns])
        parts = [self._side(rows) for rows in (taken.query, taken.key, taken.value)]
        return ops.concat(parts, -1).output(0)

    def _side(self, rows: Rows) -> ov.Output:
        output = self._output(rows.tensor)
        if rows.joined and len(dims_of(rows.tensor) or ()) == 3:
            return output
        if rows.heads_first and not rows.joined:
            output = ops.transpose(output, ops.constant([0, 2, 1, 3], ov.Type.i64)).output(0)
        return _shaped(output, [1, -1, rows.heads * rows.width])

    def _mask(self, tensor: Tensor) -> ov.Output:
        """A mask `[1, heads or 1, tokens or 1, total]`, f32 or boolean."""
        output, rank = self._output(tensor), len(dims_of(tensor) or ())
        if element_of(tensor) not in {"f32", "boolean"}:
            output = ops.convert(output, "f32").output(0)
        if rank < 4:
            output = ops.unsqueeze(output, ops.constant(list(range(4 - rank)), ov.Type.i64)).output(0)
        return output

    def _table(self, tensor: Tensor, tables: Tables) -> ov.Output:
        """A table f32 `[1, tokens, size]`, made once for all layers."""
        key = (tensor, tables.size)
        if key not in self._tables:
            output, width = self._output(tensor), last_dim(tensor)
            if len(dims_of(tensor) or ()) != 3 or (dims_of(tensor) or ())[1] == 1:
                output = _shaped(output, [1, -1, width or 0])
            if width != tables.size:  # one table for both halves
                output = ops.concat([output, output], -1).output(0)
            self._tables[key] = output
        return self._tables[key]

    def _attended(self, found: Attention, new: ov.Output) -> None:
        """Put `[1, tokens, heads * value_dim]` in the place of `[batch, heads, tokens, value_dim]`."""
        width = found.heads * found.value_dim
        users = [user for user in found.result[0].all_users if user.type != "ShapeOf"]
        if len(users) == 1 and users[0].type == "Transpose" and integers(users[0].inputs[1]) == [0, 2, 1, 3]:
            after = users[0].all_users
            if after and all(user.type == "Reshape" and _is_joining(user, width) for user in after):
                for user in after:
                    self._replace((user, 0), new)
                return
            self._replace((users[0], 0), _shaped(new, [1, -1, found.heads, found.value_dim]))
            return
        rows = _shaped(new, [1, -1, found.heads, found.value_dim])
        self._replace(found.result, ops.transpose(rows, ops.constant([0, 2, 1, 3], ov.Type.i64)).output(0))

    def _past_parameter(self) -> ov.Node:
        if self._past is None:
            self._past = ops.parameter([1], ov.Type.i64, PAST)
            self._past.output(0).set_names({PAST})
            self.parameters.append(self._past)
        return self._past

    def _answer_shape(self, item: Item, *, total: bool) -> None:
        """Let the consumers of a cache's shape have it without the cache."""
        for shape_of in item.all_users:
            if shape_of.type != "ShapeOf":
                continue
            kind, dims = shape_of.element(), item.dims()
            assert dims is not None
            for user, _ in shape_of.users.get(0, ()):
                chosen = integers(user.inputs[1]) if user.type == "Gather" and user.source(0) is shape_of else None
                if chosen is None or len(chosen) != 1:
                    continue
                size = self._size(dims, chosen[0] % len(dims), kind, total, vector=bool(user.dims()))
                self._replace((user, 0), size)
            rest = [user for user in shape_of.all_users if (user, 0) not in self._replaced]
            if rest:
                sizes = [self._size(dims, axis, kind, total, vector=True) for axis in range(len(dims))]
                self._replace((shape_of, 0), ops.concat(sizes, 0).output(0))

    def _size(self, dims: Sequence[int | None], axis: int, kind: str, total: bool, *, vector: bool) -> ov.Output:
        """One size of a cache: the batch is 1, and what is not known is the number of tokens."""
        known = 1 if axis == 0 else dims[axis]
        if known is not None:
            number = np.array([known] if vector else known, np.int32 if kind == "i32" else np.int64)
            return Constant(number).output(0)
        key = (total, kind, vector)
        if key not in self._numbers:
            output = self._past_parameter().output(0)
            if total:
                output = ops.add(output, self._new_tokens()).output(0)
            if kind != "i64":
                output = ops.convert(output, kind).output(0)
            if not vector:
                output = ops.squeeze(output, ops.constant([0], ov.Type.i64)).output(0)
            self._numbers[key] = output
        return self._numbers[key]

    def _new_tokens(self) -> ov.Node:
        """The number of new tokens, i64 `[1]`, off the input that has as many rows."""
        inputs = {port.get_any_name(): port for port in self._view.model.inputs}
        rows = inputs.get(BOUNDARY) or inputs.get("input_ids")
        if rows is None:
            raise PlanError("CPU kernels: the model takes neither input_ids nor hidden, so how many tokens are new?")
        one, zero = ops.constant([1], ov.Type.i64), ops.constant(0, ov.Type.i64)
        return ops.gather(ops.shape_of(rows, "i64"), one, zero)


def _is_joining(reshape: Item, width: int) -> bool:
    """Whether a Reshape makes `[batch, tokens, width]` of `[batch, tokens, heads, value_dim]`."""
    dims = reshape.dims()
    return dims is not None and len(dims) == 3 and dims[2] == width and dims[1] != 1


def _shaped(output: ov.Output, sizes: list[int]) -> ov.Output:
    return ops.reshape(output, ops.constant(sizes, ov.Type.i64), special_zero=False).output(0)


def _constant(array: Array) -> ov.Output:
    return Constant(np.ascontiguousarray(array, np.float32)).output(0)
