"""States that stay with OpenVINO, such as a recurrence's, behind operations that became kernels."""

from __future__ import annotations

import numpy as np
import openvino as ov
import openvino.opset13 as ops
import pytest
from attention_models import attention_model, rows
from exact_kernels import Chain, ExactFactory
from openvino.op import util
from test_partition import relative_error

from edgert import native
from edgert.kernel_lowering import lower

pytestmark = pytest.mark.skipif(not native.status().loads, reason="the native kernels do not load here")


def with_recurrence() -> ov.Model:
    """Rows of an attention, added to the three last ones that came before."""
    model, _ = attention_model()
    parameters = {name: node for node in model.get_parameters() for name in node.output(0).get_names()}
    new = model.get_results()[0].input_value(0)
    width = new.get_partial_shape()[2].get_length()
    info = util.VariableInfo()
    info.data_shape, info.data_type, info.variable_id = ov.PartialShape([-1, 3, width]), ov.Type.f32, "recurrent"
    variable = util.Variable(info)
    batch = ops.gather(ops.shape_of(parameters["hidden"]), np.int64([0]), np.int64(0))
    empty = ops.broadcast(np.float32(0), ops.concat([batch, np.int64([3, width])], 0))
    before = ops.gather(ops.read_value(empty, variable), parameters["beam_idx"], np.int64(0))
    every = ops.concat([before, new], 1)
    last = ops.slice(every, np.int64([-3]), np.int64([2**31]), np.int64([1]), np.int64([1]))
    result = ops.add(new, ops.reduce_sum(before, np.int64([1]), keep_dims=True))
    sinks = [*model.get_sinks(), ops.assign(last, variable)]
    found = ov.Model([ops.result(result)], sinks, model.get_parameters(), "recurrent")
    found.output(0).set_names({"rows"})
    return found


def test_a_recurrence_behind_an_attention() -> None:
    model = with_recurrence()
    lowered = lower(model.clone(), None, ExactFactory(), precision="f16")
    assert lowered.replaced["CachedAttention"] == 1
    chains = [Chain([(model, ())]), Chain([(lowered.model, lowered.caches)])]
    past = 0
    for tokens in (5, 1, 1, 7, 1):
        expected, found = (chain.step({"hidden": rows(tokens, past)}) for chain in chains)
        assert relative_error(found, expected) <= 2e-3  # keys and values in f16
        past += tokens
