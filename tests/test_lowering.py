"""Heads that cannot leave out rows; tests/test_partition.py has those that can."""

from __future__ import annotations

import numpy as np
import openvino as ov
import openvino.opset13 as ops
import pytest

from edgert.graph import Block, BlockGraph, BlockKind, Edge
from edgert.irgraph import IrGraph
from edgert.lowering import keep_last_logits
from edgert.shapes import KEEP


def with_head(kind: str) -> tuple[ov.Model, BlockGraph]:
    """A model whose head needs as many rows as there are tokens."""
    tokens = ops.parameter([-1, -1], ov.Type.i64, "input_ids")
    tokens.output(0).set_names({"input_ids"})
    table = ops.constant(np.arange(512, dtype=np.float32).reshape(64, 8))
    rows = ops.gather(table, tokens, ops.constant(0, ov.Type.i64))
    if kind == "adds":  # something of every token, which is no shape
        out = ops.add(rows, ops.unsqueeze(ops.convert(tokens, "f32"), ops.constant(2, ov.Type.i64)))
    else:  # to [tokens, 1, width]: what is sliced of it are not tokens
        count = ops.gather(ops.shape_of(tokens), ops.constant([1], ov.Type.i64), ops.constant(0, ov.Type.i64))
        pattern = ops.concat([count, ops.constant([1, 8], ov.Type.i64)], 0)
        out = ops.reshape(rows, pattern, special_zero=False)
    model = ov.Model([ops.result(out)], [tokens], kind)
    stream = f"{rows.get_friendly_name()}:0"
    blocks = (
        Block(0, BlockKind.EMBED, "embed.0", None, stream, (), {}, 0, 0, 0),
        Block(1, BlockKind.HEAD, "head.0", stream, f"{out.get_friendly_name()}:0", (), {}, 0, 0, 0),
    )
    return model, BlockGraph(blocks, (Edge(0, 1, stream, 32),))


@pytest.mark.parametrize("kind", ["adds", "turns"])
def test_a_head_that_needs_every_row_stays(kind: str) -> None:
    model, graph = with_head(kind)
    before = set(IrGraph(model).nodes)
    assert not keep_last_logits(model, graph)
    assert set(IrGraph(model).nodes) == before
    assert KEEP not in {port.any_name for port in model.inputs}
