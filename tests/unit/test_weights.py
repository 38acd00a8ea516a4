"""Weights from elsewhere: every project's file, built here by its own names, gives that project's features.

The networks are torchvision's, narrowed, or written out as the project has them; ours appears in no original.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from torchvision.models import ResNet
from torchvision.models.resnet import BasicBlock, Bottleneck

from serve.errors import ContractError
from train.checkpoint import load_encoder
from train.encoder import ProjectionHead
from train.torch_encoder import open_run
from train.weight_names import PROJECTS
from train.weights import STATISTICS, import_weights, read_weights

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CIFAR10 = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pictures(size_px: int = 48) -> torch.Tensor:
    return torch.rand(3, 3, size_px, size_px, generator=torch.Generator().manual_seed(1))


def trained(network: nn.Module) -> nn.Module:
    """As after training: nothing at its initial value."""
    for module in network.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            module.num_batches_tracked.fill_(7)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            if module.bias is not None:
                nn.init.normal_(module.bias, 0, 0.1)
    return network.eval()


def narrow(block: Any = BasicBlock, counts: tuple[int, ...] = (2, 2, 2, 2), channels: int = 8) -> ResNet:
    """torchvision's ResNet with `channels` in its first stage instead of 64."""
    network = ResNet(BasicBlock, [1, 1, 1, 1])
    network.inplanes = channels
    network.conv1, network.bn1 = nn.Conv2d(3, channels, 7, 2, 3, bias=False), nn.BatchNorm2d(channels)
    for stage, count in enumerate(counts):
        layer = network._make_layer(block, channels << stage, count, stride=min(stage, 1) + 1)
        setattr(network, f"layer{stage + 1}", layer)
    network.fc = nn.Linear((channels << 3) * block.expansion, 5)
    return network


def features(network: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """What stands before the last layer, `fc`."""
    headless = copy.deepcopy(network).eval()
    headless.fc = nn.Identity()
    with torch.no_grad():
        return headless(images).flatten(1)


def under(prefix: str, state: dict[str, Any]) -> dict[str, Any]:
    return {prefix + name: value for name, value in state.items()}


def without_fc(network: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in network.state_dict().items() if not name.startswith("fc.")}


def dense_bn_head(dims: tuple[int, ...]) -> nn.Sequential:
    modules: list[nn.Module] = []
    for inputs, outputs in pairwise(dims):
        modules += [nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs), nn.ReLU()]
    return nn.Sequential(*modules[:-1])


# --- each project's file ----------------------------------------------------------------------------------------------


@dataclass
class Case:
    """A file, and what the project that wrote it computes of pictures in [0, 1]."""

    tree: dict[str, Any]
    original: Callable[[torch.Tensor], torch.Tensor]
    project: str
    pixels: str
    statistics: tuple | None
    unused: set[str]
    facts: dict[str, Any]
    size_px: int = 224

    def wanted(self, images: torch.Tensor) -> torch.Tensor:
        if self.statistics is not None:
            mean, std = (torch.tensor(values)[None, :, None, None] for values in self.statistics)
            images = (images - mean) / std
        with torch.no_grad():
            return self.original(images)


R18 = {"arch": "resnet18", "width": 0.125, "stem": "imagenet"}


def torchvision_file() -> Case:
    network = trained(narrow())
    return Case(
        network.state_dict(), lambda x: features(network, x), "torchvision", "imagenet", IMAGENET, {"fc.weight", "fc.bias"}, R18
    )


def moco() -> Case:
    query, key = trained(narrow()), trained(narrow())
    state = under("module.encoder_q.", query.state_dict()) | under("module.encoder_k.", key.state_dict())
    tree = {"epoch": 3, "arch": "resnet18", "state_dict": state | {"module.queue": torch.rand(4, 8)}}
    unused = {f"state_dict.module.encoder_k.{name}" for name in key.state_dict()} | {"state_dict.module.queue"}
    unused |= {f"state_dict.module.encoder_q.fc.{name}" for name in ("weight", "bias")}
    return Case(tree, lambda x: features(query, x), "MoCo", "imagenet", IMAGENET, unused, R18)


def lightly_children() -> Case:
    network = trained(narrow(Bottleneck, (3, 4, 6, 3)))
    head = trained(dense_bn_head((256, 256, 16)))
    backbone = nn.Sequential(*list(network.children())[:-1])
    state = under("backbone.", backbone.state_dict()) | under("projection_head.layers.", head.state_dict())
    unused = {f"state_dict.projection_head.layers.{name}" for name in head.state_dict()}  # its last batch norm has a bias
    tree = {"epoch": 1, "pytorch-lightning_version": "2.1", "state_dict": state, "hyper_parameters": {"batch_size": 8}}
    facts = R18 | {"arch": "resnet50"}
    return Case(tree, lambda x: backbone(x).flatten(1), "lightly", "imagenet", IMAGENET, unused, facts)


def lightly_benchmark() -> Case:
    network = trained(narrow())
    state = under("backbone.", without_fc(network)) | under(
        "projection_head.layers.", trained(dense_bn_head((64, 16))).state_dict()
    )
    state["online_classifier.linear_layer.weight"] = torch.rand(5, 64)
    unused = {f"state_dict.{name}" for name in state if not name.startswith("backbone.")}
    return Case({"state_dict": state}, lambda x: features(network, x), "lightly", "imagenet", IMAGENET, unused, R18)


class GeneratorBlock(nn.Module):
    def __init__(self, inputs: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, planes, 3, stride, 1, bias=False), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False), nn.BatchNorm2d(planes)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != planes:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.shortcut(x))


class Generator(nn.Module):
    """lightly's ResNetGenerator("resnet-18"): the ReLUs are in `forward`, not among the children."""

    def __init__(self, base: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, base, 3, 1, 1, bias=False), nn.BatchNorm2d(base)
        inputs = base
        for stage in range(4):
            planes = base << stage
            blocks = GeneratorBlock(inputs, planes, min(stage, 1) + 1), GeneratorBlock(planes, planes, 1)
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
            inputs = planes
        self.linear = nn.Linear(inputs, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer4(self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x)))))))
        return x.mean((2, 3))


SMALL = R18 | {"stem": "small"}


def lightly_generator() -> Case:
    """Taken apart into a Sequential, as in lightly's examples, which loses the stem's ReLU."""
    backbone = nn.Sequential(*list(trained(Generator(8)).children())[:-1], nn.AdaptiveAvgPool2d(1)).eval()
    state = under("backbone.", backbone.state_dict())
    facts = SMALL | {"stem_quirk": "no-relu"}
    return Case({"state_dict": state}, lambda x: backbone(x).flatten(1), "lightly", "imagenet", IMAGENET, set(), facts, 32)


def lightly_generator_whole() -> Case:
    network = trained(Generator(8))
    state = under("backbone.", network.state_dict()) | {"projection_head.layers.0.weight": torch.rand(4, 4)}
    unused = {"backbone.linear.weight", "backbone.linear.bias", "projection_head.layers.0.weight"}
    return Case(state, network, "lightly", "imagenet", IMAGENET, unused, SMALL, 32)


def solo_learn(name: str = "backbone", small: bool = False) -> Case:
    network = narrow()
    if small:  # methods/base.py: padding 2
        network.conv1, network.maxpool = nn.Conv2d(3, 8, 3, 1, 2, bias=False), nn.Identity()
    trained(network)
    state = under(f"{name}.", without_fc(network)) | {"projector.0.weight": torch.rand(4, 64)}
    state |= under("classifier.", nn.Linear(64, 10).state_dict()) | under(f"momentum_{name}.", without_fc(network))
    unused = {f"state_dict.{key}" for key in state if not key.startswith(f"{name}.")}
    pixels, statistics = ("cifar10", CIFAR10) if small else ("imagenet", IMAGENET)
    facts = SMALL | {"stem_quirk": "pad2"} if small else R18
    tree = {"epoch": 9, "global_step": 3, "state_dict": state, "optimizer_states": [{"state": {0: torch.rand(2)}}]}
    return Case(tree, lambda x: features(network, x), "solo-learn", pixels, statistics, unused, facts, 32 if small else 224)


def vissl() -> Case:
    network = trained(narrow(Bottleneck, (3, 4, 23, 3)))
    trunk = under("_feature_blocks.", without_fc(network))
    heads = {"0.clf.0.weight": torch.rand(4, 256)}
    tree = {"phase_idx": 99, "classy_state_dict": {"base_model": {"model": {"trunk": trunk, "heads": heads}}}}
    unused = {"classy_state_dict.base_model.model.heads.0.clf.0.weight"}
    facts = R18 | {"arch": "resnet101"}
    return Case(tree, lambda x: features(network, x), "VISSL", "imagenet", IMAGENET, unused, facts)


def vissl_extracted() -> Case:
    case = vissl()
    case.tree = case.tree["classy_state_dict"]["base_model"]["model"]["trunk"]
    case.unused = set()
    return case


def sthalles() -> Case:
    network = trained(narrow())
    network.fc = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), network.fc)
    state = under("backbone.", network.state_dict())
    tree = {"epoch": 200, "arch": "resnet18", "state_dict": state, "optimizer": {"state": {0: {"exp_avg": torch.rand(3)}}}}
    unused = {f"state_dict.{name}" for name in state if ".fc." in name} | {"optimizer.state.0.exp_avg"}
    return Case(tree, lambda x: features(network, x), "sthalles/SimCLR", "unit", None, unused, R18, 96)


def sthalles_2020() -> Case:
    backbone = nn.Sequential(*list(trained(narrow()).children())[:-1])
    state = under("features.", backbone.state_dict()) | under("l1.", nn.Linear(64, 64).state_dict())
    unused = {"l1.weight", "l1.bias"}
    return Case(state, lambda x: backbone(x).flatten(1), "sthalles/SimCLR of 2020", "unit", None, unused, R18, 96)


def spijkervet() -> Case:
    network = trained(narrow())
    state = under("module.encoder.", without_fc(network)) | {"module.projector.0.weight": torch.rand(64, 64)}
    unused = {"module.projector.0.weight"}
    return Case(state, lambda x: features(network, x), "Spijkervet/SimCLR", "unit", None, unused, R18)


class TensorFlowPool(nn.Module):
    """Padding 'SAME' by its definition: as much as ceil(size / 2) windows need, the odd one at the end."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pads = []
        for size in (x.shape[3], x.shape[2]):
            total = max((math.ceil(size / 2) - 1) * 2 + 3 - size, 0)
            pads += [total // 2, total - total // 2]
        return F.max_pool2d(F.pad(x, pads, value=-math.inf), 3, 2)


def converted_v1(channels: int = 8, shortcut_first: bool = True) -> Case:
    network = narrow(Bottleneck, (3, 4, 6, 3), channels) if shortcut_first else narrow(channels=channels)
    network.maxpool = TensorFlowPool()
    trained(network)
    state = network.state_dict()
    if shortcut_first:  # resnet_wider.py assigns `downsample` before the convolutions

        def place(name: str) -> tuple[str, bool]:
            return name.rsplit(".", name.count(".") - 1)[0] if name.startswith("layer") else "", ".downsample." not in name

        blocks = sorted((name for name in state if name.startswith("layer")), key=lambda n: (n.split(".")[:2], place(n)[1]))
        order = [n for n in state if not n.startswith(("layer", "fc"))] + blocks + ["fc.weight", "fc.bias"]
        state = {name: state[name] for name in order}
    facts = {"arch": "resnet50" if shortcut_first else "resnet18", "width": channels / 64, "stem": "imagenet"}
    return Case(
        {"state_dict": state},
        lambda x: features(network, x),
        "official SimCLR v1 by simclr-converter",
        "official",
        None,
        {"state_dict.fc.weight", "state_dict.fc.bias"},
        facts | {"pool_padding": "tf"},
    )


# --- SimCLRv2-Pytorch's names around the official code's arithmetic -----------------------------------------------------


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)


def norm(channels: int, relu: bool = True) -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU() if relu else nn.Identity())


class V2Kernel(nn.Module):
    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        between = max(int(channels * 0.0625), 32)
        self.main_conv = nn.Sequential(conv(channels, 2 * channels, 3, stride), norm(2 * channels))
        self.mixing_conv = nn.Sequential(conv(channels, between, 1), norm(between), conv(between, 2 * channels, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        one, two = self.main_conv(x).chunk(2, 1)
        for_one, for_two = self.mixing_conv((one + two).mean((2, 3), keepdim=True)).chunk(2, 1)
        share = 1 / (1 + torch.exp(for_two - for_one))  # a softmax over two
        return one * share + two * (1 - share)


class V2Pool(nn.Module):
    """average_pooling2d of resnet.py: 'SAME' counts only what is there, `fixed_padding` adds zeros."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        sums = 4 * F.avg_pool2d(F.pad(x, (0, 1, 0, 1)), 2, self.stride)
        there = 4 * F.avg_pool2d(F.pad(torch.ones_like(x), (0, 1, 0, 1)), 2, self.stride)
        return sums / (there if self.stride == 1 else 4)


class V2Projection(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, sk: bool) -> None:
        super().__init__()
        if sk:
            self.shortcut: nn.Module = nn.Sequential(nn.Identity(), V2Pool(stride), conv(inputs, outputs, 1))
        else:
            self.shortcut = conv(inputs, outputs, 1, stride)
        self.bn = norm(outputs, relu=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(self.shortcut(x))


class V2Block(nn.Module):
    def __init__(self, inputs: int, planes: int, stride: int, sk: bool, first: bool) -> None:
        super().__init__()
        self.projection = V2Projection(inputs, 4 * planes, stride, sk) if first else nn.Identity()
        middle = [V2Kernel(planes, stride)] if sk else [conv(planes, planes, 3, stride), norm(planes)]
        ends = [conv(planes, 4 * planes, 1), norm(4 * planes, relu=False)]
        self.net = nn.Sequential(conv(inputs, planes, 1), norm(planes), *middle, *ends)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.projection(x) + self.net(x))


class V2Stage(nn.Module):
    def __init__(self, inputs: int, planes: int, count: int, stride: int, sk: bool) -> None:
        super().__init__()
        rest = [V2Block(4 * planes, planes, 1, sk, first=False) for _ in range(count - 1)]
        self.blocks = nn.ModuleList([V2Block(inputs, planes, stride, sk, first=True), *rest])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class V2(nn.Module):
    def __init__(self, channels: int, counts: tuple[int, ...], sk: bool) -> None:
        super().__init__()
        half = channels // 2
        three = [conv(3, half, 3, 2), norm(half), conv(half, half, 3), norm(half), conv(half, channels, 3)]
        stem = [*(three if sk else [conv(3, channels, 7, 2)]), norm(channels), TensorFlowPool()]
        stages, inputs = [], channels
        for number, count in enumerate(counts):
            stages.append(V2Stage(inputs, channels << number, count, min(number, 1) + 1, sk))
            inputs = (channels << number) * 4
        self.net = nn.Sequential(nn.Sequential(*stem), *stages)
        self.fc = nn.Linear(inputs, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.net(x).mean((2, 3)))


def converted_v2(sk: bool) -> Case:
    network = trained(V2(8, (3, 4, 6, 3), sk))
    head = trained(dense_bn_head((256, 256, 256, 128)))
    nn.init.zeros_(head[-1].bias)
    tree = {"resnet": network.state_dict(), "head": under("layers.", head.state_dict())}
    facts = R18 | {"arch": "resnet50", "pool_padding": "tf"} | ({"sk": True} if sk else {})
    unused = {"resnet.fc.weight", "resnet.fc.bias", "head.layers.7.bias"}
    name = "official SimCLR v2 by SimCLRv2-Pytorch"
    return Case(tree, lambda x: features(network, x), name, "official", None, unused, facts)


CASES: dict[str, Callable[[], Case]] = {
    "torchvision": torchvision_file,
    "MoCo": moco,
    "lightly, children": lightly_children,
    "lightly, benchmark": lightly_benchmark,
    "lightly, generator": lightly_generator,
    "lightly, generator whole": lightly_generator_whole,
    "solo-learn": solo_learn,
    "solo-learn, older": lambda: solo_learn("encoder"),
    "solo-learn, CIFAR": lambda: solo_learn(small=True),
    "VISSL": vissl,
    "VISSL, extracted": vissl_extracted,
    "sthalles": sthalles,
    "sthalles of 2020": sthalles_2020,
    "Spijkervet": spijkervet,
    "official v1": converted_v1,
    "official v1, wide": lambda: converted_v1(72, shortcut_first=False),
    "official v2": lambda: converted_v2(sk=False),
    "official v2, selective kernels": lambda: converted_v2(sk=True),
}


@pytest.mark.parametrize("name", CASES)
def test_a_projects_file_gives_its_features(name: str, tmp_path: Path) -> None:
    case = CASES[name]()
    torch.save(case.tree, tmp_path / "file")  # no ending to go by
    weights = read_weights(tmp_path / "file")
    assert weights.project == case.project
    assert weights.pixels == case.pixels
    assert set(weights.unused) == case.unused
    statistics = {} if case.statistics is None else dict(zip(("mean", "std"), map(list, case.statistics), strict=True))
    assert weights.encoder.facts == case.facts | statistics
    frame = weights.preprocess
    assert (frame.height_px, frame.width_px, frame.crop) == (case.size_px, case.size_px, 0.875 if case.size_px == 224 else 1.0)
    for size_px in (48, 51):  # an odd size tells borders apart
        images = pictures(size_px)
        with torch.no_grad():
            got = weights.encoder(images)
        wanted = case.wanted(images)
        assert wanted.std() > 0.01
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


def test_every_project_has_a_file_here() -> None:
    assert {project.name for project in PROJECTS} <= {build().project for name, build in CASES.items() if "wide" not in name}


def test_the_head_of_official_v2_weights_comes_along(tmp_path: Path) -> None:
    torch.manual_seed(3)
    case = converted_v2(sk=True)
    torch.save(case.tree, tmp_path / "v2.pth")
    ours = ProjectionHead(256, 128, 3).eval()
    ours.load_state_dict(read_weights(tmp_path / "v2.pth").head)
    theirs = dense_bn_head((256, 256, 256, 128)).eval()
    theirs.load_state_dict({name.removeprefix("layers."): value for name, value in case.tree["head"].items()})
    x = torch.rand(4, 256)
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.first(1)(x), theirs[:3](x))


@pytest.mark.parametrize("change", ["bias", "dim"])
def test_a_head_that_is_none_of_ours_is_unused(tmp_path: Path, change: str) -> None:
    tree = converted_v2(sk=False).tree
    if change == "bias":
        tree["head"]["layers.7.bias"][0] = 0.1
    else:
        tree["head"]["layers.0.weight"] = torch.rand(256, 99)
    torch.save(tree, tmp_path / "v2.pth")
    weights = read_weights(tmp_path / "v2.pth")
    assert weights.head == {}
    assert {f"head.{name}" for name in tree["head"]} <= set(weights.unused)


# --- other files, other words -----------------------------------------------------------------------------------------


def test_safetensors_and_half_precision_are_read(tmp_path: Path) -> None:
    case = torchvision_file()
    halves = {name: value.half() if value.is_floating_point() else value for name, value in case.tree.items()}
    save_file(halves, tmp_path / "model.bin")
    weights = read_weights(tmp_path / "model.bin")
    assert weights.project == "torchvision"
    assert all(value.dtype == torch.float32 for value in weights.encoder.parameters())
    with torch.no_grad():
        torch.testing.assert_close(weights.encoder(pictures()), case.wanted(pictures()), rtol=0.02, atol=0.02)


def test_files_from_before_batch_norms_counted_are_read(tmp_path: Path) -> None:
    case = torchvision_file()
    torch.save({name: value for name, value in case.tree.items() if not name.endswith("tracked")}, tmp_path / "old.pth")
    with torch.no_grad():
        torch.testing.assert_close(read_weights(tmp_path / "old.pth").encoder(pictures()), case.wanted(pictures()))


@pytest.mark.parametrize(("pixels", "border"), [("official", "tf"), ("unit", None), ("stl10", None)])
def test_who_knows_the_pixels_can_say_them(tmp_path: Path, pixels: Any, border: str | None) -> None:
    torch.save(torchvision_file().tree, tmp_path / "x.pth")
    weights = read_weights(tmp_path / "x.pth", pixels=pixels, size_px=96)
    assert weights.why == "as asked"
    assert weights.encoder.facts.get("pool_padding") == border
    assert weights.encoder.facts.get("mean") == (list(STATISTICS[pixels][0]) if pixels in STATISTICS else None)
    assert (weights.preprocess.height_px, weights.preprocess.crop) == (96, 1.0)


def test_an_assumption_is_said(tmp_path: Path) -> None:
    torch.save(torchvision_file().tree, tmp_path / "x.pth")
    lines = read_weights(tmp_path / "x.pth").summary().splitlines()
    assert lines[0] == f"{tmp_path / 'x.pth'}: torchvision, resnet18, width 0.125, imagenet stem"
    assert lines[1].split() == ["pixels", "imagenet:", *read_weights(tmp_path / "x.pth").why.split()]
    assert "assumed" in lines[1]
    assert "--pixels official" in lines[1]
    assert lines[2].split(maxsplit=1)[1] == "224 x 224 px, centre crop 0.875, bicubic"
    assert lines[3].split(maxsplit=1)[1] == "fc (2)"


# --- the RUN folder ---------------------------------------------------------------------------------------------------


def test_an_imported_run_opens_like_our_own(tmp_path: Path) -> None:
    case = solo_learn(small=True)
    torch.save(case.tree, tmp_path / "last.ckpt")
    manifest = import_weights(tmp_path / "last.ckpt", tmp_path / "run")
    encoder, card = load_encoder(tmp_path / "run")
    assert card == manifest
    assert card.name == "run"
    origin = card.training["imported"]
    assert isinstance(origin, dict)
    assert (origin["project"], origin["file"], origin["pixels"]) == ("solo-learn", "last.ckpt", "cifar10")
    assert len(str(origin["sha256"])) == 64
    assert origin["unused"] == {"projector": 1, "classifier": 2, "momentum_backbone": 120}
    with torch.no_grad():
        torch.testing.assert_close(encoder(pictures(32)), case.wanted(pictures(32)), rtol=1e-5, atol=1e-5)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    wanted = F.normalize(case.wanted(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255))
    np.testing.assert_allclose(open_run(tmp_path / "run").embed(list(pixels)), wanted, atol=1e-5)


def test_the_same_weights_on_other_pixels_are_another_encoder(tmp_path: Path) -> None:
    torch.save(torchvision_file().tree, tmp_path / "x.pth")
    choices: tuple[Any, ...] = ("imagenet", "unit", "official", "cifar10")
    ids = [import_weights(tmp_path / "x.pth", tmp_path / pixels, pixels=pixels).encoder_id for pixels in choices]
    assert len(set(ids)) == 4
    assert import_weights(tmp_path / "x.pth", tmp_path / "again", pixels="cifar10").encoder_id == ids[3]


def test_a_card_with_other_pixels_is_refused(tmp_path: Path) -> None:
    torch.save(torchvision_file().tree, tmp_path / "x.pth")
    import_weights(tmp_path / "x.pth", tmp_path / "run")
    card = tmp_path / "run" / "encoder.json"
    card.write_text(card.read_text().replace("0.485", "0.5"))
    with pytest.raises(ContractError, match="different pixels or borders"):
        load_encoder(tmp_path / "run")


def test_a_run_is_not_overwritten(tmp_path: Path) -> None:
    torch.save(torchvision_file().tree, tmp_path / "x.pth")
    import_weights(tmp_path / "x.pth", tmp_path / "run")
    before = (tmp_path / "run" / "encoder.json").read_bytes()
    with pytest.raises(ContractError, match=r"holds encoder\.json already; choose another --run"):
        import_weights(tmp_path / "x.pth", tmp_path / "run", pixels="unit")
    assert (tmp_path / "run" / "encoder.json").read_bytes() == before


# --- refusals ---------------------------------------------------------------------------------------------------------


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def without(case: Case, *ends: str) -> dict[str, Any]:
    return {name: value for name, value in case.tree.items() if not name.endswith(ends)}


def refused(tmp_path: Path, tree: object) -> str:
    torch.save(tree, tmp_path / "x.pth")
    with pytest.raises(ContractError) as refusal:
        read_weights(tmp_path / "x.pth")
    message = str(refusal.value)
    assert message.startswith(str(tmp_path / "x.pth"))
    assert "\n" not in message
    return message


def test_objects_are_not_unpickled(tmp_path: Path) -> None:
    message = refused(tmp_path, {"state_dict": torchvision_file().tree, "hyper_parameters": Trap(tmp_path / "sprung")})
    assert "(getattr), and objects are not unpickled" in message
    assert not (tmp_path / "sprung").exists()


def test_a_missing_tensor_is_named_with_the_project(tmp_path: Path) -> None:
    message = refused(tmp_path, without(torchvision_file(), "layer4.1.bn2.weight", "bn1.running_mean"))
    assert "torchvision, resnet18 of width 0.125, but it lacks bn1.running_mean, layer1.0.bn1.running_mean" in message
    assert "and 7 more" in message


def test_other_networks_are_refused(tmp_path: Path) -> None:
    tree = torchvision_file().tree
    assert "(2, 2, 2, 0) BasicBlocks" in refused(tmp_path, {n: v for n, v in tree.items() if not n.startswith("layer4")})
    assert "no ResNet whose names are known" in refused(tmp_path, {"patch_embed.proj.weight": torch.rand(3, 3)})
    assert "has beyond that network layer1.0.downsample.0.weight" in refused(
        tmp_path, tree | {"layer1.0.downsample.0.weight": torch.rand(8, 8, 1, 1)}
    )
    wide = tree | {"layer1.0.conv2.weight": torch.rand(16, 8, 3, 3)}
    assert "has other shapes than that network for layer1.0.conv2.weight" in refused(tmp_path, wide)
    grey = tree | {"conv1.weight": torch.rand(8, 1, 7, 7)}
    assert "first convolution is (8, 1, 7, 7)" in refused(tmp_path, grey)
    assert "no first convolution" in refused(tmp_path, {n: v for n, v in tree.items() if n != "conv1.weight"})
    assert "holds no tensors" in refused(tmp_path, {"epoch": 3})


def test_two_encoders_are_refused(tmp_path: Path) -> None:
    state = torchvision_file().tree
    assert "holds 2 encoders ('student.', 'other.')" in refused(tmp_path, under("student.", state) | under("other.", state))


def test_an_unknown_project_has_to_say_its_pixels(tmp_path: Path) -> None:
    tree = under("net.trunk.", torchvision_file().tree)
    assert "unknown project (torchvision names under 'net.trunk.')" in refused(tmp_path, tree)
    assert read_weights(tmp_path / "x.pth", pixels="unit").pixels == "unit"


@pytest.mark.parametrize("kind", ["noise", "half", "half a safetensors", "empty"])
def test_damaged_files_are_refused_in_one_line(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.pth"
    if kind == "half a safetensors":
        save_file(torchvision_file().tree, path)
    else:
        torch.save(torchvision_file().tree, path)
    raw = {"noise": np.random.default_rng(0).bytes(5000), "empty": b""}.get(kind, path.read_bytes()[: path.stat().st_size // 2])
    path.write_bytes(raw)
    with pytest.raises(ContractError) as refusal:
        read_weights(path)
    assert str(refusal.value).startswith(str(path))
    assert "\n" not in str(refusal.value)


def test_a_file_that_is_not_there_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        read_weights(tmp_path / "none.pth")
