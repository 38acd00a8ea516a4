"""fp16 and int8 of the kinds of network that train/ has, and what is put right or refused after a tool rewrote a graph."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from PIL import Image
from torchvision.models.resnet import BasicBlock, Bottleneck

from export.graph import write_graph
from export.parity import BATCH_SIZES, measure_parity
from export.precision import FOR_TENSORRT, Int8, finish, to_fp16, to_int8
from serve.contract import METADATA_KEY, Manifest, Preprocess
from serve.errors import ExportError
from tests.toy_encoder import write_toy_encoder
from train.checkpoint import load_encoder, save_encoder
from train.encoder import LAYERS, Encoder

SIZE = 32
NETWORKS: dict[str, tuple[Any, float, str, dict[str, Any]]] = {
    "basic blocks": (BasicBlock, 0.25, "imagenet", {}),
    "selective kernels": (Bottleneck, 0.375, "small-s2", {"sk": True}),
}


pytestmark = pytest.mark.usefixtures("one_cpu")


def in_precision(manifest: Manifest, precision: str) -> Manifest:
    fields = {name: value for name, value in dict(manifest).items() if name not in ("schema_version", "encoder_id")}
    return Manifest.create(**fields | {"precision": precision})


def photos() -> np.ndarray:
    """uint8 (48, SIZE, SIZE, 3): soft shapes."""
    rng = np.random.default_rng(0)
    small = [Image.fromarray(rng.integers(0, 256, (5, 4, 3), dtype=np.uint8)) for _ in range(48)]
    return np.stack([np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC)) for image in small])


@pytest.fixture(scope="module", params=NETWORKS)
def network(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Encoder, Manifest, Path]:
    """An encoder whose batch norms have seen the photos, its manifest and its float32 graph."""
    block, width, stem, settings = NETWORKS[request.param]
    folder = tmp_path_factory.mktemp("network")
    frame = Preprocess(height_px=SIZE, width_px=SIZE, resize="center_crop", crop=1.0, resample="bicubic", jpeg="full")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(LAYERS, "resnet50", (block, (1, 1, 1, 1)))
        torch.manual_seed(0)
        encoder = Encoder("resnet50", width, stem, **settings)
        for name, value in encoder.named_parameters():
            if value.ndim == 1 and name.endswith("weight"):
                torch.nn.init.uniform_(value, 0.5, 1.5)
        with torch.no_grad():
            for _ in range(30):
                encoder.train()(torch.from_numpy(photos()).permute(0, 3, 1, 2) / 255)
        save_encoder(folder, encoder.eval(), frame, {})
        encoder, manifest = load_encoder(folder)
    write_graph(encoder, manifest, folder / "fp32.onnx")
    return encoder, manifest, folder / "fp32.onnx"


CONVERSIONS: dict[str, tuple[str, Callable[..., None]]] = {
    "fp16": ("fp16", lambda graph, manifest, out, _: to_fp16(graph, manifest, out)),
    "int8": ("int8", lambda graph, manifest, out, images: to_int8(graph, manifest, out, images, Int8())),
    "int8 for TensorRT": ("int8", lambda graph, manifest, out, images: to_int8(graph, manifest, out, images, FOR_TENSORRT)),
}


@pytest.mark.parametrize("conversion", CONVERSIONS)
def test_every_network_is_near_itself_at_every_batch_size(network: Any, tmp_path: Path, conversion: str) -> None:
    encoder, manifest, graph = network
    precision, convert = CONVERSIONS[conversion]
    manifest = in_precision(manifest, precision)
    convert(graph, manifest, tmp_path / "converted.onnx", photos())
    parity = measure_parity(encoder, tmp_path / "converted.onnx", manifest, images=photos())
    assert parity.batch_sizes == BATCH_SIZES
    assert parity.max_abs_error > 1e-6, "something was rounded"
    assert (tmp_path / "converted.onnx").stat().st_size < 0.75 * graph.stat().st_size


# --- after any tool ---------------------------------------------------------------------------------------------------


@pytest.fixture
def toy(tmp_path: Path) -> tuple[onnx.ModelProto, Manifest]:
    graph, manifest = write_toy_encoder(tmp_path / "toy")
    return onnx.load(graph), manifest


def test_what_a_tool_leaves_behind_is_tidied(toy: tuple[onnx.ModelProto, Manifest], tmp_path: Path) -> None:
    model, manifest = toy
    model.ir_version = 12
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))  # onnxruntime's tools write it whether used or not
    model.graph.node.append(model.graph.node.pop(0))  # fp16's converter puts its casts last
    helper.set_model_props(model, {"author": "somebody"})
    finish(model, manifest, tmp_path / "model.onnx")
    tidy = onnx.load(tmp_path / "model.onnx")
    assert tidy.ir_version <= 10
    assert [(entry.domain, entry.version) for entry in tidy.opset_import] == [("", 18)]
    assert {entry.key: entry.value for entry in tidy.metadata_props} == {
        "author": "somebody",
        METADATA_KEY: manifest.model_dump_json(),
    }


def newer_operators(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 21


def foreign_operator(model: onnx.ModelProto) -> None:
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    model.graph.node.append(helper.make_node("Gelu", ["raw"], ["unused"], domain="com.microsoft"))


def fixed_batch(model: onnx.ModelProto) -> None:
    model.graph.output[0].type.tensor_type.shape.dim[0].dim_value = 1


def other_output(model: onnx.ModelProto) -> None:
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("raw", onnx.TensorProto.FLOAT, ["batch", 8]))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (newer_operators, "opset 21; wanted .* opset 18 to 20"),
        (foreign_operator, "operators of com.microsoft"),
        (fixed_batch, r"has embedding float32 \[1, 8\]"),
        (other_output, "has raw float32"),
    ],
)
def test_what_a_tool_must_not_do_is_refused(
    toy: tuple[onnx.ModelProto, Manifest], tmp_path: Path, damage: Callable[[onnx.ModelProto], None], message: str
) -> None:
    model, manifest = toy
    damage(model)
    with pytest.raises(ExportError, match=message):
        finish(model, manifest, tmp_path / "model.onnx")
