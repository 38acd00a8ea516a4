"""Networks that somebody else wrote: imported, prepared as they say, exported; each fault in one line."""

import json
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from export.graph import write_graph
from export.module import ForeignEncoder, load_module
from export.parity import golden_images, measure_parity, prove_batches
from serve.contract import Manifest
from serve.errors import ContractError, ExportError, SimclrError

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
FRAME = {"height_px": 12, "width_px": 8, "resize": "stretch", "crop": 1.0, "resample": "bicubic", "jpeg": "full"}

USERS = """
import sys
import torch
from torch import nn

def layers(channels=5, seed=0):
    torch.manual_seed(seed)
    norm = nn.BatchNorm2d(channels)
    norm.running_mean.uniform_(-1, 1)
    norm.running_var.uniform_(0.5, 1.5)
    return [nn.Conv2d(3, channels, 3, 2), norm, nn.ReLU(), nn.AdaptiveAvgPool2d(1)]

class Flat(nn.Sequential):
    def __init__(self):
        super().__init__(*layers(), nn.Flatten())

def unpooled_shape():
    return nn.Sequential(*layers())

instance = Flat()

class Zoo:
    flat = Flat

def half():
    return Flat().half()

def fresh():
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.AdaptiveAvgPool2d(1))

def sideways():  # the same weights, other features
    class Sideways(Flat):
        def forward(self, x):
            return super().forward(x.flip(1))
    return Sideways()

# what cannot be served

def stuck_in_training():
    class Stuck(nn.Sequential):
        def train(self, mode=True):
            return super().train(True)
    return Stuck(*layers()[:3], nn.Conv2d(5, 5, 1), nn.AdaptiveAvgPool2d(1))

def batch_statistics():
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5, track_running_stats=False), nn.AdaptiveAvgPool2d(1))

def centred():
    class Centred(Flat):
        def forward(self, x):
            features = super().forward(x)
            return features - 0.01 * features.mean(0)
    return Centred()

def random():
    class Random(Flat):
        def forward(self, x):
            return nn.functional.dropout(super().forward(x))
    return Random()

def nan():
    class NaN(Flat):
        def forward(self, x):
            return super().forward(x) / 0
    return NaN()

def unpooled():
    return nn.Sequential(*layers()[:3])

def tokens():
    return nn.Sequential(*layers()[:3], nn.Flatten(2))

def joined():
    return nn.Sequential(*layers()[:3], nn.Flatten(0))

def pair():
    class Pair(Flat):
        def forward(self, x):
            return super().forward(x), x
    return Pair()

def classes():
    class Classes(Flat):
        def forward(self, x):
            return super().forward(x).argmax(1, keepdim=True)
    return Classes()

def grey():
    return nn.Sequential(nn.Conv2d(1, 5, 3), nn.Flatten())

def branching():
    class Branching(Flat):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else super().forward(-x)
    return Branching()

def with_arguments(depth):
    return Flat()

def not_a_module():
    return "resnet50"

def leaves():
    sys.exit(3)

def breaks():
    raise RuntimeError("first line\\nsecond line")

number = 7
"""


pytestmark = pytest.mark.usefixtures("one_cpu")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The user's folder: my_models.py and frame.json; gone from Python's memory afterwards."""
    (tmp_path / "my_models.py").write_text(USERS)
    (tmp_path / "broken.py").write_text("def make(:")
    (tmp_path / "lacking.py").write_text("import a_package_that_is_not_there")
    write_spec(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in ("my_models", "broken", "lacking"):
        sys.modules.pop(name, None)


def write_spec(folder: Path, **changes: Any) -> Path:
    spec = FRAME | {"mean": MEAN, "std": STD} | changes
    (folder / "frame.json").write_text(json.dumps({name: value for name, value in spec.items() if value is not None}))
    return folder / "frame.json"


def load(name: str, folder: Path, weights: Path | None = None) -> tuple[ForeignEncoder, Manifest]:
    return load_module(f"my_models:{name}", weights, folder / "frame.json")


def refusal(attempt: Callable[[], object], kind: type[SimclrError] = ExportError) -> str:
    with pytest.raises(kind) as caught:
        attempt()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def by_hand(images_NHWC: np.ndarray) -> np.ndarray:
    """The user's own evaluation, picture by picture, to unit length."""
    import my_models

    network, rows = my_models.Flat().eval(), []
    for image in images_NHWC:
        channels = [(image[..., c] / 255 - MEAN[c]) / STD[c] for c in range(3)]
        with torch.no_grad():
            vector = network(torch.tensor(np.stack(channels)[None], dtype=torch.float32))[0].double().numpy()
        rows.append(vector / np.sqrt((vector**2).sum()))
    return np.stack(rows)


# --- what can be served -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Flat", "Zoo.flat", "instance", "unpooled_shape", "half"])
def test_a_module_of_any_make_gives_its_features(folder: Path, name: str) -> None:
    encoder, manifest = load(name, folder)
    assert not any(part.training for part in encoder.modules())
    images = golden_images(manifest)
    with torch.no_grad():
        got = encoder(torch.from_numpy(images).permute(0, 3, 1, 2) / 255).double().numpy()
    got /= np.linalg.norm(got, axis=1, keepdims=True)
    np.testing.assert_allclose(got, by_hand(images), atol=2e-3 if name == "half" else 1e-6)
    assert (manifest.embedding_dim, manifest.output.shape, manifest.input.shape) == (5, (5,), (12, 8, 3))
    assert (manifest.precision, manifest.preprocess.resize, manifest.parity) == ("fp32", "stretch", None)
    assert manifest.training == {"module": f"my_models:{name}", "weights": None, "mean": MEAN, "std": STD}


def test_its_graph_is_the_network_with_its_pixels(folder: Path) -> None:
    encoder, manifest = load("unpooled_shape", folder)
    write_graph(encoder, manifest, folder / "model.onnx")
    assert measure_parity(encoder, folder / "model.onnx", manifest).max_abs_error < 1e-5
    for vectors in prove_batches(folder / "model.onnx", manifest).values():
        np.testing.assert_allclose(vectors, by_hand(golden_images(manifest)), atol=1e-5)


@pytest.mark.parametrize("save", [save_file, torch.save], ids=["safetensors", "torch"])
def test_weights_come_from_a_file(folder: Path, save: Callable[[dict[str, Tensor], Path], None]) -> None:
    state = load("unpooled_shape", folder)[0].network.state_dict()
    other = {name: value + 1 for name, value in state.items()}
    save(other, folder / "weights")
    encoder, manifest = load("unpooled_shape", folder, folder / "weights")
    loaded = encoder.network.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in other.items())
    assert manifest.training["weights"] == "weights"


def test_the_id_is_that_of_weights_pixels_and_code(folder: Path) -> None:
    first = load("Flat", folder)[1].encoder_id
    assert load("Flat", folder)[1].encoder_id == first
    state = load("Flat", folder)[0].network.state_dict()
    state["0.bias"][2] += 1e-6
    save_file(state, folder / "weights")
    ids = {first, load("Flat", folder, folder / "weights")[1].encoder_id, load("sideways", folder)[1].encoder_id}
    for change in ({"mean": [0.5, 0.456, 0.406]}, {"std": [0.229, 0.224, 0.5]}, {"height_px": 13}):
        write_spec(folder, **change)
        ids.add(load("Flat", folder)[1].encoder_id)
    assert len(ids) == 6


def test_weights_drawn_anew_are_another_encoder(folder: Path) -> None:
    assert load("fresh", folder)[1].encoder_id != load("fresh", folder)[1].encoder_id


# --- what cannot ------------------------------------------------------------------------------------------------------

MODULE_FAULTS = {
    "stuck_in_training": "features differ by .* beside another one",
    "batch_statistics": "features differ by .* beside another one",
    "centred": "features differ by .* beside another one",
    "random": "features differ by .* beside another one",
    "nan": "gives NaN or infinity",
    "unpooled": r"gives \(2, 5, 5, 3\) for pictures \(2, 3, 12, 8\), wanted \(B, D\) or \(B, D, 1, 1\)",
    "tokens": r"gives \(2, 5, 15\)",
    "joined": r"gives \(150,\)",
    "pair": "gives a value of type tuple",
    "classes": "gives a tensor of torch.int64",
    "grey": r"fails on float pictures \(2, 3, 12, 8\) \(RuntimeError: Given groups=1",
    "with_arguments": r"cannot be imported or made without arguments \(TypeError: .*missing 1 required",
    "not_a_module": "is a value of type str, wanted a torch.nn.Module",
    "number": "is a value of type int, wanted a torch.nn.Module",
    "leaves": r"cannot be imported or made without arguments \(SystemExit: 3",
    "breaks": r"\(RuntimeError: first line\)",
    "absent": "has no attribute 'absent'",
}


@pytest.mark.parametrize("name", MODULE_FAULTS)
def test_a_module_that_cannot_be_served_is_refused(folder: Path, name: str) -> None:
    message = refusal(lambda: load(name, folder))
    assert message.startswith(f"my_models:{name}: ")
    with pytest.raises(ExportError, match=MODULE_FAULTS[name]):
        load(name, folder)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("my_models", "--module is 'my_models', wanted package.module:name"),
        (":Flat", "wanted package.module:name"),
        ("my_models:", "wanted package.module:name"),
        ("my_models.py:Flat", "ModuleNotFoundError: No module named 'my_models.py'"),
        ("no_such_models:Flat", "ModuleNotFoundError: No module named 'no_such_models'"),
        ("lacking:make", "ModuleNotFoundError: No module named 'a_package_that_is_not_there'"),
        ("broken:make", "SyntaxError: "),
        ("../my_models:Flat", "cannot be imported"),
    ],
)
def test_an_import_path_that_leads_nowhere_is_refused(folder: Path, path: str, message: str) -> None:
    assert message in refusal(lambda: load_module(path, None, folder / "frame.json"))


def test_a_network_that_cannot_be_traced_is_refused(folder: Path) -> None:
    encoder, manifest = load("branching", folder)
    message = refusal(lambda: write_graph(encoder, manifest, folder / "model.onnx"))
    assert "torch cannot export the network with a free batch size" in message
    assert not (folder / "model.onnx").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mean": None}, "mean: Field required"),
        ({"jpeg": None}, "jpeg: Field required"),
        ({"mean": [123.7, 116.3, 103.5]}, "mean.0: Input should be less than or equal to 1"),
        ({"std": [0.2, 0.2, 0]}, "std.2: Input should be greater than 0"),
        ({"std": [0.2, 0.2]}, "std"),
        ({"std": 0.2}, "std: Input should be a valid"),
        ({"height_px": "12"}, "height_px: Input should be a valid integer"),
        ({"sdt": STD}, "sdt: Extra inputs are not permitted"),
    ],
)
def test_a_preprocessing_that_is_not_one_is_refused(folder: Path, changes: dict[str, Any], message: str) -> None:
    write_spec(folder, **changes)
    assert message in refusal(lambda: load("Flat", folder), ContractError)


def test_no_json_is_refused(folder: Path) -> None:
    (folder / "frame.json").write_text("mean: 0.5")
    assert "frame.json: the file: Invalid JSON" in refusal(lambda: load("Flat", folder), ContractError)


def changed_weights(folder: Path, change: Callable[[dict[str, Any]], object]) -> str:
    state = dict(load("Flat", folder)[0].network.state_dict())
    change(state)
    torch.save(state, folder / "weights")
    return refusal(lambda: load("Flat", folder, folder / "weights"), ContractError)


def test_weights_that_do_not_fit_are_refused(folder: Path) -> None:
    assert "lacks 0.weight; wanted the state dict of my_models:Flat, 7 tensors" in changed_weights(
        folder, lambda state: state.pop("0.weight")
    )
    assert "has besides fc.weight" in changed_weights(folder, lambda state: state.update({"fc.weight": torch.ones(1)}))
    assert "size mismatch for 0.bias" in changed_weights(folder, lambda state: state.update({"0.bias": torch.ones(6)}))


def test_weights_with_a_nan_are_refused(folder: Path) -> None:
    state = load("Flat", folder)[0].network.state_dict()
    state["0.bias"][1] = torch.nan
    save_file(state, folder / "weights")
    assert "are its weights whole?" in refusal(lambda: load("Flat", folder, folder / "weights"))


class Trap:
    def __reduce__(self) -> tuple[Any, ...]:
        return open, ("sprung", "w")


def test_nothing_in_the_weights_is_unpickled(folder: Path) -> None:
    (folder / "weights").write_bytes(pickle.dumps({"0.weight": Trap()}))
    refusal(lambda: load("Flat", folder, folder / "weights"), ContractError)
    torch.save({"0.weight": Trap()}, folder / "weights")
    assert "not unpickled" in refusal(lambda: load("Flat", folder, folder / "weights"), ContractError)
    assert not (folder / "sprung").exists()


def test_a_file_that_is_not_there_is_named(folder: Path) -> None:
    with pytest.raises(OSError, match=r"absent\.json"):
        load_module("my_models:Flat", None, folder / "absent.json")
    with pytest.raises(OSError, match=r"absent\.pt"):
        load("Flat", folder, folder / "absent.pt")
