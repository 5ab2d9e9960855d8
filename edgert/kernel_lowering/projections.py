"""Where an attention's queries, keys and values come from: what lies between the products and the scores."""

from __future__ import annotations

from dataclasses import dataclass, replace

from edgert.kernel_lowering.attention import Attention
from edgert.kernel_lowering.linears import Linear, Linears, side_by_side
from edgert.kernel_lowering.patterns import RmsNorm, columns, rms_norm, rope
from edgert.kernel_lowering.view import Tensor, dims_of, element_of, integers, last_dim, sole_user
from edgert.kernel_lowering.weights import Unsuitable


@dataclass(frozen=True)
class Rows:
    """Rows of several heads for every token.

    Attributes:
        tensor: f32, `[batch, heads, tokens, width]`, or `[batch, tokens, heads, width]`, or those two joined in one
            dimension.
        heads_first: the first of these.
        joined: the last.
        heads, width: of the rows.
    """

    tensor: Tensor
    heads: int
    width: int
    heads_first: bool = True
    joined: bool = False


@dataclass(frozen=True)
class Tables:
    """Cosine and sine of a rotation: `[batch, tokens, size]` with or without a dimension for heads."""

    cos: Tensor
    sin: Tensor
    size: int


@dataclass(frozen=True)
class Projections:
    """What an attention takes.

    Attributes:
        whole: one tensor that holds queries, keys and values side by side, or the product that gives it; or None.
        query, key, value: otherwise.
        rope: rotation of queries and keys, None where they are rotated already or never.
        norms: of queries and of keys, before the rotation.
    """

    whole: Tensor | Linear | None
    query: Rows
    key: Rows
    value: Rows
    rope: Tables | None
    norms: tuple[RmsNorm, RmsNorm] | None


def projections(found: Attention, linears: Linears) -> Projections:
    """What lies before an attention that its kernel can do too; products are taken from `linears`.

    Raises:
        Unsuitable: some of it is not f32.
    """
    query = Rows(found.query, found.heads, found.head_dim)
    key = Rows(found.key.state.concat.inputs[1], found.kv_heads, found.head_dim)
    value = Rows(found.value.state.concat.inputs[1], found.kv_heads, found.value_dim)
    for rows in (query, key, value):
        if element_of(rows.tensor) != "f32":
            raise Unsuitable(f"its rows are {element_of(rows.tensor)}")
    tables = None
    rotated = _rope(query), _rope(key)
    if rotated[0] is not None and rotated[1] is not None and rotated[0][1] == rotated[1][1]:
        tables = rotated[0][1]
        query, key = rotated[0][0], rotated[1][0]
    norms = None
    normed = _norm(query), _norm(key)
    if normed[0] is not None and normed[1] is not None and normed[0][1].epsilon == normed[1][1].epsilon:
        norms = normed[0][1], normed[1][1]
        query, key = normed[0][0], normed[1][0]
    query, key, value = (_joined(rows) for rows in (query, key, value))
    return Projections(_whole((query, key, value), linears), query, key, value, tables, norms)


def _before(rows: Rows) -> Rows | None:
    """The same rows before an operation that only changes how they lie; None where another one gives them."""
    item = rows.tensor[0]
    if item.type == "Transpose" and integers(item.inputs[1]) == [0, 2, 1, 3]:
        return replace(rows, tensor=item.inputs[0], heads_first=not rows.heads_first)
    if item.type == "Convert" and element_of(item.inputs[0]) == "f32":
        return replace(rows, tensor=item.inputs[0])
    if item.type != "Reshape":
        return None
    before, after = dims_of(item.inputs[0]) or (), item.dims() or ()
    if len(before) != 4 or len(after) != 4 or before[3] != after[3]:
        return None
    axes = [1, 2] if rows.heads == 1 else [1 if rows.heads_first else 2]  # one head may change places with tokens
    for axis in axes:
        if before[axis] == rows.heads and rows.heads in (after[1], after[2]):
            return replace(rows, tensor=item.inputs[0], heads_first=axis == 1)
    return None


def _rope(rows: Rows | None) -> tuple[Rows, Tables] | None:
    """Rows before their rotation, and its tables."""
    while rows is not None:
        found = rope(rows.tensor)
        if found is not None:
            cos, sin = (_table(tensor, rows.heads_first) for tensor in (found.cos, found.sin))
            return (
                None if cos is None or sin is None else (replace(rows, tensor=found.data), Tables(cos, sin, found.size))
            )
        rows = _before(rows)
    return None


def _table(tensor: Tensor, heads_first: bool) -> Tensor | None:
    """A table, without its dimension for heads where an Unsqueeze added it; None where heads have tables of their own.

    The batch is 1, so that a table without it is `[tokens, size]` all the same.
    """
    while (item := tensor[0]).type == "Transpose" and integers(item.inputs[1]) == [0, 2, 1, 3]:
        tensor, heads_first = item.inputs[0], not heads_first
    dims = dims_of(tensor)
    if dims is None or element_of(tensor) != "f32":
        return None
    axis = (1 if heads_first else 2) - 4  # from the end, as missing dimensions are the first ones
    if len(dims) >= -axis and dims[axis] != 1 and not (heads_first and len(dims) < 4):
        return None
    unsqueezed = item.type == "Unsqueeze" and len(dims) == 4 and integers(item.inputs[1]) in ([axis], [axis + 4])
    return item.inputs[0] if unsqueezed else tensor


def _norm(rows: Rows | None) -> tuple[Rows, RmsNorm] | None:
    """Rows before their norm, and the norm."""
    while rows is not None:
        found = rms_norm(rows.tensor)
        if found is not None and last_dim(rows.tensor) == rows.width and len(dims_of(rows.tensor) or ()) == 4:
            return replace(rows, tensor=found.data), found
        rows = _before(rows)
    return None


def _joined(rows: Rows) -> Rows:
    """Rows before heads became a dimension of their own, where that can be seen; otherwise as they are."""
    one, last, before = rows.heads == 1, rows, _before(rows)
    while True:
        item, dims = last.tensor[0], dims_of(last.tensor) or ()
        if item.type == "Reshape" and last_dim(item.inputs[0]) == rows.heads * rows.width:
            apart = len(dims) == 4 and dims[2:] == (rows.heads, rows.width) and not last.heads_first
            if one:
                apart = len(dims_of(item.inputs[0]) or ()) < 4
            if apart:
                return replace(last, tensor=item.inputs[0], heads_first=False, joined=True)
        if before is None:  # one head's rows lie the same whichever dimension comes first
            return replace(last, heads_first=False, joined=True) if one else rows
        last, before = before, _before(before)


def _whole(rows: tuple[Rows, Rows, Rows], linears: Linears) -> Tensor | Linear | None:
    """What holds queries, keys and values side by side."""
    if not all(part.joined for part in rows):
        return None
    cuts = [columns(part.tensor) for part in rows]
    end = 0
    for cut in cuts:
        if cut is None or cut.tensor != (cuts[0] and cuts[0].tensor) or cut.first != end:
            break
        end = cut.end
    else:
        assert cuts[0] is not None
        if end == last_dim(cuts[0].tensor):
            return cuts[0].tensor
    products = [linears.by_end.get(part.tensor) for part in rows]
    if any(sole_user(part.tensor) is None for part in rows):
        return None
    return side_by_side(linears, [product for product in products if product]) if all(products) else None
