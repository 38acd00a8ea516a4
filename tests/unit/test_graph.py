"""What an exported graph must be, each fault caused; and that what passes is the network at every batch size."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from export import graph as module
from export.graph import check_graph, write_graph
from export.parity import BATCH_SIZES, golden_images, measure_parity, prove_batches
from export.repository import MAX_BATCH
from serve.contract import METADATA_KEY, Manifest, Preprocess
from serve.errors import ExportError
from tests.plain_manifest import plain_manifest
from train.checkpoint import load_encoder, save_encoder
from train.encoder import LAYERS, Encoder
from train.weights import import_weights

SIZE, DIM = 4, 3
BIAS = np.array([0.2, 0.5, 0.9], np.float32)


pytestmark = pytest.mark.usefixtures("one_cpu")


def frame(size: int) -> Preprocess:
    return Preprocess(height_px=size, width_px=size, resize="center_crop", crop=1.0, resample="bicubic", jpeg="full")


def card(precision: str = "fp32") -> Manifest:
    return plain_manifest("toy", DIM, frame(SIZE), precision=precision)


def toy(between: tuple[onnx.NodeProto, ...] = (), *, last: str = "shifted", norm: bool = True) -> onnx.ModelProto:
    """Mean colour in [0, 1], plus a bias, to unit length; `between` makes `last` of `shifted`."""
    nodes = [
        helper.make_node("Cast", ["image"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["pixels", "axes"], ["colour"], keepdims=0),
        helper.make_node("Div", ["colour", "scale"], ["mean"]),
        helper.make_node("Add", ["mean", "bias"], ["shifted"]),
        *between,
        helper.make_node("ReduceL2", [last, "last_axis"], ["length"], keepdims=1),
        helper.make_node("Div", [last, "length"] if norm else [last, "one"], ["embedding"]),
    ]
    constants = {
        "axes": np.array([1, 2]),
        "last_axis": np.array([1]),
        "first_axis": np.array([0]),
        "scale": np.array(255, np.float32),
        "one": np.array(1, np.float32),
        "little": np.array([0, 0, 1e-3], np.float32),
        "bias": BIAS,
        "two_rows": np.array([2, DIM]),
    }
    graph = helper.make_graph(
        nodes,
        "toy",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["batch", SIZE, SIZE, 3])],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["batch", DIM])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


class Toy(nn.Module):
    """The same in torch, without the norm."""

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        return images_BCHW.mean((2, 3)) + torch.from_numpy(BIAS)


def saved(folder: Path, model: onnx.ModelProto) -> Path:
    onnx.save_model(model, folder / "model.onnx")
    return folder / "model.onnx"


def refusal(check: Callable[[], object]) -> str:
    with pytest.raises(ExportError) as caught:
        check()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- what every tool must leave true ----------------------------------------------------------------------------------


def test_the_toy_is_a_graph_as_wanted(tmp_path: Path) -> None:
    path = saved(tmp_path, toy())
    check_graph(path, card())
    assert measure_parity(Toy(), path, card()).batch_sizes == (1, 2, 7, 32) == BATCH_SIZES
    assert MAX_BATCH == 32, "what is served at most is proved"


def opset(version: int) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        model.opset_import[0].version = version

    return change


def without_opset(model: onnx.ModelProto) -> None:
    model.opset_import[0].domain = "com.microsoft"


def foreign(domain: str) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        model.opset_import.append(helper.make_opsetid(domain, 1))

    return change


def foreign_node(model: onnx.ModelProto) -> None:
    foreign("com.microsoft")(model)
    model.graph.node.append(helper.make_node("Gelu", ["mean"], ["unused"], domain="com.microsoft"))


def element_type(end: str, kind: int) -> Callable[[onnx.ModelProto], None]:
    """Declared and true: casts are put in."""

    def change(model: onnx.ModelProto) -> None:
        getattr(model.graph, end)[0].type.tensor_type.elem_type = kind
        if end == "output":
            model.graph.node[-1].output[0] = "single"
            model.graph.node.append(helper.make_node("Cast", ["single"], ["embedding"], to=kind))

    return change


def lying_type(model: onnx.ModelProto) -> None:
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.DOUBLE


def dim(end: str, at: int, value: int | str) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        entry = getattr(model.graph, end)[0].type.tensor_type.shape.dim[at]
        entry.Clear()
        setattr(entry, "dim_value" if isinstance(value, int) else "dim_param", value)

    return change


def nameless_batch(model: onnx.ModelProto) -> None:
    model.graph.output[0].type.tensor_type.shape.dim[0].Clear()


def shapeless(model: onnx.ModelProto) -> None:
    model.graph.output[0].type.tensor_type.ClearField("shape")


def renamed(model: onnx.ModelProto) -> None:
    model.graph.node[-1].output[0] = model.graph.output[0].name = "vector"


def second_output(model: onnx.ModelProto) -> None:
    model.graph.output.append(helper.make_tensor_value_info("mean", TensorProto.FLOAT, ["batch", DIM]))


def unsorted(model: onnx.ModelProto) -> None:
    first = model.graph.node.pop(0)
    model.graph.node.append(first)


def newer_ir(model: onnx.ModelProto) -> None:
    model.ir_version = 11


FAULTS: list[tuple[Callable[[onnx.ModelProto], None], str]] = [
    (newer_ir, "IR 11, opset 18; wanted IR <= 10 and opset 18 to 20"),
    (opset(17), "not a valid ONNX graph|opset 17; wanted"),
    (opset(21), "IR 10, opset 21; wanted"),
    (without_opset, "not a valid ONNX graph"),
    (foreign("com.microsoft"), "operators of com.microsoft"),
    (foreign("ai.onnx.ml"), "operators of ai.onnx.ml"),
    (foreign_node, "operators of com.microsoft"),
    (element_type("output", TensorProto.FLOAT16), "has embedding float16 .* wanted embedding float32"),
    (element_type("output", TensorProto.DOUBLE), "has embedding float64 .* wanted embedding float32"),
    (element_type("input", TensorProto.FLOAT), "has image float32 .* wanted image uint8"),
    (element_type("input", TensorProto.INT8), "has image int8 .* wanted image uint8"),
    (lying_type, "not a valid ONNX graph"),
    (dim("input", 0, 2), r"has image uint8 \[2, 4, 4, 3\], wanted image uint8 \['batch', 4, 4, 3\]"),
    (dim("output", 0, 2), r"has embedding float32 \[2, 3\]"),
    (dim("output", 0, "rows"), "the batch is batch at the input and rows at the output"),
    (dim("input", 1, "height"), r"has image uint8 \['batch', 'height', 4, 3\]"),
    (dim("input", 1, 5), r"has image uint8 \['batch', 5, 4, 3\]"),
    (nameless_batch, r"has embedding float32 \[0, 3\]"),
    (shapeless, r"has embedding float32 \[\]|not a valid"),
    (renamed, "has vector float32 .* wanted embedding float32"),
    (second_output, "inputs and outputs are image, embedding, mean; wanted one of each"),
    (unsorted, "not a valid ONNX graph"),
]


@pytest.mark.parametrize(("damage", "message"), FAULTS, ids=[message[:30] for _, message in FAULTS])
def test_every_fault_is_refused_in_one_line(tmp_path: Path, damage: Callable[[onnx.ModelProto], None], message: str) -> None:
    model = toy()
    damage(model)
    path = saved(tmp_path, model)
    with pytest.raises(ExportError, match=message):
        check_graph(path, card())
    refusal(lambda: check_graph(path, card()))


@pytest.mark.parametrize("version", [18, 19, 20])
def test_these_operator_sets_are_served(tmp_path: Path, version: int) -> None:
    model = toy()
    opset(version)(model)
    check_graph(saved(tmp_path, model), card())


def test_weights_in_another_file_are_refused(tmp_path: Path) -> None:
    onnx.save_model(toy(), tmp_path / "model.onnx", save_as_external_data=True, location="model.data", size_threshold=0)
    message = refusal(lambda: check_graph(tmp_path / "model.onnx", card()))
    assert "lies in another file" in message
    (tmp_path / "model.data").unlink()
    refusal(lambda: check_graph(tmp_path / "model.onnx", card()))


@pytest.mark.parametrize("keep", [0, 1, 100, -1])
def test_what_is_no_graph_is_refused(tmp_path: Path, keep: int) -> None:
    path = saved(tmp_path, toy())
    path.write_bytes(path.read_bytes()[:keep])
    assert "not a valid ONNX graph" in refusal(lambda: check_graph(path, card()))


def test_more_than_one_file_can_hold_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path, toy())
    monkeypatch.setattr(module, "MAX_BYTES", path.stat().st_size)
    check_graph(path, card())
    monkeypatch.setattr(module, "MAX_BYTES", path.stat().st_size - 1)
    assert "that one ONNX file can hold; export a narrower network" in refusal(lambda: check_graph(path, card()))


def test_weights_that_no_file_can_hold_are_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("it was traced")

    monkeypatch.setattr(torch.onnx, "export", never)
    with torch.device("meta"):
        vast = nn.Linear(30_000, 30_000)
    message = refusal(lambda: write_graph(vast, card(), tmp_path / "model.onnx"))
    assert "3.6 GB, more than the 2.15 GB" in message
    assert not list(tmp_path.iterdir())


# --- every batch size -------------------------------------------------------------------------------------------------


def leak(share: str = "bias") -> onnx.ModelProto:
    """A share of the batch's mean is taken off each row."""
    between = (
        helper.make_node("ReduceMean", ["shifted", "first_axis"], ["others"], keepdims=1),
        helper.make_node("Mul", ["others", share], ["share"]),
        helper.make_node("Sub", ["shifted", "share"], ["leaked"]),
    )
    return toy(between, last="leaked")


def two_rows() -> onnx.ModelProto:
    """The batch of the example has become a constant: the typical leak, a Reshape."""
    return toy((helper.make_node("Reshape", ["shifted", "two_rows"], ["fixed"]),), last="fixed")


def one_row() -> onnx.ModelProto:
    """One answer for all."""
    between = (helper.make_node("ReduceMean", ["shifted", "first_axis"], ["one_row"], keepdims=1),)
    return toy(between, last="one_row")


def nans() -> onnx.ModelProto:
    between = (
        helper.make_node("Sub", ["shifted", "one"], ["below"]),
        helper.make_node("Sqrt", ["below"], ["nan"]),
    )
    return toy(between, last="nan")


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize(
    ("model", "message"),
    [
        (leak, "in a batch of (2|7|32), a vector differs by .* from that of the picture alone"),
        (two_rows, "refuses a batch of 1"),
        (one_row, r"gives \(1, 3\) for a batch of 2, wanted \(2, 3\)"),
        (nans, "a vector's length is nan, wanted 1"),
        (lambda: toy(norm=False), "a vector's length is .*, wanted 1"),
    ],
    ids=["leak", "two rows", "one row", "nan", "no norm"],
)
def test_a_graph_whose_rows_are_not_their_own_is_refused(tmp_path: Path, model: Any, message: str, precision: str) -> None:
    path = saved(tmp_path, model())
    with pytest.raises(ExportError, match=message):
        prove_batches(path, card(precision))
    refusal(lambda: prove_batches(path, card(precision)))
    with pytest.raises(ExportError, match="nothing was published"):
        measure_parity(Toy(), path, card(precision))


def test_float32_may_not_leak_even_a_little(tmp_path: Path) -> None:
    path = saved(tmp_path, leak("little"))
    refusal(lambda: prove_batches(path, card("fp32")))
    prove_batches(path, card("int8"))  # whose own steps are larger


def test_rows_are_those_computed_one_by_one_and_by_hand(tmp_path: Path) -> None:
    path, images = saved(tmp_path, toy()), golden_images(card())[:9]
    found = prove_batches(path, card(), (1, 2, 7, 64), images=images)
    assert list(found) == [1, 2, 7, 64]
    for vectors in found.values():
        for vector, image in zip(vectors, images, strict=True):
            by_hand = image.reshape(-1, 3).astype(np.float64).mean(0) / 255 + BIAS
            np.testing.assert_allclose(vector, by_hand / np.sqrt((by_hand**2).sum()), atol=1e-6)


def test_batches_are_full_though_pictures_are_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    class Session:
        def __init__(self, *_: object, **__: object) -> None:
            pass

        def run(self, _names: list[str], feed: dict[str, Any]) -> list[Any]:
            seen.append(len(feed["image"]))
            return [np.tile(np.float32([1, 0, 0]), (len(feed["image"]), 1))]

    monkeypatch.setattr("export.parity.ort.InferenceSession", Session)
    prove_batches(tmp_path, card(), images=golden_images(card())[:8])
    assert set(seen) == {1, 2, 7, 32}


# --- parity -----------------------------------------------------------------------------------------------------------


class Turned(nn.Module):
    """The toy with its vectors turned so that their cosine with the toy's is `cosine`."""

    def __init__(self, cosine: float) -> None:
        super().__init__()
        self.cosine = cosine

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        unit = nn.functional.normalize(Toy()(images_BCHW), dim=1)
        aside = torch.linalg.cross(unit, torch.tensor([[1.0, 0.0, 0.0]]).expand_as(unit))
        return self.cosine * unit + (1 - self.cosine**2) ** 0.5 * nn.functional.normalize(aside, dim=1)


@pytest.mark.parametrize(
    ("precision", "passes", "fails"), [("fp32", 1.0, 0.999_98), ("fp16", 0.9999, 0.9985), ("int8", 0.995, 0.989)]
)
def test_each_precision_has_its_tolerance(tmp_path: Path, precision: str, passes: float, fails: float) -> None:
    path = saved(tmp_path, toy())
    parity = measure_parity(Turned(passes), path, card(precision))
    assert parity.min_cosine == pytest.approx(passes, abs=1e-6)
    assert parity.images == 32
    message = refusal(lambda: measure_parity(Turned(fails), path, card(precision)))
    assert f"the {precision} graph differs" in message
    assert "nothing was published" in message


def test_a_nan_of_the_network_never_passes(tmp_path: Path) -> None:
    class OneNaN(Toy):
        def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
            features = super().forward(images_BCHW)
            features[5] = torch.nan
            return features

    path = saved(tmp_path, toy())
    assert "differs from the network by nan" in refusal(lambda: measure_parity(OneNaN(), path, card("int8")))


# --- the networks that train/ has -------------------------------------------------------------------------------------


def seen_pictures(network: Encoder, size: int) -> Encoder:
    """Random weights, and batch norms that have seen something."""
    for name, value in network.named_parameters():
        if value.ndim == 1 and name.endswith("weight"):
            torch.nn.init.uniform_(value, 0.5, 1.5)  # otherwise every block would be its shortcut
    with torch.no_grad():
        for _ in range(5):
            network.train()(torch.rand(8, 3, size, size))
    return network.eval()


NETWORKS = {
    "basic blocks": (BasicBlock, 0.125, "imagenet", {}),
    "bottlenecks, wider": (Bottleneck, 0.375, "small", {}),
    "selective kernels": (Bottleneck, 0.25, "small-s2", {"sk": True}),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_are_exported_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    block, width, stem, settings = NETWORKS[name]
    monkeypatch.setitem(LAYERS, "resnet50", (block, (1, 1, 1, 1)))
    torch.manual_seed(0)
    save_encoder(tmp_path, seen_pictures(Encoder("resnet50", width, stem, **settings), 32), frame(32), {})
    encoder, manifest = load_encoder(tmp_path)
    write_graph(encoder, manifest, tmp_path / "model.onnx")
    parity = measure_parity(encoder, tmp_path / "model.onnx", manifest)
    assert parity.max_abs_error < 2e-6
    stored = {entry.key: entry.value for entry in onnx.load(tmp_path / "model.onnx").metadata_props}
    assert Manifest.parse(stored[METADATA_KEY], "graph") == manifest


def test_imported_weights_are_exported_with_their_pixels(tmp_path: Path) -> None:
    torch.manual_seed(0)
    original = seen_pictures(Encoder("resnet18", 0.125, "imagenet"), 64)
    torch.save(original.state_dict() | nn.Linear(64, 5, device="cpu").state_dict(prefix="fc."), tmp_path / "resnet18.pth")
    import_weights(tmp_path / "resnet18.pth", tmp_path / "run", pixels="imagenet", size_px=32)
    encoder, manifest = load_encoder(tmp_path / "run")
    write_graph(encoder, manifest, tmp_path / "model.onnx")
    measure_parity(encoder, tmp_path / "model.onnx", manifest)

    images = golden_images(manifest)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        pixels = (torch.from_numpy(images) / 255 - mean) / std
        wanted = original(pixels.permute(0, 3, 1, 2)).numpy()
    wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
    np.testing.assert_allclose(prove_batches(tmp_path / "model.onnx", manifest)[7], wanted, atol=1e-5)
