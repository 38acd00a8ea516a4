"""ResNet encoder and SimCLR's projection head.

The blocks are torchvision's; stem, width and selective kernels are adapted around them. Without selective kernels the
parameter names are those of torchvision's ResNet, so weights can be exchanged with it. Shapes: B images, D = feature
dimension, P = projection dimension.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

if TYPE_CHECKING:
    from pydantic import JsonValue

LAYERS: dict[str, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, int, int, int]]] = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
    "resnet152": (Bottleneck, (3, 8, 36, 3)),
    "resnet200": (Bottleneck, (3, 24, 36, 3)),
}
SK_RATIO, SK_MIN_CHANNELS = 0.0625, 32
"""Width of a selective kernel's attention, as a share of the stage's and at least (SimCLR v2; resnet.py, `sk_conv2d`)."""

NARROW = 16
"""Channels that oneDNN takes together with AVX-512."""


class Encoder(nn.Module):
    """ResNet up to its average pool: float images in [0, 1] (B, 3, H, W) -> features (B, D).

    `width` scales every stage (the paper's 2x, 4x; below 1 for a CPU). The `small` stem is a 3x3 convolution of stride 1
    without max-pool, for small pictures (paper, appendix B.9); `small-s2` is the same with stride 2, at a quarter of the
    cost. The last batch norm of every block starts at zero. `sk` makes it SimCLR v2's network with selective kernels
    (resnet.py, `sk_ratio`): ResNet-D stem and shortcuts, Bottleneck depths only. As in torchvision, the first block of
    ResNet-18 and -34 has no projection; the official code has one there.

    The rest is for weights trained elsewhere: `pool_padding` "tf" is TensorFlow's border of the max-pool; `stem_quirk`
    "pad2" pads the small stem by 2 (solo-learn), "no-relu" leaves out its ReLU (lightly's generator in a Sequential);
    `mean` and `std` per channel are taken off and divided by first.

    Raises: KeyError for an unknown depth or stem, ValueError for settings that do not go together.
    """

    mean: Tensor | None
    std: Tensor | None

    def __init__(
        self,
        arch: str = "resnet50",
        width: float = 1,
        stem: str = "imagenet",
        *,
        sk: bool = False,
        pool_padding: str = "torch",
        stem_quirk: str | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        block, counts = LAYERS[arch]
        if sk and block is BasicBlock:
            raise ValueError(f"selective kernels need Bottleneck blocks, resnet50 and deeper; got {arch}")
        if pool_padding not in ("torch", "tf") or stem_quirk not in (None, "pad2", "no-relu"):
            raise ValueError(f"unknown pool_padding {pool_padding!r} or stem_quirk {stem_quirk!r}")
        if (mean is None) != (std is None):
            raise ValueError("mean and std go together")
        extras: dict[str, Any] = {"sk": sk, "pool_padding": pool_padding, "stem_quirk": stem_quirk}
        extras |= {"mean": mean and list(mean), "std": std and list(std)}
        plain = (False, None, "torch")
        self.extras: dict[str, JsonValue] = {name: value for name, value in extras.items() if value not in plain}
        self.facts: dict[str, JsonValue] = {"arch": arch, "width": width, "stem": stem, **self.extras}
        for name, values in (("mean", mean), ("std", std)):
            statistic = None if values is None else torch.tensor(values, dtype=torch.float32).view(3, 1, 1)
            self.register_buffer(name, statistic, persistent=False)

        channels = [max(8, round(64 * width)) << stage for stage in range(4)]
        self.conv1 = _first_convolution(channels[0], stem, sk=sk, padding=2 if stem_quirk == "pad2" else None)
        self.bn1 = nn.BatchNorm2d(channels[0])
        self.relu = nn.Identity() if stem_quirk == "no-relu" else nn.ReLU(inplace=True)
        pool = SamePool() if pool_padding == "tf" else nn.MaxPool2d(3, 2, 1)
        self.maxpool = pool if stem == "imagenet" else nn.Identity()
        inputs = channels[0]
        stages = []
        for planes, count, stride in zip(channels, counts, (1, 2, 2, 2), strict=True):
            stages.append(_stage(block, inputs, planes, count, stride, sk=sk))
            inputs = planes * block.expansion
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.feature_dim = inputs
        self.apply(_initialise)

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> Self:
        """The network that a card's `training` describes, with fresh weights. Raises: KeyError, ValueError."""
        names = ("sk", "pool_padding", "stem_quirk", "mean", "std")
        extras = {name: facts[name] for name in names if name in facts}
        return cls(facts["arch"], facts["width"], facts["stem"], **extras)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Features (B, D) before the projection head: what is kept and served (paper, section 4.2)."""
        x = images_BCHW
        if self.mean is not None and self.std is not None:
            x = (x - self.mean) / self.std
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return torch.flatten(self.avgpool(x), 1)


class ProjectionHead(nn.Sequential):
    """Dense-BN-ReLU x (layers - 1), then Dense-BN without bias: features (B, D) -> projections (B, P).

    Source: google-research/simclr, model_util.py, `projection_head`; weights drawn from N(0, 0.01).
    """

    def __init__(self, feature_dim: int, projection_dim: int = 128, layers: int = 2) -> None:
        if layers < 1:
            raise ValueError(f"layers is {layers}, wanted at least 1")
        hidden = [
            module
            for _ in range(layers - 1)
            for module in (nn.Linear(feature_dim, feature_dim, bias=False), nn.BatchNorm1d(feature_dim), nn.ReLU(inplace=True))
        ]
        last = nn.BatchNorm1d(projection_dim)
        del last.bias
        last.register_parameter("bias", None)
        super().__init__(*hidden, nn.Linear(feature_dim, projection_dim, bias=False), last)
        self.layers = layers
        for module in self:
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)

    def first(self, layers: int) -> nn.Sequential:
        """The first layers with their ReLUs, sharing these weights: where SimCLR v2 fine-tunes from (`ft_proj_selector`).

        0 is the identity, and `self.layers` the whole head.
        """
        if not 0 <= layers <= self.layers:
            raise ValueError(f"layers is {layers}, wanted 0 to {self.layers}")
        return nn.Sequential(*list(self)[: 3 * layers])


class SamePool(nn.MaxPool2d):
    """Max-pool 3x3 of stride 2 with TensorFlow's 'SAME' border: even sizes are padded at the end only.

    The official weights were trained with it. Zeros will do for a border because the input comes from a ReLU.
    """

    def __init__(self) -> None:
        super().__init__(3, 2)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - nn.MaxPool2d calls it so
        """(B, C, H, W) -> (B, C, ceil(H / 2), ceil(W / 2))."""
        height, width = input.shape[2:]
        pooled: Tensor = super().forward(F.pad(input, (width % 2, 1, height % 2, 1)))
        return pooled


class SelectiveKernel(nn.Module):
    """Two streams of 3x3 convolutions, mixed per picture and channel by a softmax (arXiv:1903.06586).

    Source: google-research/simclr, resnet.py, `sk_conv2d`. Batch norm and ReLU are inside.
    """

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        between = max(int(channels * SK_RATIO), SK_MIN_CHANNELS)
        self.streams = nn.Conv2d(channels, 2 * channels, 3, stride, 1, bias=False)
        self.norm = nn.BatchNorm2d(2 * channels)
        self.reduce = nn.Conv2d(channels, between, 1, bias=False)
        self.reduce_norm = nn.BatchNorm2d(between)
        self.select = nn.Conv2d(between, 2 * channels, 1, bias=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H / stride, W / stride)."""
        x_B2CHW = F.relu(self.norm(self.streams(x_BCHW))).unflatten(1, (2, -1))
        pooled_BC11 = x_B2CHW.sum(1).mean((2, 3), keepdim=True)
        between = F.relu(self.reduce_norm(self.reduce(pooled_BC11)))
        share_B2C11 = self.select(between).unflatten(1, (2, -1)).softmax(1)
        mixed_BCHW: Tensor = (x_B2CHW * share_B2C11).sum(1)
        return mixed_BCHW


class ShortcutPool(nn.Module):
    """ResNet-D's 2x2 average before a shortcut, with the official borders: TF's 'SAME' at stride 1, zeros at stride 2."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, ceil(H / stride), ceil(W / stride))."""
        mode = "replicate" if self.stride == 1 else "constant"  # 'SAME' averages what is there, as a repeated edge does
        return F.avg_pool2d(F.pad(x_BCHW, (0, 1, 0, 1), mode), 2, self.stride)


class NarrowShortcut(nn.Conv2d):
    """A 1x1 convolution with a stride, trained as one of stride 1 on what the stride leaves: the same sums.

    With fewer than NARROW channels in channels-last, oneDNN's backward pass of the strided one writes past its memory on CPUs
    (github.com/uxlfoundation/oneDNN/issues/6035): the process dies, or goes on with damaged numbers.
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - nn.Conv2d calls it so
        """(B, C, H, W) -> (B, C', ceil(H / stride), ceil(W / stride))."""
        if not self.training:  # what is exported is the plain convolution
            return super().forward(input)
        return F.conv2d(input[..., :: self.stride[0], :: self.stride[1]], self.weight)


def _first_convolution(channels: int, stem: str, *, sk: bool, padding: int | None) -> nn.Module:
    kernel, stride = {"imagenet": (7, 2), "small": (3, 1), "small-s2": (3, 2)}[stem]
    if not (sk and stem == "imagenet"):
        return nn.Conv2d(3, channels, kernel, stride, kernel // 2 if padding is None else padding, bias=False)
    half, modules = channels // 2, []  # ResNet-D (arXiv:1812.01187)
    for inputs, stride in ((3, 2), (half, 1)):
        modules += [nn.Conv2d(inputs, half, 3, stride, 1, bias=False), nn.BatchNorm2d(half), nn.ReLU(inplace=True)]
    return nn.Sequential(*modules, nn.Conv2d(half, channels, 3, 1, 1, bias=False))


def _stage(
    block: type[BasicBlock] | type[Bottleneck], inputs: int, planes: int, count: int, stride: int, *, sk: bool
) -> nn.Sequential:
    outputs = planes * block.expansion
    shortcut = None
    if stride != 1 or inputs != outputs:
        pool = [ShortcutPool(stride)] if sk else []
        kind = NarrowShortcut if inputs < NARROW else nn.Conv2d
        convolution = kind(inputs, outputs, 1, 1 if sk else stride, bias=False)
        shortcut = nn.Sequential(*pool, convolution, nn.BatchNorm2d(outputs))
    blocks = [block(inputs, planes, stride, shortcut), *(block(outputs, planes) for _ in range(count - 1))]
    if sk:
        for number, bottleneck in enumerate(blocks):
            bottleneck.conv2, bottleneck.bn2 = SelectiveKernel(planes, 1 if number else stride), nn.Identity()
    return nn.Sequential(*blocks)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):  # truncated normal, fan_in, scale 1: resnet.py:276 of the official code
        fan_in = module.in_channels * module.kernel_size[0] * module.kernel_size[1]
        std = (1 / fan_in) ** 0.5 / 0.87962566103423978  # the deviation that truncation at 2 sigma takes away
        nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
    elif isinstance(module, BasicBlock):
        nn.init.zeros_(module.bn2.weight)
    elif isinstance(module, Bottleneck):
        nn.init.zeros_(module.bn3.weight)


class UnitEncoder(nn.Module):
    """What is exported and served: uint8 (B, H, W, 3) -> scale to [0, 1] -> encoder -> unit vectors (B, D).

    Any encoder will do that takes what `Encoder` takes and gives what it gives.
    """

    def __init__(self, encoder: nn.Module, *, unit: bool = True) -> None:
        super().__init__()
        self.encoder, self.unit = encoder, unit

    def forward(self, image: Tensor) -> Tensor:
        """Unit vectors, L2 norm included; or, not `unit`, the features as they are."""
        features: Tensor = self.encoder(image.permute(0, 3, 1, 2).float() / 255)
        return F.normalize(features, dim=1) if self.unit else features


class SimCLR(nn.Module):
    """Encoder and projection head, as trained: views (2B, 3, H, W) -> features (2B, D) and projections (2B, P)."""

    def __init__(self, encoder: Encoder, head: ProjectionHead) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, views_2BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Both unnormalised; the loss is taken on the projections."""
        features = self.encoder(views_2BCHW)
        return features, self.head(features)
