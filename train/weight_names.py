"""Whose state dict is it, and what are its tensors called in torchvision's names. Decided by keys alone.

Sources of the names: torchvision resnet.py; lightly models/resnet.py and its examples (a Sequential of a network's
children); solo-learn methods/base.py; vissl trunks/resnext.py; sthalles models/resnet_simclr.py; Spijkervet simclr.py; MoCo
builder.py; tonylins/simclr-converter and Separius/SimCLRv2-Pytorch convert.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One way to name a ResNet's modules."""

    anchor: str
    """A convolution of the first block, which marks the layout and where the encoder's prefix ends."""
    block: str
    """Pattern of a module in a block: number of its stage, of the block, and its name there."""
    offset: int = 0
    """What the first stage's number has above 1."""
    stem: Mapping[str, str]
    inside: Mapping[str, str]
    """Names of modules in a block that torchvision has otherwise."""

    def torchvision_name(self, key: str) -> str:
        """The key, prefix taken off, as torchvision has it (as our Encoder has it, for selective kernels)."""
        module, _, leaf = key.rpartition(".")
        if match := re.fullmatch(self.block, module):
            stage, block, name = match.groups()
            return f"layer{int(stage) - self.offset}.{block}.{self.inside.get(name, name)}.{leaf}"
        return f"{self.stem.get(module, module)}.{leaf}"


_SHORTCUT = {"shortcut.0": "downsample.0", "shortcut.1": "downsample.1"}
_V2_BLOCK = {"net.0": "conv1", "net.1.0": "bn1"}
LAYOUTS = {
    # nn.Sequential of the children of lightly's ResNetGenerator, which has neither a ReLU nor a max-pool module
    "generator": Layout(
        anchor="2.0.conv1.weight",
        block=r"(\d)\.(\d+)\.(.+)",
        offset=1,
        stem={"0": "conv1", "1": "bn1"},
        inside=_SHORTCUT,
    ),
    # nn.Sequential of the children of a torchvision ResNet
    "children": Layout(
        anchor="4.0.conv1.weight", block=r"(\d)\.(\d+)\.(.+)", offset=3, stem={"0": "conv1", "1": "bn1"}, inside={}
    ),
    "v2-sk": Layout(
        anchor="net.1.blocks.0.net.2.main_conv.0.weight",
        block=r"net\.(\d)\.blocks\.(\d+)\.(.+)",
        stem={
            "net.0.0": "conv1.0",
            "net.0.1.0": "conv1.1",
            "net.0.2": "conv1.3",
            "net.0.3.0": "conv1.4",
            "net.0.4": "conv1.6",
            "net.0.5.0": "bn1",
        },
        inside=_V2_BLOCK
        | {
            "projection.shortcut.2": "downsample.1",
            "projection.bn.0": "downsample.2",
            "net.2.main_conv.0": "conv2.streams",
            "net.2.main_conv.1.0": "conv2.norm",
            "net.2.mixing_conv.0": "conv2.reduce",
            "net.2.mixing_conv.1.0": "conv2.reduce_norm",
            "net.2.mixing_conv.2": "conv2.select",
            "net.3": "conv3",
            "net.4.0": "bn3",
        },
    ),
    "v2": Layout(
        anchor="net.1.blocks.0.net.0.weight",
        block=r"net\.(\d)\.blocks\.(\d+)\.(.+)",
        stem={"net.0.0": "conv1", "net.0.1.0": "bn1"},
        inside=_V2_BLOCK
        | {
            "projection.shortcut": "downsample.0",
            "projection.bn.0": "downsample.1",
            "net.2": "conv2",
            "net.3.0": "bn2",
            "net.4": "conv3",
            "net.5.0": "bn3",
        },
    ),
    "torchvision": Layout(anchor="layer1.0.conv1.weight", block=r"layer(\d)\.(\d+)\.(.+)", stem={}, inside=_SHORTCUT),
}  # in the order in which they are tried
_COPY = re.compile(r"momentum|teacher|target|ema_|encoder_k")


def find_encoders(keys: Iterable[str]) -> dict[str, str]:
    """Prefix -> layout of every ResNet among the keys; moving averages of another are left out."""
    found: dict[str, str] = {}
    keys = list(keys)
    for name, layout in LAYOUTS.items():
        for key in keys:
            prefix = key.removesuffix(layout.anchor)
            if prefix != key and (not prefix or prefix.endswith(".")):
                found.setdefault(prefix, name)
    return {prefix: name for prefix, name in found.items() if not _COPY.search(prefix)} or found


@dataclass(frozen=True, kw_only=True)
class Project:
    """Who wrote the file, by the encoder's layout and prefix and by a key beside it, and what that project feeds it."""

    name: str
    layouts: tuple[str, ...] = ("torchvision",)
    prefix: str = ""
    beside: str = ""
    pixels: str | None
    small_pixels: str | None = None
    """With the 3x3 stem, if other than `pixels`."""
    small_quirk: str | None = None
    """`Encoder`'s `stem_quirk` with the 3x3 stem."""
    size_px: int = 224
    """Of its 7x7 stem's input."""
    why: str = "as the project trains"


_OFFICIAL = "the official code never normalises"
PROJECTS = (
    Project(name="official SimCLR v2 by SimCLRv2-Pytorch", layouts=("v2", "v2-sk"), pixels="official", why=_OFFICIAL),
    Project(name="VISSL", prefix=r"_feature_blocks\.", pixels="imagenet"),
    Project(name="MoCo", prefix=r"(encoder_q|base_encoder)\.", pixels="imagenet"),
    Project(name="sthalles/SimCLR", prefix=r"backbone\.", beside=r"backbone\.fc\.", pixels="unit", size_px=96),
    Project(
        name="sthalles/SimCLR of 2020", layouts=("children",), prefix=r"features\.", beside=r"l1\.", pixels="unit", size_px=96
    ),
    Project(name="lightly", layouts=("generator",), pixels="imagenet", small_quirk="no-relu"),
    Project(name="lightly", layouts=("torchvision", "children"), beside=r"projection_head\.", pixels="imagenet"),
    Project(
        name="solo-learn",
        prefix=r"(backbone|encoder)\.",
        beside=r"classifier\.",
        pixels="imagenet",
        small_pixels="cifar10",
        small_quirk="pad2",
    ),
    Project(name="Spijkervet/SimCLR", prefix=r"encoder\.", beside=r"projector\.", pixels="unit"),
)
_CONVERTED = Project(name="official SimCLR v1 by simclr-converter", pixels="official", why=_OFFICIAL)
_TORCHVISION = Project(
    name="torchvision",
    pixels="imagenet",
    why="assumed, because torchvision's names do not say it; converted official weights need --pixels official",
)


def recognise(tensors: Mapping[str, Tensor], layout: str, prefix: str) -> Project:
    """The project whose marks all fit; without one, a project of unknown pixels."""
    for project in PROJECTS:
        beside = re.compile(rf"(^|\.){project.beside}")
        if (
            layout in project.layouts
            and re.search(rf"(^|\.){project.prefix}$", prefix)
            and any(beside.search(key) for key in tensors)
        ):
            return project
    if layout == "torchvision" and re.fullmatch(r"((state_dict|model|module)\.)*", prefix):
        return _CONVERTED if _is_converted(tensors, prefix) else _TORCHVISION
    return Project(name=f"unknown project ({layout} names under {prefix!r})", pixels=None)


def _is_converted(tensors: Mapping[str, Tensor], prefix: str) -> bool:
    """simclr-converter's network has each shortcut before its block, as TensorFlow counts; nobody else is wider than 1x."""
    order = [key for key in tensors if key.startswith(f"{prefix}layer1.0.")]
    stem = tensors.get(f"{prefix}conv1.weight")
    return ".downsample." in order[0] or (stem is not None and len(stem) > 64)
