"""A small bundle that takes images and sound, made by hand: the demo model with `features`, and towers of one product.

No exporter is needed, so it is quick, and what the towers give is known.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino.opset13 as ops

from edgert import bundle as bundles
from edgert.bundle import Bundle
from edgert.graph import Block, BlockGraph, BlockKind
from edgert.media import AudioSpec, ImageSpec, MediaSpec
from edgert.partition import annotate

IMAGE, AUDIO = 4094, 4095  # the demo's rarest tokens, renamed
START, END = 40, 41  # what stands around the rows of an image
SIDE, MELS, FRAMES = 8, 8, 40
HIDDEN = 256
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for p in m['content'] %}{% if p['type'] == 'text' %}{{ p['text'] }}{% else %}<{{ p['type'] }}>"
    "{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}{{ '<|im_start|>assistant\n' }}"
)


def vision_weights() -> np.ndarray[Any, Any]:
    """`[48, HIDDEN]`, for each quarter of the picture."""
    return np.random.default_rng(1).standard_normal((3 * SIDE * SIDE // 4, HIDDEN)).astype(np.float32) * 0.05


def image_rows(pixels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """What the vision tower gives for `[1, 3, SIDE, SIDE]`."""
    return pixels.reshape(4, -1) @ vision_weights()


def make(source: Path, out: Path, *, together: bool = False, mrope: bool = False, rows: int = 4, **image: Any) -> Path:
    """Write a bundle to `out`, of the demo's at `source`.

    Args:
        together: with `image_ids`, which the model does not look at.
        mrope: with three rows of positions; the model takes their sum less two thirds of it.
        rows: what the vision tower gives for the four tokens of an image.
        image: fields of `ImageSpec`.
    """
    demo = Bundle.open(source)
    assert demo.graph is not None
    spec = MediaSpec(
        image=ImageSpec(
            "vision", IMAGE, (START, IMAGE, IMAGE, IMAGE, IMAGE, END), IMAGE, SIDE, SIDE, scale=1 / 255,
            bidirectional=together, grid=(2, 2) if mrope else None, **image,
        ),
        audio=AudioSpec(
            "audio", AUDIO, AUDIO, FRAMES, "whisper", mels=MELS, n_fft=64, window=64, hop=32, sampling_rate=1600,
            max_frequency=800.0, subsampling=((4, 4, 0),), suffix=(END,),
        ),
    )  # fmt: skip
    with bundles.create(out) as draft:
        model = ov.Core().read_model(demo.model_path)
        _add_features(model, together=together)
        if mrope:
            _add_axes(model)
        ov.save_model(model, draft.path / "model.xml", compress_to_fp16=False)
        del model
        shutil.copytree(demo.tokenizer_path, draft.path / "tokenizer")
        _rename_tokens(draft.path / "tokenizer")
        _tower(draft.path / "towers" / "vision", "pixel_values", [1, 3, SIDE, SIDE], rows, vision_weights())
        count = FRAMES // 4
        weights = np.random.default_rng(2).standard_normal((MELS * 4, HIDDEN)).astype(np.float32) * 0.05
        _tower(draft.path / "towers" / "audio", "input_features", [1, MELS, FRAMES], count, weights)
        (draft.path / "media.json").write_text(json.dumps(spec.to_json()), "utf-8")
        chain = annotate(ov.Core().read_model(draft.path / "model.xml"))
        graph = BlockGraph(
            chain.blocks, chain.edges, chain.reason, (_block(0, "vision", 48), _block(1, "audio", MELS * 4))
        )
        draft.finish(demo.facts, bundles.Report("test: media", {}), graph)
    return out


def _add_features(model: ov.Model, *, together: bool) -> None:
    embedding = next(
        op for op in model.get_ordered_ops()
        if op.get_type_name() == "Gather" and len(op.output(0).get_partial_shape()) == 3
    ).output(0)  # fmt: skip
    consumers = [port for port in embedding.get_target_inputs() if port.get_node().get_type_name() != "ShapeOf"]
    features = ops.parameter([-1, -1, HIDDEN], ov.Type.f32)
    mask = ops.parameter([-1, -1], ov.Type.boolean)
    more = {"features": features, "feature_mask": mask}
    wide = ops.unsqueeze(mask, ops.constant(np.int64(-1)))
    stream = ops.select(wide, features, embedding)
    if together:
        ids = more["image_ids"] = ops.parameter([-1, -1], ov.Type.i64)
        nothing = ops.multiply(ops.convert(ops.unsqueeze(ids, ops.constant(np.int64(-1))), "f32"), np.float32(0))
        stream = ops.add(stream, nothing)
    for name, parameter in more.items():
        parameter.output(0).set_names({name})
    for consumer in consumers:
        consumer.replace_source_output(stream.output(0))
    model.add_parameters(list(more.values()))
    model.validate_nodes_and_infer_types()


def _add_axes(model: ov.Model) -> None:
    old = next(p for p in model.get_parameters() if "position_ids" in p.output(0).get_names())
    old.output(0).set_names({"plain_positions"})
    new = ops.parameter([3, -1, -1], ov.Type.i64)
    new.output(0).set_names({"position_ids"})
    # Of three equal rows it is one of them; else all three count.
    weights = ops.constant(np.array([[[1]], [[3]], [[-3]]], np.int64))
    one = ops.reduce_sum(ops.multiply(new, weights), ops.constant(np.array([0], np.int64)))
    for consumer in list(old.output(0).get_target_inputs()):
        consumer.replace_source_output(one.output(0))
    model.remove_parameter(old)
    model.add_parameters([new])
    model.validate_nodes_and_infer_types()


def _tower(folder: Path, name: str, shape: list[int], rows: int, weights: np.ndarray[Any, Any]) -> None:
    folder.mkdir(parents=True)
    taken = ops.parameter(shape, ov.Type.f32)
    taken.output(0).set_names({name})
    flat = ops.reshape(taken, ops.constant(np.array([-1, len(weights)], np.int64)), special_zero=False)
    features = ops.matmul(flat, ops.constant(weights), False, False)
    some = ops.slice(features, *(ops.constant(np.array([v], np.int64)) for v in (0, rows, 1, 0)))
    some.output(0).set_names({"features"})
    ov.save_model(ov.Model([some], [taken], "tower"), folder / "model.xml", compress_to_fp16=False)


def _block(index: int, name: str, inputs: int) -> Block:
    size = inputs * HIDDEN
    return Block(index, BlockKind.TOWER, name, None, "features", (), {"f32": 4 * size}, 2 * size, 0, 0)


def _rename_tokens(folder: Path) -> None:
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text("utf-8"))
    vocab = data["model"]["vocab"]
    for index, name in ((IMAGE, "<image>"), (AUDIO, "<audio>")):
        old = next(text for text, number in vocab.items() if number == index)
        del vocab[old]
        data["model"]["merges"] = [
            pair for pair in data["model"]["merges"]
            if "".join(pair if isinstance(pair, list) else pair.split(" ")) != old
        ]  # fmt: skip
        data["added_tokens"].append({
            "id": index, "content": name, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
            "special": True,
        })  # fmt: skip
    path.write_text(json.dumps(data), "utf-8")
    (folder / "chat_template.jinja").write_text(TEMPLATE, "utf-8")
