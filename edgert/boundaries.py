"""Find where a model can be cut, from the additions of its residual streams."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence

from edgert.irgraph import IrGraph, Node

_MAX_SKIPS = 3  # terms of a sum that are tried as its residual; it is the earliest, unless something constant-like is


def find(graph: IrGraph, main: list[Node]) -> list[tuple[str, ...]]:
    """Where a model can be cut.

    Args:
        main: the operations on the way from its data to its results, in topological order.

    Returns:
        For each boundary the tensors that pass it, as `node:port`, the residual stream first.

    The additions of the residual stream count the blocks off (`_levels`). With what is computed once and used in many
    blocks left aside, there is a boundary

    * behind an operation through which all other data flow, a *dominator* of the paths to the result. In a topological
      order that is where no edge jumps over an operation, so one sweep finds them all. Between two additions there is
      none, because the residual jumps over everything;
    * where nothing but sums of residual streams passes, one for each stream: diffusion models have a stream for the
      picture and one for the sound.
    """
    position = {node.name: i for i, node in enumerate(main)}
    sums, begins = _residual_sums(graph, main, position)
    level = _levels(main, sums, begins)
    order = sorted(main, key=lambda node: (level[node.name], position[node.name]))
    last_use: dict[tuple[str, int], int] = {}
    aside: set[tuple[str, int]] = set()
    for i, node in enumerate(order):
        for tensor in node.inputs:
            if tensor[0] in level and tensor[0] in node.data_inputs:
                last_use[tensor] = i
                made, used = level[tensor[0]], level[node.name]
                if used > made + 1 or (used > made == 0 and tensor[0] not in begins):
                    aside.add(tensor)
    ports = defaultdict[str, list[tuple[str, int]]](list)
    for tensor in last_use:
        ports[tensor[0]].append(tensor)
    found: list[tuple[str, ...]] = []
    alive: dict[tuple[str, int], None] = {}
    for i, node in enumerate(order[:-1]):
        for tensor in [t for t in alive if last_use[t] == i]:
            del alive[tensor]
        alive |= dict.fromkeys(t for t in ports[node.name] if last_use[t] > i)
        level_ends = level[order[i + 1].name] > level[node.name]
        if level[node.name] == 0 and sums and not level_ends:
            continue  # what comes before the first block is one piece
        stream = [t for t in alive if t not in aside]
        if not stream and node.name in sums | begins:
            stream = [t for t in alive if t[0] == node.name]
        dominator = len(stream) == 1 and stream[0][0] == node.name
        if dominator or (stream and level_ends and all(t[0] in sums | begins for t in stream)):
            first = max(stream, key=lambda t: _row_bytes(graph, t))
            found.append(tuple(f"{name}:{port}" for name, port in (first, *(t for t in alive if t != first))))
    return found


def _row_bytes(graph: IrGraph, tensor: tuple[str, int]) -> int:
    shape = graph[tensor[0]].op.output(tensor[1]).get_partial_shape()
    return int(shape[-1].get_length()) if shape.rank.is_static and len(shape) and shape[-1].is_static else 0


def _residual_sums(graph: IrGraph, main: list[Node], position: dict[str, int]) -> tuple[set[str], set[str]]:
    """The additions of residual streams, and the operations at which the streams begin.

    An addition is one where a term is what the other terms were computed from. Recurrences have such sums inside a
    block, too; what tells the stream is its shape, that of most of these sums.
    """
    users = Counter(source for node in main for source in node.data_inputs if source in position)
    inner: set[str] = set()  # sums that are but a part of the sum behind them
    for node in main:
        if node.type == "Add":
            inner |= {s for s, _ in node.inputs if s in position and graph[s].type == "Add" and users[s] == 1}
    skips: dict[str, str] = {}
    shapes: dict[str, tuple[int, int]] = {}
    for node in main:
        shape = node.op.get_output_partial_shape(0) if node.type == "Add" and node.name not in inner else None
        if shape is None or shape.rank.is_dynamic or len(shape) < 2:
            continue
        skip = _skip(graph, node, inner, position)
        if skip is not None:
            skips[node.name] = skip
            shapes[node.name] = (len(shape), _row_bytes(graph, (node.name, 0)))
    most = max(Counter(shapes.values()).values(), default=0)
    usual = {shape for shape, count in Counter(shapes.values()).items() if 2 * count > most}
    sums = {name for name, shape in shapes.items() if shape in usual}
    behind = graph.reached_from(sums)
    begins = {skips[name] for name in sums if skips[name] not in behind}
    # Inside the first block a sum may have a residual of its own; no stream begins behind the beginning of another.
    for begin in [node.name for node in main if node.name in begins]:
        if begin in begins:
            begins -= graph.reached_from({begin}) - {begin}
    return {name for name in sums if skips[name] in behind or skips[name] in begins}, begins


def _skip(graph: IrGraph, node: Node, inner: set[str], position: dict[str, int]) -> str | None:
    """The term of a sum that its other terms were computed from; None where there is none."""
    terms: list[str] = []
    stack = [source for source, _ in node.inputs]
    while stack:
        name = stack.pop()
        if name in inner:
            stack += [source for source, _ in graph[name].inputs]
        elif name in position:
            terms.append(name)
    for term in sorted(terms, key=lambda name: position[name])[:_MAX_SKIPS]:
        others = [other for other in terms if other != term]
        for base in dict.fromkeys((term, _unscaled(graph, term))):
            if base in position and _leads_to(graph, base, others, position):
                return base
    return None


def _leads_to(graph: IrGraph, name: str, targets: Sequence[str], position: dict[str, int]) -> bool:
    """Whether data of `name` flow into one of `targets`."""
    seen, stack = set[str](), [*targets]
    while stack:
        for source in graph[stack.pop()].data_inputs:
            if source == name:
                return True
            if source not in seen and position.get(source, -1) > position[name]:
                seen.add(source)
                stack.append(source)
    return False


def _unscaled(graph: IrGraph, name: str) -> str:
    """What an operation multiplies by a number, or converts."""
    while True:
        node = graph[name]
        data = [source for source, _ in node.inputs if source not in graph.constant_only]
        scalars = all(
            graph[s].op.output(port).get_partial_shape().is_static
            and math.prod(graph[s].op.output(port).get_shape()) == 1
            for s, port in node.inputs
            if s in graph.constant_only
        )
        if node.type not in {"Multiply", "Divide", "Convert"} or len(data) != 1 or not scalars:
            return name
        name = data[0]


def _levels(main: list[Node], sums: set[str], begins: set[str]) -> dict[str, int]:
    """For each operation the number of the block that it belongs to, 0 being what comes before the first.

    Block `n` ends with the sums that are the `n`-th of their stream. What depends on no sum is computed in the block
    that uses it, or before the first where several do.
    """
    depth: dict[str, int] = {}
    begun: set[str] = set()
    uses = defaultdict[str, set[str]](set)
    for node in main:
        depth[node.name] = max((depth[s] for s in node.data_inputs if s in depth), default=0) + (node.name in sums)
        if node.name in begins or any(s in begun for s in node.data_inputs):
            begun.add(node.name)
        for source in node.data_inputs:
            uses[source].add(node.name)
    level: dict[str, int] = {}
    for node in reversed(main):
        name = node.name
        users = {level[user] for user in uses[name] if user in level}
        if not sums or name in begins:
            level[name] = 0
        elif depth[name]:
            level[name] = depth[name] + (name not in sums)
        elif len(users) == 1:
            level[name] = next(iter(users))
        else:  # used by several blocks; keys and values of the first one are its own
            level[name] = 1 if name in begun and min(users, default=0) == 1 else 0
    return level
