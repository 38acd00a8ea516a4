"""A tiny encoder as a finished ONNX file with its manifest: mean pool, one matrix, unit norm. No torch, no training."""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from serve.classify import Head
from serve.contract import MANIFEST_NAME, METADATA_KEY, Manifest, Preprocess
from tests.plain_manifest import plain_manifest

HEIGHT, WIDTH, DIM, POOL = 32, 16, 8, 8


def write_toy_encoder(folder: Path, name: str = "toy", seed: int = 0) -> tuple[Path, Manifest]:
    """model.onnx and manifest.json in `folder`."""
    frame = Preprocess(height_px=HEIGHT, width_px=WIDTH, resize="stretch", crop=1.0, resample="bicubic", jpeg="full")
    manifest = plain_manifest(name, DIM, frame, seed=seed, training={"what": 'a "toy" with quotes, \\ and é'})
    weight = np.random.default_rng(seed).normal(size=(DIM, HEIGHT * WIDTH * 3 // POOL**2)).astype(np.float32)
    nodes = [
        helper.make_node("Cast", ["image"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["float"], ["channels_first"], perm=[0, 3, 1, 2]),
        helper.make_node("AveragePool", ["channels_first"], ["pooled"], kernel_shape=[POOL, POOL], strides=[POOL, POOL]),
        helper.make_node("Flatten", ["pooled"], ["flat"], axis=1),
        helper.make_node("Gemm", ["flat", "weight", "bias"], ["raw"], transB=1),
        helper.make_node("ReduceL2", ["raw", "axes"], ["norm"], keepdims=1),
        helper.make_node("Div", ["raw", "norm"], ["embedding"]),
    ]
    constants = {"weight": weight, "bias": np.ones(DIM, np.float32), "axes": np.array([1])}
    graph = helper.make_graph(
        nodes,
        name,
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["batch", HEIGHT, WIDTH, 3])],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["batch", DIM])],
        [numpy_helper.from_array(value, key) for key, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    helper.set_model_props(model, {METADATA_KEY: manifest.model_dump_json()})
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(model, folder / "model.onnx")
    (folder / MANIFEST_NAME).write_text(manifest.model_dump_json())
    return folder / "model.onnx", manifest


def toy_head(encoder_id: str, classes: tuple[str, ...] = ("cat", "dog", "é cow")) -> Head:
    rng = np.random.default_rng(1)
    weight = rng.normal(size=(len(classes), DIM)).astype(np.float32)
    bias = rng.normal(size=len(classes)).astype(np.float32)
    return Head(weight=weight, bias=bias, classes=classes, encoder_id=encoder_id, report={"accuracy": 0.5})
