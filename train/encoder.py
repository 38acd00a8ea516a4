"""ResNet encoder and SimCLR's projection head.

The blocks are torchvision's; stem and width are adapted around them. Parameter names are those of torchvision's ResNet, so
weights can be exchanged with it. Shapes: B images, D = feature dimension, P = projection dimension.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from train.config import Arch, Stem

LAYERS: dict[Arch, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, int, int, int]]] = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
    "resnet152": (Bottleneck, (3, 8, 36, 3)),
}


class Encoder(nn.Module):
    """ResNet up to its average pool: float images in [0, 1] (B, 3, H, W) -> features (B, D).

    `width` scales every stage (the paper's 2x, 4x; below 1 for a CPU). The `small` stem is a 3x3 convolution of stride 1
    without max-pool, for small pictures (paper, appendix B.9); `small-s2` is the same with stride 2, at a quarter of the
    cost. The last batch norm of every block starts at zero.
    """

    def __init__(self, arch: Arch = "resnet50", width: float = 1, stem: Stem = "imagenet") -> None:
        super().__init__()
        block, counts = LAYERS[arch]
        channels = [max(8, round(64 * width)) << stage for stage in range(4)]
        kernel, stride = {"imagenet": (7, 2), "small": (3, 1), "small-s2": (3, 2)}[stem]
        self.conv1 = nn.Conv2d(3, channels[0], kernel, stride, kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(channels[0])
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if stem == "imagenet" else nn.Identity()
        inputs = channels[0]
        stages = []
        for planes, count, stride in zip(channels, counts, (1, 2, 2, 2), strict=True):
            stages.append(_stage(block, inputs, planes, count, stride))
            inputs = planes * block.expansion
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.feature_dim = inputs
        self.apply(_initialise)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Features (B, D) before the projection head: what is kept and served (paper, section 4.2)."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(images_BCHW))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return torch.flatten(self.avgpool(x), 1)


class ProjectionHead(nn.Sequential):
    """Dense-BN-ReLU x (layers - 1), then Dense-BN without bias: features (B, D) -> projections (B, P).

    Source: google-research/simclr, model_util.py, `projection_head`; weights drawn from N(0, 0.01).
    """

    def __init__(self, feature_dim: int, projection_dim: int = 128, layers: int = 2) -> None:
        hidden = [
            module
            for _ in range(layers - 1)
            for module in (nn.Linear(feature_dim, feature_dim, bias=False), nn.BatchNorm1d(feature_dim), nn.ReLU(inplace=True))
        ]
        last = nn.BatchNorm1d(projection_dim)
        del last.bias
        last.register_parameter("bias", None)
        super().__init__(*hidden, nn.Linear(feature_dim, projection_dim, bias=False), last)
        for module in self:
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)


def _stage(block: type[BasicBlock] | type[Bottleneck], inputs: int, planes: int, count: int, stride: int) -> nn.Sequential:
    outputs = planes * block.expansion
    shortcut = None
    if stride != 1 or inputs != outputs:
        shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
    return nn.Sequential(block(inputs, planes, stride, shortcut), *(block(outputs, planes) for _ in range(count - 1)))


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
    """What is exported and served: uint8 (B, H, W, 3) -> scale to [0, 1] -> encoder -> unit vectors (B, D)."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, image: Tensor) -> Tensor:
        """Unit vectors, L2 norm included."""
        return F.normalize(self.encoder(image.permute(0, 3, 1, 2).float() / 255), dim=1)


class SimCLR(nn.Module):
    """Encoder and projection head, as trained: views (2B, 3, H, W) -> projections (2B, P)."""

    def __init__(self, encoder: Encoder, head: ProjectionHead) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, views_2BCHW: Tensor) -> Tensor:
        """Projections, not normalised."""
        projections: Tensor = self.head(self.encoder(views_2BCHW))
        return projections
