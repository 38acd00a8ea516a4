"""fp16 and int8: what Triton can load, close to float32, and never published at a loss that nobody has agreed to."""

import json

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnxruntime.quantization import CalibrationMethod
from onnxruntime.quantization.calibrate import HistogramCalibrater
from PIL import Image

from export import precision as module
from export.graph import write_graph
from export.parity import measure_parity
from export.precision import FOR_CPU, FOR_TENSORRT, Int8, features, sweep, to_fp16, to_int8
from export.publish import _pixels, graph_digest, publish, report_lines, training_images
from export.retrieval import embed
from serve.classify import Head
from serve.contract import METADATA_KEY, Manifest, Preprocess
from serve.encoder import open_encoder
from serve.errors import ExportError
from train.checkpoint import load_encoder, save_encoder
from train.encoder import Encoder

SIZE = 32


pytestmark = pytest.mark.usefixtures("one_cpu")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Sixty pictures of three kinds."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for kind in range(3):
        ground = rng.integers(0, 256, (4 + 4 * kind, 5, 3))
        for number in range(20):
            pixels = (ground + rng.normal(0, 30, ground.shape)).clip(0, 255).astype(np.uint8)
            path = folder / f"kind {kind}" / f"{number}.png"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(pixels).resize((SIZE, SIZE), Image.Resampling.BICUBIC).save(path)
    return folder


@pytest.fixture(scope="module")
def run(photos, tmp_path_factory):
    """Random weights, batch norms that have seen the pictures, and the config.json of a training."""
    torch.manual_seed(0)
    frame = Preprocess(height_px=SIZE, width_px=SIZE, resize="center_crop", crop=1.0, resample="bicubic", jpeg="full")
    encoder = Encoder("resnet18", 0.25, "small-s2")
    pixels = np.stack([np.asarray(Image.open(path)) for path in sorted(photos.rglob("*.png"))])
    for name, value in encoder.named_parameters():
        if value.ndim == 1 and name.endswith("weight"):
            torch.nn.init.uniform_(value, 0.5, 1.5)
    with torch.inference_mode():
        for _ in range(30):
            encoder.train()(torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255)
    folder = tmp_path_factory.mktemp("run")
    save_encoder(folder, encoder.eval(), frame, {})
    (folder / "config.json").write_text(json.dumps({"images": str(photos)}))
    return folder


@pytest.fixture(scope="module")
def exported(run, photos, tmp_path_factory):
    """Graph, manifest and prepared pictures."""
    encoder, manifest = load_encoder(run)
    graph = tmp_path_factory.mktemp("graph") / "fp32.onnx"
    write_graph(encoder, manifest, graph)
    pixels = np.stack([np.asarray(Image.open(path)) for path in sorted(photos.rglob("*.png"))])
    return graph, manifest, pixels


def converted(manifest, precision):
    fields = {name: value for name, value in dict(manifest).items() if name not in ("schema_version", "encoder_id")}
    return Manifest.create(**fields | {"precision": precision})


def cosines(a, b):
    return (a.astype(np.float64) * b).sum(1)


def test_fp16_is_half_the_size_and_nearly_the_same(exported, run, tmp_path):
    graph, manifest, pixels = exported
    half = converted(manifest, "fp16")
    to_fp16(graph, half, tmp_path / "half.onnx")
    assert (tmp_path / "half.onnx").stat().st_size < 0.55 * graph.stat().st_size
    got, wanted = embed(tmp_path / "half.onnx", half, pixels), embed(graph, manifest, pixels)
    assert cosines(got, wanted).min() > 0.9999
    assert np.abs(got - wanted).max() > 1e-6, "something was rounded"
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, atol=1e-6)
    measure_parity(load_encoder(run)[0], tmp_path / "half.onnx", half)


@pytest.mark.parametrize("how", [*FOR_CPU], ids=str)
def test_int8_is_a_quarter_of_the_size_and_near(exported, tmp_path, how):
    graph, manifest, pixels = exported
    small = converted(manifest, "int8")
    to_int8(graph, small, tmp_path / "small.onnx", pixels, how)
    model = onnx.load(tmp_path / "small.onnx")
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}
    assert [entry.domain for entry in model.opset_import] == [""]
    assert model.ir_version <= 10
    assert {entry.key: entry.value for entry in model.metadata_props}[METADATA_KEY] == small.model_dump_json()
    assert (tmp_path / "small.onnx").stat().st_size < 0.5 * graph.stat().st_size
    assert cosines(embed(tmp_path / "small.onnx", small, pixels), embed(graph, manifest, pixels)).min() > 0.99


def test_tensorrt_gets_signed_symmetric_activations(exported, tmp_path):
    graph, manifest, pixels = exported
    to_int8(graph, converted(manifest, "int8"), tmp_path / "small.onnx", pixels, FOR_TENSORRT)
    model = onnx.load(tmp_path / "small.onnx")
    values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    zeros = [values[node.input[2]] for node in model.graph.node if node.op_type == "QuantizeLinear" and len(node.input) > 2]
    assert zeros
    assert all(zero.dtype == np.int8 and not zero.any() for zero in zeros)


def test_the_mean_error_of_the_features_is_gone(exported, tmp_path):
    graph, manifest, pixels = exported
    small = converted(manifest, "int8")
    wanted = features(graph, manifest, pixels)
    to_int8(graph, small, tmp_path / "small.onnx", pixels, Int8())
    corrected = onnx.load(tmp_path / "small.onnx")
    name = next(node.input[0] for node in corrected.graph.node if node.name == "bias_correction")
    corrected.graph.output.append(onnx.helper.make_tensor_value_info(f"{name}_corrected", 1, ["batch", manifest.embedding_dim]))
    corrected.graph.output.append(onnx.helper.make_tensor_value_info(name, 1, ["batch", manifest.embedding_dim]))
    session = ort.InferenceSession(corrected.SerializeToString(), providers=["CPUExecutionProvider"])
    after, before = session.run([f"{name}_corrected", name], {"image": pixels})
    assert np.abs((before - wanted).mean(0)).max() > 1e-3 * np.abs(wanted).max()
    np.testing.assert_allclose(after.mean(0), wanted.mean(0), atol=1e-5 * np.abs(wanted).max())


def test_calibration_keeps_the_activations_of_one_batch_at_a_time(exported, tmp_path, monkeypatch):
    """All of 256 pictures of a ResNet-50 at 224 px took more than 24 GB."""
    graph, manifest, pixels = exported
    kept = []
    monkeypatch.setattr(
        HistogramCalibrater,
        "clear_collected_data",
        lambda self: (kept.append(len(self.intermediate_outputs)), self.intermediate_outputs.clear()),
    )
    to_int8(graph, manifest, tmp_path / "int8.onnx", pixels, Int8(method=CalibrationMethod.Percentile))
    assert len(kept) >= 3
    assert max(kept) == 1


def test_the_sweep_takes_the_most_exact_of_the_fast(exported, tmp_path, monkeypatch):
    graph, manifest, pixels = exported
    a, b, c = Int8(), Int8(float_ends=True), Int8(seven_bits=True)
    recalls, rates = {a: 0.9, b: 0.95, c: 0.99}, {a: 100.0, b: 90.0, c: 70.0}
    written = []
    monkeypatch.setattr(module, "to_int8", lambda *arguments: written.append(arguments[-1]))
    monkeypatch.setattr(module, "embed", lambda *_: np.ones((20, 4), np.float32))
    monkeypatch.setattr(module, "overlap", lambda *_: recalls[written[-1]])
    monkeypatch.setattr(module, "images_per_s", lambda *_: rates[written[-1]])
    best, tried = sweep(graph, manifest, tmp_path / "out.onnx", pixels, (a, b, c))
    assert best == b == written[-1]
    assert [entry["recall_at_10"] for entry in tried] == [0.9, 0.95, 0.99]


def test_publishing_int8_says_what_it_costs(run, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "FOR_CPU", (Int8(),))
    trained = load_encoder(run)[1]
    weight = np.random.default_rng(0).normal(size=(2, trained.embedding_dim)).astype(np.float32)
    head = Head(weight=weight, bias=np.zeros(2, np.float32), classes=("a", "b"), encoder_id=trained.encoder_id)
    options = {"name": "x", "target": "cpu", "precision": "int8", "images": training_images(run), "accept_loss": True}
    manifest, models = publish(*load_encoder(run), tmp_path / "models", head=head, **options)
    found = manifest.retrieval
    assert manifest.encoder_id != trained.encoder_id, "its vectors differ: another encoder"
    assert "x_classify" in models
    assert (found.pictures, found.size_bytes < found.size_bytes_fp32) == (60, True)
    assert 0.5 < found.recall_at_10 <= 1
    assert 0.5 < found.head_agreement <= 1
    assert found.knn_accuracy is not None
    assert open_encoder(tmp_path / "models").manifest == manifest
    text = "\n".join(report_lines(manifest))
    for word in ("recall@10", "cosine", "MB", "img/s", "kNN accuracy", "same class", "uint8 x int8"):
        assert word in text


def test_below_the_floor_nothing_is_published_unless_agreed(run, tmp_path, monkeypatch):
    monkeypatch.setattr("export.publish.FLOORS", {"fp16": 1.01})
    options = {"name": "x", "head": None, "target": "cpu", "precision": "fp16", "images": training_images(run)}
    with pytest.raises(ExportError, match=r"fp16 finds .*% of float32's ten nearest, wanted 101%.*--accept-loss"):
        publish(*load_encoder(run), tmp_path / "models", **options)
    assert not (tmp_path / "models").exists()
    assert publish(*load_encoder(run), tmp_path / "models", accept_loss=True, **options)[0].precision == "fp16"


def test_pictures_are_needed(run, tmp_path):
    manifest = load_encoder(run)[1]
    few = tmp_path / "few"
    few.mkdir()
    Image.new("RGB", (9, 9)).save(few / "a.png")
    with pytest.raises(ExportError, match=r"few: 1 readable pictures, wanted a few hundred"):
        _pixels(str(few), manifest)
    lonely = tmp_path / "lonely"
    lonely.mkdir()
    for file in run.iterdir():
        if file.name != "config.json":
            (lonely / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ExportError, match=r"does not say which pictures it was trained on.*--images"):
        training_images(lonely)
    with pytest.raises(ValueError, match="images is None; wanted pictures"):
        publish(*load_encoder(run), tmp_path / "models", name="x", head=None, target="cpu", precision="int8")


def test_the_digest_is_of_what_is_computed(exported, tmp_path):
    graph = exported[0]
    model = onnx.load(graph)
    onnx.helper.set_model_props(model, {"other": "metadata"})
    model.producer_name = "somebody"
    onnx.save_model(model, tmp_path / "renamed.onnx")
    assert graph_digest(tmp_path / "renamed.onnx") == graph_digest(graph)
    weight = model.graph.initializer[0]
    weight.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight) + 1, weight.name))
    onnx.save_model(model, tmp_path / "changed.onnx")
    assert graph_digest(tmp_path / "changed.onnx") != graph_digest(graph)
