"""The network: shapes, exchange of weights with torchvision, initial values, the projection head, unit vectors."""

from typing import get_args

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from train.config import Arch, Stem
from train.encoder import LAYERS, Encoder, ProjectionHead, SimCLR, UnitEncoder

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
        ours, theirs = Encoder(arch), getattr(torchvision.models, arch)()
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
        Encoder("resnet99")  # type: ignore[arg-type]


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


def test_simclr_is_the_head_on_the_encoder() -> None:
    encoder = Encoder("resnet18", 0.125, "small")
    head = ProjectionHead(encoder.feature_dim, 12)
    model = SimCLR(encoder, head).eval()
    torch.testing.assert_close(model(images(4)), head(encoder(images(4))))


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
