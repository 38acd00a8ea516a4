"""`simclr export --module`: somebody else's network, from the command to the vectors, in every precision."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from cli import Export
from export.module import load_module
from export.precision import Int8
from serve.encoder import open_encoder
from serve.errors import ExportError

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
SPEC = {"height_px": 64, "width_px": 48, "resize": "center_crop", "crop": 0.875, "resample": "bicubic", "jpeg": "full"}
USERS = """
import torch
from torch import nn
from torchvision.models import resnet18

def resnet():
    network = resnet18()
    network.fc = nn.Identity()
    return network

class Small(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 16, 5, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(1))

class Branching(Small):
    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else super().forward(-x)
"""


pytestmark = pytest.mark.usefixtures("one_cpu")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The user's folder: their_models.py, spec.json and two dozen pictures of 30 x 40."""
    (tmp_path / "their_models.py").write_text(USERS)
    (tmp_path / "spec.json").write_text(json.dumps(SPEC | {"mean": MEAN, "std": STD}))
    (tmp_path / "pictures").mkdir()
    rng = np.random.default_rng(0)
    for row in range(24):
        small = Image.fromarray(rng.integers(0, 256, (5, 4, 3), dtype=np.uint8))
        small.resize((30, 40), Image.Resampling.BICUBIC).save(tmp_path / f"pictures/{row:02}.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("their_models", None)


def saved_network(folder: Path, name: str) -> nn.Module:
    """Of random weights, which are in weights.safetensors then."""
    torch.manual_seed(0)
    network = load_module(f"their_models:{name}", None, folder / "spec.json")[0].network
    save_file(network.state_dict(), folder / "weights.safetensors")
    return network


def export(folder: Path, module: str, **options: Any) -> None:
    spec, weights = folder / "spec.json", folder / "weights.safetensors"
    where = {"repository": folder / "models", "target": "cpu", "name": "theirs"}
    Export(module=f"their_models:{module}", weights=weights, preprocess=spec, **where, **options)()


def by_hand(network: nn.Module, paths: list[Path]) -> np.ndarray:
    """What the user computes: crop, resize, mean and std, the network, unit length."""
    box = (1.875, 2.5, 28.125, 37.5)  # 0.875 of 30 x 40, which has the frame's aspect
    resized = [Image.open(path).resize((48, 64), Image.Resampling.BICUBIC, box=box) for path in paths]
    pixels = torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        features = network.eval()((pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)).flatten(1)
    return (features / features.norm(dim=1, keepdim=True)).numpy()


def test_a_torchvision_network_is_served_as_it_is(folder: Path) -> None:
    network, paths = saved_network(folder, "resnet"), sorted((folder / "pictures").iterdir())
    export(folder, "resnet")
    encoder = open_encoder(folder / "models")
    assert (encoder.manifest.name, encoder.manifest.embedding_dim, encoder.manifest.precision) == ("theirs", 512, "fp32")
    assert encoder.manifest.training["module"] == "their_models:resnet"
    np.testing.assert_allclose(encoder.embed(paths), by_hand(network, paths), atol=1e-5)


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_other_precisions_are_measured_on_the_pictures_given(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], precision: str
) -> None:
    monkeypatch.setattr("export.precision.FOR_CPU", (Int8(),))
    network, paths = saved_network(folder, "Small"), sorted((folder / "pictures").iterdir())
    export(folder, "Small", precision=precision, images="pictures", accept_loss=True)
    assert "recall@10" in capsys.readouterr().out
    encoder = open_encoder(folder / "models")
    assert encoder.manifest.retrieval is not None
    assert encoder.manifest.retrieval.pictures == len(paths)
    cosines = (encoder.embed(paths) * by_hand(network, paths)).sum(1)
    assert 0.99 < cosines.min() < 1 - 1e-9, "near, and not float32"


def test_nothing_is_published_of_a_network_that_cannot_be_traced(folder: Path) -> None:
    saved_network(folder, "Branching")
    with pytest.raises(ExportError, match="torch cannot export the network"):
        export(folder, "Branching")
    assert not (folder / "models").exists()
