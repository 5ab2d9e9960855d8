"""Attention over a cache: which operations it is made of, in the models that OpenVINO's frontends give.

Either one ScaledDotProductAttention, or the products and the Softmax that it stands for, as in models with attention
sinks or with capped scores. Keys and values are states `[batch, heads, tokens, head_dim]` that new rows join. The batch
is 1, which makes a Broadcast or Reshape that only repeats or joins the batch nothing at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from edgert.kernel_lowering.view import Dims, Item, Tensor, View, dims_of, integers, operands, scalar
from edgert.kernel_lowering.weights import Unsuitable

SDPA = "ScaledDotProductAttention"


@dataclass(frozen=True)
class State:
    """A cache of keys or of values.

    Attributes:
        id: the variable's.
        concat: where new rows join the past: past first, then new.
        past: what stands for the past on the way there: the state as it was read, reordered or not.
        assign: what stores it.
        heads, width: of a row.
    """

    id: str
    concat: Item
    past: tuple[Item, ...]
    assign: Item
    heads: int
    width: int


@dataclass(frozen=True)
class Expanded:
    """A cache on its way to a product: every head repeated for the query heads that share it.

    Attributes:
        state: the cache.
        on_the_way: operations from the Concat to the product, the Concat first.
        product: what takes it.
        repeats: how often a head is repeated.
        transposed: the last two dimensions changed places.
    """

    state: State
    on_the_way: tuple[Item, ...]
    product: Item
    repeats: int
    transposed: bool


@dataclass(frozen=True)
class Attention:
    """One layer's attention.

    Attributes:
        result: `[batch, heads, tokens, value_dim]`.
        query: `[batch, heads, tokens, head_dim]`.
        key, value: the caches with what repeats their heads.
        heads: of the query.
        mask: None where nothing is hidden.
        causal: without a mask, later tokens are hidden.
        scale: of the scores.
        softcap: 0 where scores are not capped.
        sinks: a logit a head, a constant, or None.
    """

    result: Tensor
    query: Tensor
    key: Expanded
    value: Expanded
    heads: int
    mask: Tensor | None
    causal: bool
    scale: float
    softcap: float = 0.0
    sinks: Item | None = None

    @property
    def head_dim(self) -> int:
        return self.key.state.width

    @property
    def value_dim(self) -> int:
        return self.value.state.width

    @property
    def kv_heads(self) -> int:
        return self.key.state.heads


def states(view: View) -> dict[int, State]:
    """The caches, by the number of the Concat where new rows join them."""
    found = {}
    for assign in view.of_type("Assign"):
        concat = assign.source(0)
        if concat.type != "Concat" or len(concat.inputs) != 2 or concat.attribute("axis") not in (2, -2):
            continue
        past, item = [], concat.source(0)
        while item.type in {"Gather", "Convert"}:
            past.append(item)
            item = item.source(0)
        identity = str(assign.attribute("variable_id"))
        dims = concat.dims()
        if item.type != "ReadValue" or item.attribute("variable_id") != identity or dims is None or len(dims) != 4:
            continue
        if dims[1] is not None and dims[3] is not None:
            found[concat.number] = State(identity, concat, (*past, item), assign, dims[1], dims[3])
    return found


def match(core: Item, caches: Mapping[int, State]) -> Attention:
    """The attention whose heart is a ScaledDotProductAttention or a Softmax.

    Raises:
        Unsuitable: it is none that the kernels know.
    """
    found = _fused(core, caches) if core.type == SDPA else _spelled_out(core, caches)
    key, value = found.key, found.value
    if key.state.heads != value.state.heads or key.repeats != value.repeats:
        raise Unsuitable(f"keys have {key.state.heads} heads, values {value.state.heads}")
    if key.state.heads * key.repeats not in (found.heads, 1):  # one head for all needs not be repeated
        raise Unsuitable(f"{found.heads} query heads, {key.state.heads} key heads repeated {key.repeats} times")
    if found.head_dim % 4 or found.value_dim % 4:
        raise Unsuitable(f"heads of {found.head_dim} and {found.value_dim} dimensions, expected multiples of 4")
    for expanded in (key, value):
        _check_users(expanded)
    return found


def _check_users(expanded: Expanded) -> None:
    """Raise `Unsuitable` where something else takes a cache's contents, which are no tensor any more."""
    state, path = expanded.state, expanded.on_the_way
    inside = {id(item) for item in (*state.past, *path, state.assign, expanded.product)}
    for item in (*state.past, *path):
        for user in item.all_users:
            if id(user) not in inside and not _asks_for_shape(user):
                raise Unsuitable(f"state {state.id!r} is also taken by {user.type} {user.name!r}")


def _asks_for_shape(user: Item) -> bool:
    return user.type == "ShapeOf" and len(dims_of(user.inputs[0]) or ()) == 4


def _fused(core: Item, caches: Mapping[int, State]) -> Attention:
    query = core.inputs[0]
    dims = _heads(query)
    key, value = (_expanded(core, port, caches) for port in (1, 2))
    if key.transposed or value.transposed:
        raise Unsuitable("keys or values are transposed")
    causal = bool(core.attribute("causal"))
    mask: Tensor | None = core.inputs[3] if len(core.inputs) > 3 and not causal else None
    if mask is not None and scalar(mask) == 0:  # a place holder: a scale comes behind it
        mask = None
    scale: float | None = dims[1] ** -0.5
    if len(core.inputs) > 4:
        scale = scalar(core.inputs[4])
    if scale is None:
        raise Unsuitable("its scale is computed")
    sinks = None
    if len(core.inputs) > 5:
        sinks = _constant_sinks(core.inputs[5], dims[0])
    return Attention((core, 0), query, key, value, dims[0], mask, causal, scale, 0.0, sinks)


def _spelled_out(core: Item, caches: Mapping[int, State]) -> Attention:
    """Attention as products around a Softmax; raises `Unsuitable` where it is another Softmax."""
    product, scores_dims = _second_product(core), core.dims()
    value = _expanded(product, 1, caches)
    if value.transposed != bool(product.attribute("transpose_b")) or product.attribute("transpose_a"):
        raise Unsuitable("values are transposed")
    heads = scores_dims[1] if scores_dims is not None and len(scores_dims) == 4 else None
    if heads is None:
        raise Unsuitable("the number of its heads is not known")
    logits = core.inputs[0]
    if logits[0].type == "Subtract" and logits[0].source(1).type == "ReduceMax":  # of itself: softmax stays the same
        if logits[0].source(1).inputs[0] != logits[0].inputs[0]:
            raise Unsuitable("what is subtracted before the softmax is not its maximum")
        logits = logits[0].inputs[0]
    sinks = None
    if logits[0].type == "Concat":
        if len(logits[0].inputs) != 2:
            raise Unsuitable("its scores are joined of several")
        sinks = _constant_sinks(logits[0].inputs[1], heads)
        logits = logits[0].inputs[0]
    logits, mask = _without_mask(logits, heads)
    logits, softcap = _without_softcap(logits)
    scale = 1.0
    if (scaled := _scaled(logits)) is not None:
        logits, scale = scaled
    scores = _unwrapped(logits[0])
    if scores.type != "MatMul" or scores.attribute("transpose_a"):
        raise Unsuitable(f"its scores come from {scores.type} {scores.name!r}")
    key = _expanded(scores, 1, caches)
    if key.transposed == bool(scores.attribute("transpose_b")):
        raise Unsuitable("keys are transposed")
    query = scores.inputs[0]
    while len(dims_of(query) or ()) != 4 and query[0].type == "Reshape":
        query = query[0].inputs[0]
    while query[0].type == "Broadcast" and _heads(query[0].inputs[0]) == _heads(query):
        query = query[0].inputs[0]
    if _heads(query)[0] != heads:
        raise Unsuitable(f"{_heads(query)[0]} query heads, scores of {heads}")
    result = _four_dimensional((product, 0), heads, value.state.width)
    return Attention(result, query, key, value, heads, mask, False, scale, softcap, sinks)


def _second_product(core: Item) -> Item:
    """Where the probabilities that a Softmax gives are multiplied with the values."""
    rank = len(core.dims() or ())
    if core.type != "Softmax" or core.attribute("axis") not in (-1, rank - 1):
        raise Unsuitable(f"{core.type} is no attention")
    item = core
    while True:
        users = [user for user in item.all_users if user.type != "ShapeOf"]
        if len(users) != 1:
            raise Unsuitable("its probabilities are used elsewhere too")
        before, item = item, users[0]
        if item.type == "MatMul" and item.source(0) is before:
            return item
        if item.type == "Slice":  # without the column of the sinks
            start, stop, step = (integers(item.inputs[i]) for i in (1, 2, 3))
            if (start, stop, step) != ([0], [-1], [1]):
                raise Unsuitable(f"its probabilities are cut by {item.name!r}")
        elif item.type not in {"Broadcast", "Reshape", "Convert"}:
            raise Unsuitable(f"its probabilities go through {item.type} {item.name!r}")


def _four_dimensional(product: Tensor, heads: int, width: int) -> Tensor:
    """The result `[batch, heads, tokens, width]` of a product, which may leave batch and heads joined at first."""
    while (dims := dims_of(product)) is not None and len(dims) != 4:
        users = [user for user in product[0].all_users if user.type != "ShapeOf"]
        if len(users) != 1 or users[0].type != "Reshape":
            break
        product = users[0], 0
    if dims is None or len(dims) != 4 or dims[1] != heads or dims[3] != width:
        raise Unsuitable(f"its result is {dims}")
    return product


def _without_mask(logits: Tensor, heads: int) -> tuple[Tensor, Tensor | None]:
    """Scores before a mask was added, and the mask."""
    if logits[0].type != "Add":
        return logits, None
    sides = [side for side in logits[0].inputs if _leads_to_product(side[0])]
    if len(sides) != 1:
        raise Unsuitable(f"which side of {logits[0].name!r} is a mask cannot be told")
    (scores,) = sides
    mask = logits[0].inputs[1] if logits[0].inputs[0] == scores else logits[0].inputs[0]
    return scores, mask


def _leads_to_product(item: Item) -> bool:
    """Whether an operation is scores: nothing but scaling and capping lies between it and a product."""
    while item.type in {"Reshape", "Multiply", "Divide", "Tanh", "Broadcast"}:
        changing = [source for source, _ in item.inputs if source.type not in {"Constant", "Convert"}]
        if item.type in {"Multiply", "Divide"} and len(changing) != 1:
            return False
        item = changing[0] if changing else item.source(0)
    return item.type == "MatMul"


def _without_softcap(logits: Tensor) -> tuple[Tensor, float]:
    """Scores before they were capped, and the cap: c * tanh(x / c)."""
    for inner, factor in operands(logits[0], "Multiply"):
        cap = scalar(factor)
        if inner[0].type == "Tanh" and cap is not None:
            scaled = _scaled(inner[0].inputs[0])
            if scaled is None or abs(scaled[1] * cap - 1) > 1e-6:
                raise Unsuitable(f"scores are capped at {cap:g} after another scaling")
            return scaled[0], cap
    return logits, 0.0


def _scaled(tensor: Tensor) -> tuple[Tensor, float] | None:
    """What a tensor is a multiple of, and the factor."""
    if tensor[0].type == "Divide":
        divisor = scalar(tensor[0].inputs[1])
        return (tensor[0].inputs[0], 1 / divisor) if divisor else None
    for inner, factor in operands(tensor[0], "Multiply"):
        number = scalar(factor)
        if number is not None:
            return inner, number
    return None


def _unwrapped(item: Item) -> Item:
    while item.type in {"Reshape", "Broadcast"}:
        item = item.source(0)
    return item


def _constant_sinks(tensor: Tensor, heads: int) -> Item:
    item = tensor[0]
    while item.type in {"Broadcast", "Reshape", "Convert"} and item.value is None:
        item = item.source(0)
    if item.value is None or item.value.size != heads:
        raise Unsuitable(f"its sinks are no constant of {heads} numbers")
    return item


def _heads(tensor: Tensor) -> tuple[int, int]:
    """Heads and width of `[batch, heads, tokens, width]`."""
    dims = dims_of(tensor)
    if dims is None or len(dims) != 4 or dims[1] is None or dims[3] is None:
        raise Unsuitable(f"its query is {dims}, expected [batch, heads, tokens, width] with known heads and width")
    return dims[1], dims[3]


def _expanded(product: Item, port: int, caches: Mapping[int, State]) -> Expanded:
    """The cache that an operand of a product is made of, and what happens to it on the way."""
    path: list[Item] = []
    item = product.source(port)
    while item.number not in caches:
        if item.type not in {"Transpose", "Broadcast", "Tile", "Reshape", "Unsqueeze"}:
            raise Unsuitable(f"its keys or values come from {item.type} {item.name!r}, no cache that new rows join")
        path.append(item)
        item = item.source(0)
    repeats, transposed = 1, False
    for step in path:
        before, after = dims_of(step.inputs[0]), step.dims()
        if step.type == "Transpose":
            if integers(step.inputs[1]) not in ([0, 1, 3, 2], [0, 2, 1]):
                raise Unsuitable(f"a cache is transposed by {step.name!r}")
            transposed = not transposed
        elif step.type in {"Broadcast", "Tile"}:
            repeats *= _repeats(step, before, after)
        elif not _keeps_rows(before, after):
            raise Unsuitable(f"a cache is reshaped by {step.name!r} from {before} to {after}")
    return Expanded(caches[item.number], (item, *reversed(path)), product, repeats, transposed)


def _repeats(item: Item, before: Dims | None, after: Dims | None) -> int:
    """How often a Broadcast or Tile repeats every head: 1 where it only repeats the batch."""
    if before is None or after is None or len(before) != len(after) or len(before) not in (4, 5):
        raise Unsuitable(f"a cache is repeated by {item.name!r}")
    axis = 2 if len(before) == 5 else 1
    changed = [n for n, (a, b) in enumerate(zip(before, after, strict=True)) if a != b and None not in (a, b)]
    if not changed:
        return 1
    count = after[axis]
    if changed != [axis] or before[axis] != 1 or count is None:
        raise Unsuitable(f"a cache is repeated by {item.name!r} from {before} to {after}")
    return count


def _keeps_rows(before: Dims | None, after: Dims | None) -> bool:
    """Whether a Reshape or Unsqueeze leaves the order of heads and their rows: it joins or adds dimensions."""
    if before is None or after is None:
        return False
    if len(before) == len(after) == 4:
        return before[1] == after[1] and before[3] == after[3]
    if (len(before), len(after)) == (4, 5):  # [b, heads, t, d] to [b, heads, 1, t, d]
        return (before[1], 1, before[3]) == (after[1], after[2], after[4])
    if (len(before), len(after)) == (5, 4):
        heads, times, joined = before[1], before[2], after[1]
        return heads is not None and times is not None and heads * times == joined and before[4] == after[3]
    if (len(before), len(after)) == (4, 3):  # batch and heads joined
        return before[2:] == after[1:]
    return False
