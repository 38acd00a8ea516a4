"""The network: shapes, exchange of weights with torchvision, initial values, the projection head, unit vectors."""

import math
import os
import subprocess
import sys
from typing import Any, get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from train.config import Arch, Stem
from train.encoder import (
    LAYERS,
    Encoder,
    NarrowShortcut,
    ProjectionHead,
    SamePool,
    SelectiveKernel,
    ShortcutPool,
    SimCLR,
    UnitEncoder,
)

STEMS = get_args(Stem)


def images(count: int = 2, height: int = 32, width: int = 32) -> torch.Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize(("arch", "dim"), [("resnet18", 64), ("resnet50", 256)])
def test_features_have_the_width_asked_for(arch: Arch, dim: int, stem: Stem) -> None:
    encoder = Encoder(arch, 0.125, stem).eval()
    assert encoder.feature_dim == dim
    assert encoder(images(2, 48, 24)).shape == (2, dim)


@pytest.mark.parametrize("arch", get_args(Arch))
def test_every_depth_has_torchvisions_parameters(arch: Arch) -> None:
    """At width 1, by name and shape, without the memory: on the meta device."""
    with torch.device("meta"):
        deepest = torchvision.models.ResNet(Bottleneck, [3, 24, 36, 3])  # torchvision has no 200; resnet.py does
        ours, theirs = Encoder(arch), deepest if arch == "resnet200" else getattr(torchvision.models, arch)()
    shapes = {name: value.shape for name, value in theirs.state_dict().items() if not name.startswith("fc.")}
    assert {name: value.shape for name, value in ours.state_dict().items()} == shapes
    assert ours.feature_dim == theirs.fc.in_features


@pytest.mark.parametrize("width", [2, 0.5])
def test_width_multiplies_every_stage(width: float) -> None:
    with torch.device("meta"):
        ours, plain = Encoder("resnet50", width), Encoder("resnet50")
    assert ours.feature_dim == plain.feature_dim * width
    for name, value in ours.state_dict().items():
        if value.ndim == 4:
            inputs = 3 if name == "conv1.weight" else plain.state_dict()[name].shape[1] * width
            assert value.shape[:2] == (plain.state_dict()[name].shape[0] * width, inputs), name


@pytest.mark.parametrize("training", [True, False])
def test_torchvisions_weights_give_torchvisions_features(training: bool) -> None:
    theirs = torchvision.models.resnet18(weights=None).train(training)
    theirs.fc = nn.Identity()
    ours = Encoder("resnet18").train(training)
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(images(2, 64, 64)), theirs(images(2, 64, 64)))


def test_our_weights_load_into_torchvision() -> None:
    theirs = torchvision.models.resnet18(weights=None)
    missing, unexpected = theirs.load_state_dict(Encoder("resnet18").state_dict(), strict=False)
    assert sorted(missing) == ["fc.bias", "fc.weight"]
    assert not unexpected


@pytest.mark.parametrize(
    ("stem", "kernel", "first", "last"), [("imagenet", 7, 16, 2), ("small", 3, 64, 8), ("small-s2", 3, 32, 4)]
)
def test_the_stems_strides(stem: Stem, kernel: int, first: int, last: int) -> None:
    """Of 64 pixels: after the stem, and after the last stage."""
    encoder = Encoder("resnet18", 0.125, stem).eval()
    assert encoder.conv1.kernel_size == (kernel, kernel)
    x = encoder.maxpool(encoder.relu(encoder.bn1(encoder.conv1(images(1, 64, 64)))))
    assert x.shape[2:] == (first, first)
    assert encoder.layer4(encoder.layer3(encoder.layer2(encoder.layer1(x)))).shape[2:] == (last, last)


def test_a_narrow_shortcut_is_the_plain_convolution() -> None:
    shortcut = Encoder("resnet18", 0.125, "small").layer2[0].downsample[0]
    assert isinstance(shortcut, NarrowShortcut)
    x = torch.rand(2, 8, 9, 12)
    gradients = []
    for training in (True, False):
        shortcut.train(training).zero_grad()
        found = shortcut(x)
        torch.testing.assert_close(found, F.conv2d(x, shortcut.weight, stride=2))
        found.square().sum().backward()
        gradients.append(shortcut.weight.grad)
    torch.testing.assert_close(*gradients)


TRAIN_NARROW = """
import torch
from train.encoder import Encoder
encoder = Encoder("resnet18", 0.125, "small").to(memory_format=torch.channels_last)
for _ in range(8):
    encoder(torch.rand(3, 3, 32, 32).to(memory_format=torch.channels_last)).square().mean().backward()
"""


def test_training_a_narrow_network_leaves_the_heap_whole() -> None:
    """A process of its own, for it dies where the memory around oneDNN's workspace is written on."""
    environment = os.environ | {"MALLOC_CHECK_": "3"}
    done = subprocess.run([sys.executable, "-c", TRAIN_NARROW], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_every_block_begins_as_its_shortcut(arch: Arch) -> None:
    encoder = Encoder(arch, 0.125, "small")
    blocks = [module for module in encoder.modules() if isinstance(module, (BasicBlock, Bottleneck))]
    assert len(blocks) == sum(LAYERS[arch][1])
    for block in blocks:
        last, others = (block.bn2, (block.bn1,)) if isinstance(block, BasicBlock) else (block.bn3, (block.bn1, block.bn2))
        assert last.weight.count_nonzero() == 0
        assert all(bool((norm.weight == 1).all()) for norm in others)


def test_convolutions_start_truncated_normal_with_fan_in() -> None:
    """Standard deviation 1 / sqrt(fan_in) after the truncation, and nothing beyond two of the untruncated ones."""
    for name, module in Encoder("resnet18").named_modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 30_000:
            fan_in = module.weight[0].numel()
            assert module.weight.std().item() == pytest.approx(fan_in**-0.5, rel=0.03), name
            assert module.weight.abs().max().item() <= 2 * fan_in**-0.5 / 0.8796
            assert abs(module.weight.mean().item()) < 0.05 * fan_in**-0.5


def test_weights_follow_the_seed() -> None:
    def first(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return Encoder("resnet18", 0.125, "small").conv1.weight

    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))


def test_an_unknown_depth_is_refused() -> None:
    with pytest.raises(KeyError):
        Encoder("resnet99")


# --- SimCLR v2's network ----------------------------------------------------------------------------------------------

PUBLISHED_MILLIONS = {  # arXiv:2006.10029, table 1: depth, width, selective kernels
    ("resnet50", 1, False): 24,
    ("resnet50", 1, True): 35,
    ("resnet50", 2, False): 94,
    ("resnet50", 2, True): 140,
    ("resnet101", 1, False): 43,
    ("resnet101", 1, True): 65,
    ("resnet101", 2, False): 170,
    ("resnet101", 2, True): 257,
    ("resnet152", 1, False): 58,
    ("resnet152", 1, True): 89,
    ("resnet152", 2, False): 233,
    ("resnet152", 2, True): 354,
    ("resnet152", 3, True): 795,
}


@pytest.mark.parametrize("network", PUBLISHED_MILLIONS, ids=str)
def test_networks_have_the_published_size(network: tuple[str, int, bool]) -> None:
    """Moving averages counted, as TensorFlow counts its variables."""
    arch, width, sk = network
    with torch.device("meta"):
        encoder = Encoder(arch, width, sk=sk)
    count = sum(value.numel() for name, value in encoder.state_dict().items() if not name.endswith("num_batches_tracked"))
    assert round(count / 1e6) == PUBLISHED_MILLIONS[network]
    assert encoder.feature_dim == 2048 * width


def randomise(module: nn.Module) -> nn.Module:
    for name, value in module.state_dict().items():
        if value.is_floating_point():
            value.uniform_(0.5, 1.5) if value.ndim == 1 and "bias" not in name else value.normal_(0, 0.3)
    return module.eval()


def batch_norm(x: np.ndarray, norm: nn.BatchNorm2d) -> np.ndarray:
    mean, var, gamma, beta = (
        v.detach().double().numpy() for v in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    )
    return (x - mean) / np.sqrt(var + 1e-5) * gamma + beta


@pytest.mark.parametrize("stride", [1, 2])
def test_a_selective_kernel_is_the_official_formula(stride: int) -> None:
    """sk_conv2d by loops, for channels last, on given weights."""
    kernel = randomise(SelectiveKernel(6, stride))
    x = torch.randn(2, 6, 5, 4)
    weight = kernel.streams.weight.detach().double().numpy()
    padded = np.pad(x.double().numpy(), ((0, 0), (0, 0), (1, 1), (1, 1)))
    height, width = math.ceil(5 / stride), math.ceil(4 / stride)
    conv = np.zeros((2, height, width, 12))
    for b, i, j, o in np.ndindex(conv.shape):
        window = padded[b, :, i * stride : i * stride + 3, j * stride : j * stride + 3]
        conv[b, i, j, o] = (window * weight[o]).sum()
    both = np.maximum(batch_norm(conv, kernel.norm), 0)
    streams = [both[..., :6], both[..., 6:]]
    pooled = (streams[0] + streams[1]).mean((1, 2))
    reduce, select = (layer.weight.detach().double().numpy()[:, :, 0, 0] for layer in (kernel.reduce, kernel.select))
    assert reduce.shape == (32, 6), "at least 32 channels"
    logits = np.maximum(batch_norm(pooled @ reduce.T, kernel.reduce_norm), 0) @ select.T
    wanted = np.zeros((2, 6, height, width))
    for b, c in np.ndindex(2, 6):
        weights = np.exp([logits[b, c], logits[b, 6 + c]])
        shares = weights / weights.sum()
        wanted[b, c] = shares[0] * streams[0][b, :, :, c] + shares[1] * streams[1][b, :, :, c]
    torch.testing.assert_close(kernel(x).double(), torch.from_numpy(wanted), rtol=1e-5, atol=1e-5)


def test_the_attention_is_a_sixteenth_of_the_stage() -> None:
    with torch.device("meta"):
        encoder = Encoder("resnet50", 2, sk=True)
    widths = [getattr(encoder, f"layer{stage}")[0].conv2.reduce.out_channels for stage in range(1, 5)]
    assert widths == [max(int(128 * 2**stage * 0.0625), 32) for stage in range(4)]
    assert widths == [32, 32, 32, 64]


@pytest.mark.parametrize(("height", "width"), [(4, 6), (5, 4), (7, 7)])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_shortcut_averages_as_the_official_code_does(height: int, width: int, stride: int) -> None:
    """'SAME' leaves out what is beyond the border, `fixed_padding` counts it as zero."""
    x = torch.randn(1, 2, height, width)
    wanted = torch.zeros(1, 2, math.ceil(height / stride), math.ceil(width / stride))
    for c, i, j in np.ndindex(*wanted.shape[1:]):
        window = x[0, c, i * stride : i * stride + 2, j * stride : j * stride + 2]
        wanted[0, c, i, j] = window.sum() / (window.numel() if stride == 1 else 4)
    torch.testing.assert_close(ShortcutPool(stride)(x), wanted)


@pytest.mark.parametrize(("height", "width"), [(4, 6), (5, 4), (7, 7), (2, 1)])
def test_the_same_pool_pads_as_tensorflow_does(height: int, width: int) -> None:
    x = torch.rand(1, 2, height, width)
    wanted = torch.zeros(1, 2, math.ceil(height / 2), math.ceil(width / 2))
    before = [max((math.ceil(size / 2) - 1) * 2 + 3 - size, 0) // 2 for size in (height, width)]
    for c, i, j in np.ndindex(*wanted.shape[1:]):
        top, left = 2 * i - before[0], 2 * j - before[1]
        wanted[0, c, i, j] = x[0, c, max(top, 0) : top + 3, max(left, 0) : left + 3].max()
    assert torch.equal(SamePool()(x), wanted)


def test_selective_kernels_bring_resnet_d_and_start_as_shortcuts() -> None:
    encoder = Encoder("resnet50", 0.125, sk=True).eval()
    assert [type(module) for module in encoder.conv1] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU] * 2 + [nn.Conv2d]
    assert [tuple(m.weight.shape[:2]) for m in encoder.conv1 if isinstance(m, nn.Conv2d)] == [(4, 3), (4, 4), (8, 4)]
    assert [m.stride[0] for m in encoder.conv1 if isinstance(m, nn.Conv2d)] == [2, 1, 1]
    blocks = [module for module in encoder.modules() if isinstance(module, Bottleneck)]
    assert all(block.bn3.weight.count_nonzero() == 0 for block in blocks)
    assert [type(module) for module in encoder.layer2[0].downsample] == [ShortcutPool, nn.Conv2d, nn.BatchNorm2d]
    assert encoder.layer2[0].downsample[1].stride == (1, 1)
    assert encoder(images(2, 64, 48)).shape == (2, 256)
    assert encoder.layer4(encoder.layer3(encoder.layer2(torch.rand(1, 32, 16, 12)))).shape[2:] == (2, 2)
    assert isinstance(Encoder("resnet50", 0.125, "small", sk=True).conv1, nn.Conv2d)


def test_selective_kernels_learn() -> None:
    encoder = Encoder("resnet50", 0.125, sk=True)
    for block in encoder.modules():
        if isinstance(block, Bottleneck):
            nn.init.ones_(block.bn3.weight)
    encoder(images(4, 64, 64)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())
    assert encoder.layer3[1].conv2.select.weight.grad.abs().max() > 0


# --- pixels and facts -------------------------------------------------------------------------------------------------

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def test_mean_and_std_are_inside() -> None:
    plain = randomise(Encoder("resnet18", 0.125))
    encoder = Encoder("resnet18", 0.125, mean=MEAN, std=STD).eval()
    encoder.load_state_dict(plain.state_dict())
    assert encoder.state_dict().keys() == plain.state_dict().keys(), "torchvision's names, and no others"
    x = images()
    normal = torch.stack([(x[:, c] - MEAN[c]) / STD[c] for c in range(3)], 1)
    torch.testing.assert_close(encoder(x), plain(normal), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(encoder(x), plain(x), rtol=0.01)


@pytest.mark.parametrize(
    ("settings", "more"),
    [
        ({}, {}),
        ({"sk": True, "pool_padding": "tf"}, {"sk": True, "pool_padding": "tf"}),
        ({"sk": False, "pool_padding": "torch", "stem_quirk": "pad2"}, {"stem_quirk": "pad2"}),
        ({"mean": MEAN, "std": STD}, {"mean": list(MEAN), "std": list(STD)}),
    ],
)
def test_facts_describe_the_network_and_rebuild_it(settings: dict[str, Any], more: dict[str, Any]) -> None:
    encoder = Encoder("resnet50", 0.125, **settings)
    assert encoder.facts == {"arch": "resnet50", "width": 0.125, "stem": "imagenet"} | more
    assert encoder.extras == more
    again = Encoder.from_facts(encoder.facts | {"steps": 3})
    assert again.facts == encoder.facts
    assert repr(again) == repr(encoder)


@pytest.mark.parametrize(
    "settings",
    [{"arch": "resnet34", "sk": True}, {"pool_padding": "same"}, {"stem_quirk": "odd"}, {"mean": MEAN}, {"std": STD}],
)
def test_settings_that_do_not_go_together_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"resnet34|unknown|go together"):
        Encoder(**{"arch": "resnet18", "width": 0.125} | settings)


# --- projection head --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_the_head_is_dense_bn_relu_and_a_last_dense_bn_without_bias(layers: int) -> None:
    head = ProjectionHead(24, 10, layers)
    kinds = [type(module) for module in head]
    assert kinds == [nn.Linear, nn.BatchNorm1d, nn.ReLU] * (layers - 1) + [nn.Linear, nn.BatchNorm1d]
    linears = [module for module in head if isinstance(module, nn.Linear)]
    assert [tuple(linear.weight.shape) for linear in linears] == [(24, 24)] * (layers - 1) + [(10, 24)]
    assert all(linear.bias is None for linear in linears)
    assert all(norm.bias is not None for norm in list(head)[:-1] if isinstance(norm, nn.BatchNorm1d))
    assert head[-1].bias is None
    assert "bias" not in dict(head[-1].named_parameters())
    assert head(torch.rand(5, 24)).shape == (5, 10)


def test_the_heads_weights_start_at_a_hundredth() -> None:
    for module in ProjectionHead(512, 128, 3):
        if isinstance(module, nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.01, rel=0.02)


def test_projections_have_mean_zero_over_the_batch() -> None:
    """Without a bias the last batch norm leaves no common direction."""
    projections = ProjectionHead(16, 8)(torch.rand(32, 16))
    torch.testing.assert_close(projections.mean(0), torch.zeros(8), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("layers", "dims"), [(2, (24, 24, 10)), (3, (24, 24, 24, 10))])
def test_the_heads_first_layers_can_be_taken(layers: int, dims: tuple[int, ...]) -> None:
    head = ProjectionHead(24, 10, layers).eval()
    x = torch.rand(5, 24)
    hidden = x
    for count in range(layers + 1):
        part = head.first(count)
        assert part(x).shape == (5, dims[count])
        torch.testing.assert_close(part(x), hidden)
        if count < layers:
            dense, norm = head[3 * count], head[3 * count + 1]
            hidden = norm(hidden @ dense.weight.T)
            hidden = hidden.clamp(min=0) if count < layers - 1 else hidden
    assert head.first(1)[0] is head[0], "shared, so that fine-tuning starts there"
    for count in (-1, layers + 1):
        with pytest.raises(ValueError, match=f"wanted 0 to {layers}"):
            head.first(count)


def test_a_head_has_a_layer() -> None:
    with pytest.raises(ValueError, match="wanted at least 1"):
        ProjectionHead(24, 10, 0)


def test_simclr_is_the_head_on_the_encoder() -> None:
    encoder = Encoder("resnet18", 0.125, "small")
    head = ProjectionHead(encoder.feature_dim, 12)
    model = SimCLR(encoder, head).eval()
    features, projections = model(images(4))
    torch.testing.assert_close(features, encoder(images(4)))
    torch.testing.assert_close(projections, head(features))


# --- unit vectors -----------------------------------------------------------------------------------------------------


def test_the_unit_encoder_scales_bytes_and_normalises() -> None:
    encoder = Encoder("resnet18", 0.125, "small").eval()
    pixels = torch.randint(0, 256, (3, 20, 16, 3), dtype=torch.uint8)
    vectors = UnitEncoder(encoder).eval()(pixels)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(3))
    floats = torch.stack([torch.stack([picture[..., channel] / 255 for channel in range(3)]) for picture in pixels])
    features = encoder(floats)
    wanted = torch.stack([feature / feature.square().sum().sqrt() for feature in features])
    torch.testing.assert_close(vectors, wanted)
