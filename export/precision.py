"""The float32 graph in fp16 and int8.

fp16 halves the file and helps a GPU; ONNX Runtime's CPU kernels gain nothing. int8 is static QDQ, calibrated on the user's own
pictures. Which int8 is fast depends on the processor (uint8 x int8 per channel: 3x with AVX-512 VNNI, int8 x int8: nothing),
so a CPU export measures a short list on the machine it runs on; TensorRT wants int8 x int8, symmetric.
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.onnx_model import ONNXModel
from onnxruntime.quantization.shape_inference import quant_pre_process
from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16
from tqdm import tqdm

from export.graph import MAX_IR_VERSION, check_graph, stamp
from export.retrieval import BATCH, embed, images_per_s, nearest, overlap
from serve.contract import Manifest

FLOORS = {"fp16": 0.99, "int8": 0.95}
"""Smallest recall_at_10 that is published without `--accept-loss`."""
NEARLY = 0.8
SWEPT = 96
"""Pictures that each setting is calibrated on; a ResNet-50 at 224 px takes about half a minute for every setting."""
CALIBRATION_BATCH = 16
_QUANTIZED = ("Conv", "Relu", "Add", "MaxPool", "AveragePool", "GlobalAveragePool", "Gemm", "MatMul")
"""The scaling before the first and the L2 norm after the last of these stay in float32."""


@dataclass(frozen=True, kw_only=True)
class Int8:
    """One way to quantise."""

    activations: QuantType = QuantType.QUInt8
    symmetric: bool = False
    method: CalibrationMethod = CalibrationMethod.MinMax
    float_ends: bool = False
    """The first and the last convolution stay in float32."""
    seven_bits: bool = False
    """Of the weights: processors without VNNI overflow with eight."""

    def __str__(self) -> str:
        kind = "uint8 x int8" if self.activations == QuantType.QUInt8 else "int8 x int8"
        notes = [self.method.name, "ends in float32" * self.float_ends, "7-bit weights" * self.seven_bits]
        return ", ".join(filter(None, [kind, *notes]))


FOR_TENSORRT = Int8(activations=QuantType.QInt8, symmetric=True)
FOR_CPU = (
    Int8(),
    Int8(method=CalibrationMethod.Percentile),
    Int8(method=CalibrationMethod.Percentile, float_ends=True),
    Int8(seven_bits=True),
    FOR_TENSORRT,
)


def to_fp16(graph: Path, manifest: Manifest, out: Path) -> None:
    """All but the scaling of pixels and the L2 norm, whose sums of squares would overflow, in half precision."""
    model = onnx.load(graph)
    inner = {node.name for node in model.graph.node if node.op_type in _QUANTIZED}
    ends = [node.name for node in model.graph.node if node.name not in _between(model, inner)]
    with _quiet():
        half = convert_float_to_float16(
            model, keep_io_types=True, op_block_list=DEFAULT_OP_BLOCK_LIST, node_block_list=ends, disable_shape_infer=False
        )
    finish(_without_detours(half), manifest, out)


def to_int8(graph: Path, manifest: Manifest, out: Path, calibration: NDArray[np.uint8], how: Int8) -> None:
    """Quantise with the ranges seen on prepared images (N, H, W, 3), and take out the mean error that is left.

    The mean difference of the features to float32's is a constant that rounding adds to each; subtracting it before the
    norm costs nothing and wins back about a quarter of the lost neighbours (bias correction: Nagel et al. 2019, section 4.2).
    """
    with tempfile.TemporaryDirectory() as scratch, _quiet():
        tidy = Path(scratch) / "tidy.onnx"
        quant_pre_process(str(graph), str(tidy), skip_symbolic_shape=True)  # which fails on the exporter's L2 norm
        convolutions = [node.name for node in onnx.load(tidy).graph.node if node.op_type == "Conv"]
        quantize_static(
            str(tidy),
            str(out),
            _Calibration(manifest.input.name, calibration),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(_QUANTIZED),
            nodes_to_exclude=[convolutions[0], convolutions[-1]] if how.float_ends and convolutions else [],
            per_channel=True,
            reduce_range=how.seven_bits,
            activation_type=how.activations,
            weight_type=QuantType.QInt8,
            calibrate_method=how.method,
            extra_options={"ActivationSymmetric": how.symmetric, "CalibStridedMinMax": 1},  # else all activations are kept
        )
        finish(onnx.load(out), manifest, out)
        error = features(out, manifest, calibration).mean(0) - features(graph, manifest, calibration).mean(0)
        finish(_with_bias(onnx.load(out), -error), manifest, out)


def sweep(
    graph: Path, manifest: Manifest, out: Path, calibration: NDArray[np.uint8], settings: Sequence[Int8] = FOR_CPU
) -> tuple[Int8, list[dict[str, object]]]:
    """Try the settings, calibrated on some of the pictures; write the most exact of those nearly as fast as the fastest.

    Returns: the setting, and of each: its name, recall_at_10 and images_per_s.
    """
    some = calibration[:SWEPT]
    wanted = embed(graph, manifest, calibration)
    truth = nearest(wanted, wanted)
    tried: list[tuple[float, float, Int8]] = []
    for how in tqdm(settings, desc="int8 settings", unit="setting", dynamic_ncols=True):
        to_int8(graph, manifest, out, some, how)
        recall = overlap(nearest(embed(out, manifest, calibration), wanted), truth)
        tried.append((recall, max(images_per_s(out, manifest, some[:BATCH]) for _ in range(3)), how))
    fast = [entry for entry in tried if entry[1] >= NEARLY * max(rate for _, rate, _ in tried)]
    best = max(fast, key=lambda entry: entry[0])[2]
    to_int8(graph, manifest, out, calibration, best)
    return best, [{"setting": str(how), "recall_at_10": recall, "images_per_s": rate} for recall, rate, how in tried]


def finish(model: onnx.ModelProto, manifest: Manifest, out: Path) -> None:
    """Undo what the tools change beside the arithmetic: versions, unused operator sets, metadata. Raises: ExportError."""
    ONNXModel(model).topological_sort()  # fp16 puts its casts last
    del model.graph.value_info[:]  # float32's types still stand there
    used = {node.domain for node in model.graph.node}
    opsets = [entry for entry in model.opset_import if entry.domain in used | {""}]
    del model.opset_import[:]
    model.opset_import.extend(opsets)
    model.ir_version = min(model.ir_version, MAX_IR_VERSION)
    stamp(model, manifest)
    onnx.save_model(model, out)
    check_graph(out, manifest)


def features(graph: Path, manifest: Manifest, images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """What the L2 norm is given, (N, D)."""
    model = onnx.load(graph)
    name = _feature_name(model)
    model.graph.output.append(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", manifest.embedding_dim]))
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    parts = [session.run([name], {manifest.input.name: images[at : at + BATCH]})[0] for at in range(0, len(images), BATCH)]
    return np.concatenate(parts)


def _without_detours(model: onnx.ModelProto) -> onnx.ModelProto:
    """Repair what the converter does around nodes that stay in float32.

    A tensor that two of them read is cast twice under one name; one that one of them writes goes through fp16 all the same.
    """
    nodes = {node.output[0]: node for node in reversed(model.graph.node)}  # the first of each name
    for node in list(model.graph.node):
        if nodes[node.output[0]] is not node:
            model.graph.node.remove(node)
    for node in (node for node in model.graph.node if node.op_type == "Cast" and node.attribute[0].i == onnx.TensorProto.FLOAT):
        before = nodes.get(node.input[0])
        if before is not None and before.op_type == "Cast" and before.attribute[0].i == onnx.TensorProto.FLOAT16:
            node.input[0] = before.input[0]
    return model


def _with_bias(model: onnx.ModelProto, bias_D: NDArray[np.float32]) -> onnx.ModelProto:
    name = _feature_name(model)
    for node in model.graph.node:
        node.input[:] = [f"{entry}_corrected" if entry == name else entry for entry in node.input]
    at = 1 + next(at for at, node in enumerate(model.graph.node) if name in node.output)
    model.graph.initializer.append(numpy_helper.from_array(bias_D.astype(np.float32), "bias_correction"))
    model.graph.node.insert(at, helper.make_node("Add", [name, "bias_correction"], [f"{name}_corrected"], "bias_correction"))
    return model


def _feature_name(model: onnx.ModelProto) -> str:
    """The tensor that the last division, that of the L2 norm, divides."""
    last = next(node for node in model.graph.node if model.graph.output[0].name in node.output)
    assert last.op_type == "Div", "the graph ends in its L2 norm"
    return str(last.input[0])


def _between(model: onnx.ModelProto, inner: set[str]) -> set[str]:
    """Names of the nodes from the first to the last of `inner`, in the graph's order."""
    names = [node.name for node in model.graph.node]
    places = [at for at, name in enumerate(names) if name in inner]
    return set(names[places[0] : places[-1] + 1]) if places else set()


class _Calibration(CalibrationDataReader):  # type: ignore[misc]
    """Batches of one size: the histogram calibrators cannot join others."""

    def __init__(self, name: str, images: NDArray[np.uint8]) -> None:
        size = min(CALIBRATION_BATCH, len(images))
        self._feeds = [{name: images[at : at + size]} for at in range(0, len(images) - size + 1, size)]
        self._left = iter(self._feeds)

    def __len__(self) -> int:
        return len(self._feeds)

    def set_range(self, start_index: int, end_index: int) -> None:
        """What to read next."""
        self._left = iter(self._feeds[start_index:end_index])

    def get_next(self) -> dict[str, NDArray[np.uint8]] | None:
        return next(self._left, None)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The tools print and warn about what is meant to be so."""
    former = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(former)
