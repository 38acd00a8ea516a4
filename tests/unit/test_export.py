"""The exported graph: what Triton needs of it, that it is the network, and that nothing else is ever published."""

import io
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from PIL import Image
from torchvision.models.resnet import Bottleneck

from export import publish as module
from export.graph import check_graph, stamp, write_graph
from export.parity import BATCH_SIZES, golden_images, measure_parity
from export.publish import publish
from serve.classify import Head
from serve.contract import METADATA_KEY, Manifest, Preprocess
from serve.encoder import OnnxEncoder, find_graph, open_encoder
from serve.errors import EncoderMismatch, ExportError
from train.checkpoint import load_encoder, save_encoder
from train.encoder import LAYERS, Encoder
from train.torch_encoder import TorchEncoder, open_run

TRAINING = {"arch": "resnet18", "width": 0.125, "stem": "small"}


pytestmark = pytest.mark.usefixtures("one_cpu")


def write_run(folder: Path, preprocess: Preprocess, seed: int = 0) -> Path:
    """What pretraining leaves, without the training: random weights, and batch norms that have seen something."""
    torch.manual_seed(seed)
    encoder = Encoder("resnet18", 0.125, "small")
    for name, value in encoder.named_parameters():
        if value.ndim == 1 and name.endswith("weight"):
            torch.nn.init.uniform_(value, 0.5, 1.5)  # otherwise every block would be its shortcut
    encoder.train()
    for _ in range(3):
        encoder(torch.rand(8, 3, preprocess.height_px, preprocess.width_px))
    save_encoder(folder, encoder.eval(), preprocess, TRAINING)
    return folder


def frame(height: int, width: int) -> Preprocess:
    square = height == width
    return Preprocess(
        height_px=height,
        width_px=width,
        resize="center_crop" if square else "stretch",
        crop=0.875 if square else 1.0,
        resample="bicubic",
        jpeg="full",
    )


@pytest.fixture(scope="module", params=[(48, 48), (32, 16)], ids=["square", "tall"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run") / "run", frame(*request.param))


@pytest.fixture(scope="module")
def repository(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published") / "models"
    publish(*load_encoder(run), folder, name="first", head=None, target="cpu", pictures=encoded())
    return folder


def encoded() -> list[bytes]:
    """Pictures as people have them: wide, tall, grey, transparent, turned by EXIF, 16 bits, CMYK, a palette."""
    rng = np.random.default_rng(0)

    def picture(height: int, width: int) -> Image.Image:
        small = rng.integers(0, 256, (5, 4, 3), dtype=np.uint8)
        return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)

    turned = Image.Exif()
    turned[0x0112] = 6
    rgba = picture(50, 61)
    rgba.putalpha(picture(50, 61).convert("L"))
    deep = Image.fromarray(rng.integers(0, 65536, (40, 30), dtype=np.uint16))
    kinds = [
        (picture(40, 120), "JPEG", {}),
        (picture(90, 33), "PNG", {}),
        (picture(64, 64).convert("L"), "PNG", {}),
        (rgba, "PNG", {}),
        (picture(80, 45), "JPEG", {"exif": turned.tobytes()}),
        (deep, "PNG", {}),
        (picture(30, 30).convert("CMYK"), "JPEG", {}),
        (picture(30, 50).convert("P"), "GIF", {}),
    ]
    files = []
    for image, kind, options in kinds:
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        files.append(buffer.getvalue())
    return files


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- the graph --------------------------------------------------------------------------------------------------------


def test_the_graph_is_one_file_that_triton_can_load(run: Path, repository: Path) -> None:
    path = find_graph(repository)
    model = onnx.load(path, load_external_data=False)
    onnx.checker.check_model(model, full_check=True)
    assert {entry.domain for entry in model.opset_import if entry.version} <= {"", "ai.onnx"}
    assert all(18 <= entry.version <= 20 for entry in model.opset_import)
    assert model.ir_version <= 10
    assert all(tensor.data_location == onnx.TensorProto.DEFAULT for tensor in model.graph.initializer)
    assert {file.name for file in path.parent.iterdir()} == {"model.onnx", "manifest.json", "config.pbtxt"}
    manifest = load_encoder(run)[1]
    (image,), (embedding,) = model.graph.input, model.graph.output
    kinds = {"uint8": onnx.TensorProto.UINT8, "float32": onnx.TensorProto.FLOAT}
    for value, spec in ((image, manifest.input), (embedding, manifest.output)):
        batch, *rest = value.type.tensor_type.shape.dim
        assert value.name == spec.name
        assert value.type.tensor_type.elem_type == kinds[spec.dtype]
        assert batch.dim_param
        assert not batch.dim_value
        assert tuple(dim.dim_value for dim in rest) == spec.shape


def test_the_manifest_is_in_the_graph_and_beside_it(repository: Path) -> None:
    path = find_graph(repository)
    stored = {entry.key: entry.value for entry in onnx.load(path).metadata_props}[METADATA_KEY]
    beside = Manifest.read(path.with_name("manifest.json"))
    assert Manifest.parse(stored, "graph") == beside == OnnxEncoder(path).manifest
    assert beside.name == "first"
    assert beside.parity is not None
    assert beside.parity.images == 32 + len(encoded())
    assert beside.parity.batch_sizes == BATCH_SIZES
    assert beside.parity.max_abs_error <= 1e-5
    assert 0.99999 <= beside.parity.min_cosine <= 1


@pytest.mark.parametrize("count", [0, 1, 2, 7, 64, 65])
def test_every_batch_size_gives_the_same_vectors(repository: Path, count: int) -> None:
    encoder = open_encoder(repository)
    pictures = [load for _ in range(9) for load in encoded()][:count]
    vectors = encoder.embed(pictures)
    assert vectors.shape == (count, encoder.manifest.embedding_dim)
    assert vectors.dtype == np.float32
    if count:
        singly = np.concatenate([encoder.embed([picture]) for picture in pictures[:8]])
        np.testing.assert_allclose(vectors[:8], singly, atol=1e-6)
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


def test_the_graph_is_the_network_on_real_pictures(run: Path, repository: Path, tmp_path: Path) -> None:
    network, graph = open_run(run), open_encoder(repository)
    wanted, got = network.embed(encoded()), graph.embed(encoded())
    assert (wanted * got).sum(1).min() >= 1 - 1e-6
    np.testing.assert_allclose(got, wanted, atol=1e-5)
    likeness = wanted @ wanted.T - np.eye(len(wanted))
    assert likeness.max() < 0.9999, "or they would agree about anything"


def test_a_picture_is_the_same_by_path_bytes_and_turned_upright(repository: Path, tmp_path: Path) -> None:
    encoder, turned = open_encoder(repository), encoded()[4]
    (tmp_path / "turned.jpg").write_bytes(turned)
    upright = Image.fromarray(np.rot90(np.asarray(Image.open(io.BytesIO(turned))), -1))
    assert upright.size == (80, 45)
    by_path, by_bytes, by_hand = encoder.embed([str(tmp_path / "turned.jpg"), turned, upright])
    np.testing.assert_allclose(by_path, by_bytes, atol=1e-6)
    np.testing.assert_allclose(by_path, by_hand, atol=1e-6)


def test_stamping_replaces_the_manifest_and_keeps_the_rest(repository: Path) -> None:
    path = find_graph(repository)
    model, manifest = onnx.load(path), Manifest.read(path.with_name("manifest.json"))
    model.metadata_props.add(key="author", value="me")
    renamed = manifest.model_copy(update={"name": "renamed"})
    stamp(model, renamed)
    props = [(entry.key, entry.value) for entry in model.metadata_props]
    assert dict(props)["author"] == "me"
    assert Manifest.parse(dict(props)[METADATA_KEY], "graph") == renamed
    assert len(props) == len(dict(props))


def damaged_shape(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2


def damaged_name(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        node.output[:] = ["vector" if name == "embedding" else name for name in node.output]
    model.graph.output[0].name = "vector"


def damaged_ir(model: onnx.ModelProto) -> None:
    model.ir_version = 11


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damaged_shape, "wanted (image uint8|embedding float32)"),
        (damaged_name, "has vector float32"),
        (damaged_ir, "IR 11, opset 18; wanted IR <= 10"),
    ],
)
def test_a_graph_that_triton_could_not_serve_is_refused(repository: Path, tmp_path: Path, damage, message: str) -> None:
    path = find_graph(repository)
    model, manifest = onnx.load(path), Manifest.read(path.with_name("manifest.json"))
    check_graph(path, manifest)
    damage(model)
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(ExportError, match=message):
        check_graph(tmp_path / "model.onnx", manifest)


# --- parity -----------------------------------------------------------------------------------------------------------


def test_golden_images_are_the_same_every_time_and_varied(run: Path) -> None:
    manifest = load_encoder(run)[1]
    images = golden_images(manifest)
    assert images.shape == (32, *manifest.input.shape)
    assert images.dtype == np.uint8
    assert np.array_equal(images, golden_images(manifest))
    assert len(np.unique(images.reshape(32, -1), axis=0)) == 32
    assert (images.min(), images.max()) == (0, 255)


def change_weight(graph: Path, change: float) -> None:
    model = onnx.load(graph)
    largest = max(model.graph.initializer, key=lambda tensor: int(np.prod(tensor.dims)))
    values = numpy_helper.to_array(largest).copy()
    values += np.float32(change) * np.random.default_rng(0).standard_normal(values.shape, dtype=np.float32)
    largest.CopyFrom(numpy_helper.from_array(values, largest.name))
    onnx.save(model, graph)


@pytest.mark.parametrize("change", [1e-3, 0.1, np.nan, np.inf])
def test_a_graph_that_differs_from_the_network_is_refused(run: Path, repository: Path, tmp_path: Path, change: float) -> None:
    encoder, manifest = load_encoder(run)
    graph = tmp_path / "model.onnx"
    graph.write_bytes(find_graph(repository).read_bytes())
    measure_parity(encoder, graph, manifest)
    change_weight(graph, change)
    faults = "(the fp32 graph differs from the network|a vector's length is nan)"
    with pytest.raises(ExportError, match=f"{faults}.*; nothing was published") as refusal:
        measure_parity(encoder, graph, manifest)
    assert "\n" not in str(refusal.value)


def test_a_network_that_differs_from_the_graph_is_refused(run: Path, repository: Path) -> None:
    encoder, manifest = load_encoder(run)
    with torch.no_grad():
        encoder.layer4[1].conv2.weight.mul_(1.01)
    with pytest.raises(ExportError, match="nothing was published"):
        measure_parity(encoder, find_graph(repository), manifest)


def test_the_users_own_pictures_count(run: Path, repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A difference that only their pictures show is refused."""
    encoder, manifest = load_encoder(run)
    pictures = encoded()
    assert measure_parity(encoder, find_graph(repository), manifest, pictures).images == 32 + len(pictures)
    forward = Encoder.forward
    monkeypatch.setattr(Encoder, "forward", lambda self, images: forward(self, images) + 0.01 * (len(images) > 32))
    with pytest.raises(ExportError, match="nothing was published"):
        measure_parity(encoder, find_graph(repository), manifest, pictures)
    measure_parity(encoder, find_graph(repository), manifest)


IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


@pytest.mark.parametrize(
    "settings", [{"sk": True, "pool_padding": "tf"}, IMAGENET | {"stem_quirk": "pad2"}], ids=["v2", "mean"]
)
def test_borders_kernels_and_pixel_statistics_are_inside_the_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    monkeypatch.setitem(LAYERS, "resnet50", (Bottleneck, (1, 1, 1, 1)))
    torch.manual_seed(0)
    network = Encoder("resnet50", 0.125, "small" if "mean" in settings else "imagenet", **settings)
    for name, value in network.named_parameters():
        if value.ndim == 1 and name.endswith("weight"):
            torch.nn.init.uniform_(value, 0.5, 1.5)
    with torch.no_grad():
        network(torch.rand(16, 3, 40, 28))  # odd sizes within
    save_encoder(tmp_path / "run", network.eval(), frame(40, 28), {})
    encoder, manifest = load_encoder(tmp_path / "run")
    write_graph(encoder, manifest, tmp_path / "model.onnx")
    assert measure_parity(encoder, tmp_path / "model.onnx", manifest).max_abs_error < 1e-5
    plain = Encoder("resnet50", 0.125, encoder.facts["stem"], sk=settings.get("sk", False))
    plain.load_state_dict(encoder.state_dict())
    with pytest.raises(ExportError, match="nothing was published"):
        measure_parity(plain.eval(), tmp_path / "model.onnx", manifest)


# --- publishing -------------------------------------------------------------------------------------------------------


@pytest.fixture
def quick(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exporting takes seconds: take the graph that was exported once."""
    graph = find_graph(repository).read_bytes()
    monkeypatch.setattr(module, "write_graph", lambda _encoder, _manifest, path: path.write_bytes(graph))


@pytest.mark.parametrize("present", [True, False])
def test_nothing_is_published_if_parity_fails(
    run: Path, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, present: bool
) -> None:
    models, graph = tmp_path / "models", find_graph(repository).read_bytes()
    if present:
        shutil.copytree(repository, models)
    before = contents(tmp_path)

    def broken_graph(_encoder: Encoder, _manifest: Manifest, path: Path) -> None:
        path.write_bytes(graph)
        change_weight(path, 0.1)

    monkeypatch.setattr(module, "write_graph", broken_graph)
    with pytest.raises(ExportError, match="nothing was published"):
        publish(*load_encoder(run), models, name="first", head=None, target="cpu")
    assert contents(tmp_path) == before
    assert models.exists() == present


def head_for(encoder_id: str, dim: int) -> Head:
    weight = np.random.default_rng(0).normal(size=(2, dim)).astype(np.float32)
    return Head(weight=weight, bias=np.zeros(2, np.float32), classes=("a", "b"), encoder_id=encoder_id)


def test_a_head_of_another_encoder_is_refused_before_anything_is_done(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("the export went on")

    monkeypatch.setattr(module, "write_graph", never)
    encoder = open_run(run)
    with pytest.raises(EncoderMismatch, match=f"0123456789abcdef.*{encoder.encoder_id}.*simclr fit-head"):
        publish(*load_encoder(run), tmp_path / "models", name="one", head=head_for("0123456789abcdef", 64), target="cpu")
    assert not (tmp_path / "models").exists()


@pytest.mark.usefixtures("quick")
def test_a_head_of_the_run_is_published_with_it(run: Path, tmp_path: Path) -> None:
    encoder = open_run(run)
    head = head_for(encoder.encoder_id, encoder.manifest.embedding_dim)
    _, models = publish(*load_encoder(run), tmp_path / "models", name="one", head=head, target="cpu")
    assert {"one_head", "one_classify"} < set(models)


@pytest.mark.usefixtures("quick")
def test_what_is_asked_of_the_repository_reaches_it(run: Path, tmp_path: Path) -> None:
    _, models = publish(*load_encoder(run), tmp_path / "models", name="one", head=None, target="gpu", tensorrt=True, dali=True)
    assert {"one_preprocess_dali", "one_embed_dali"} < set(models)
    assert 'name: "tensorrt"' in (tmp_path / "models/one_encoder/config.pbtxt").read_text()


def ids(encoders: Sequence[TorchEncoder | OnnxEncoder]) -> list[str]:
    return [encoder.encoder_id for encoder in encoders]


@pytest.mark.usefixtures("quick")
def test_a_run_and_its_export_are_the_same_encoder_whatever_its_name(run: Path, repository: Path, tmp_path: Path) -> None:
    manifest, _ = publish(*load_encoder(run), tmp_path / "models", name="second", head=None, target="gpu")
    exported = [OnnxEncoder(find_graph(folder)) for folder in (repository, tmp_path / "models")]
    assert len({open_run(run).encoder_id, manifest.encoder_id, *ids(exported)}) == 1
    assert [encoder.manifest.name for encoder in exported] == ["first", "second"]


def test_other_weights_and_another_frame_are_other_encoders(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / "a", frame(32, 32)),
        write_run(tmp_path / "b", frame(32, 32), seed=1),
        write_run(tmp_path / "c", frame(32, 16)),
    ]
    again = write_run(tmp_path / "d", frame(32, 32))
    assert len(set(ids([open_run(run) for run in runs]))) == 3
    assert open_run(again).encoder_id == open_run(runs[0]).encoder_id
