"""Encoders trained elsewhere -> a RUN folder that evaluates, exports and serves like our own.

A tensor that the network needs must be in the file; what it does not need is named. Which projects are known stands in
train/weight_names.py.
"""

from __future__ import annotations

import pickle
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from pydantic import JsonValue
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torchvision.models.resnet import BasicBlock, Bottleneck

from serve.contract import Manifest, Preprocess, file_sha256
from serve.errors import ContractError, first_line
from train.checkpoint import CARD, CHECKPOINT, save_encoder
from train.encoder import LAYERS, Encoder, ProjectionHead
from train.weight_names import LAYOUTS, Project, find_encoders, recognise

Pixels: TypeAlias = Literal["auto", "official", "unit", "imagenet", "cifar10", "cifar100", "stl10"]
"""`unit` is [0, 1] as it is; `official` is that and TensorFlow's border of the max-pool; the others are a mean and std."""

Statistics: TypeAlias = tuple[tuple[float, float, float], tuple[float, float, float]]
STATISTICS: dict[str, Statistics] = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),  # from here on solo-learn's
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "stl10": ((0.4914, 0.4823, 0.4466), (0.247, 0.243, 0.261)),
}


@dataclass(frozen=True, kw_only=True)
class ForeignWeights:
    """What a file holds, as ours."""

    path: Path
    project: str
    encoder: Encoder
    """With the file's weights, in evaluation mode."""
    preprocess: Preprocess
    pixels: str
    why: str
    """Why these pixels."""
    head: dict[str, Tensor]
    """State of a `ProjectionHead` where the file's head is one, else empty."""
    unused: tuple[str, ...]
    """Keys of tensors that the encoder and head did not need."""

    def summary(self) -> str:
        """Lines for a person: whose weights, which network, which pixels and why, what was left out."""
        facts, frame = self.encoder.facts, self.preprocess
        kernels = ", selective kernels" if facts.get("sk") else ""
        unused = ", ".join(f"{group} ({count})" for group, count in _groups(self.unused).items())
        return "\n".join(
            (
                f"{self.path}: {self.project}, {facts['arch']}, width {facts['width']:g}, {facts['stem']} stem{kernels}",
                f"pixels   {self.pixels}: {self.why}",
                f"frame    {frame.height_px} x {frame.width_px} px, centre crop {frame.crop}, {frame.resample}",
                f"unused   {unused or 'nothing'}",
            )
        )

    def save(self, run: Path) -> Manifest:
        """Write RUN/encoder.safetensors and encoder.json. Raises: ContractError where RUN is one already, OSError."""
        for name in (CARD, CHECKPOINT):
            if (run / name).exists():
                raise ContractError(f"{run}: holds {name} already; choose another --run")
        origin: dict[str, JsonValue] = {
            "project": self.project,
            "file": self.path.name,
            "sha256": file_sha256(self.path),
            "pixels": self.pixels,
            "why": self.why,
            "unused": dict(_groups(self.unused)),
        }
        return save_encoder(run, self.encoder, self.preprocess, {"imported": origin})


def import_weights(path: Path, run: Path, *, pixels: Pixels = "auto", size_px: int | None = None) -> Manifest:
    """`read_weights`, saved as a RUN folder. Raises: ContractError, OSError."""
    return read_weights(path, pixels=pixels, size_px=size_px).save(run)


def read_weights(path: Path, *, pixels: Pixels = "auto", size_px: int | None = None) -> ForeignWeights:
    """Recognise whose file it is and read its encoder.

    Args: pixels that the weights were trained on, if known better; size_px, of the encoder's input.
    Raises: ContractError if it cannot be read or recognised, or lacks a tensor; OSError.
    """
    tensors = read_tensors(path)
    layout, prefix = _the_encoder(path, tensors)
    project = recognise(tensors, layout, prefix)
    names = {key: LAYOUTS[layout].torchvision_name(key.removeprefix(prefix)) for key in tensors if key.startswith(prefix)}
    names = {key: name for key, name in names.items() if re.match(r"(conv1|bn1|layer\d+)\.", name)}
    state = {name: tensors[key] for key, name in names.items()}
    facts = _network(path, state)
    small = facts["stem"] == "small"
    chosen, why = _choose_pixels(path, project, pixels, small=small)
    facts["mean"], facts["std"] = STATISTICS.get(chosen, (None, None))
    facts |= {"pool_padding": "tf" if chosen == "official" else "torch", "stem_quirk": project.small_quirk if small else None}
    encoder = Encoder.from_facts(facts)
    _load(path, project, encoder, state)
    head = _head(tensors, encoder.feature_dim)
    return ForeignWeights(
        path=path,
        project=project.name,
        encoder=encoder.eval(),
        preprocess=_frame(size_px or (32 if small else project.size_px)),
        pixels=chosen,
        why=why,
        head={name: tensors[key] for key, name in head.items()},
        unused=tuple(key for key in tensors if key not in names and key not in head),
    )


# --- the file ---------------------------------------------------------------------------------------------------------


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors or torch file under its whole path of keys (`state_dict.conv1.weight`); runs no code.

    Raises: ContractError, OSError.
    """
    with path.open("rb") as file:
        is_safetensors = file.read(9)[8:] == b"{"
    try:
        tree = load_file(path) if is_safetensors else torch.load(path, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        raise ContractError(
            f"{path}: not a plain file of tensors ({found[1] if found else 'no readable pickle'}), and objects are not "
            f"unpickled; load it with the project that wrote it and torch.save the state_dict alone"
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, SafetensorError) as error:
        raise ContractError(f"{path}: truncated or no file of weights ({first_line(error)})") from error
    tensors = dict(_walk(tree))
    if not tensors:
        raise ContractError(f"{path}: holds no tensors; wanted a state dict")
    return tensors


def _walk(tree: object, path: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(tree, Tensor):
        yield path, tree
    elif isinstance(tree, Mapping):
        for name, value in tree.items():
            yield from _walk(value, f"{path}.{name}" if path else str(name))


def _groups(keys: tuple[str, ...]) -> Counter[str]:
    """How many tensors of what: `state_dict.fc.weight` and `.bias` are two of `fc`."""
    wrappers = r"((state_dict|model|module|backbone|encoder|resnet|classy_state_dict|base_model)\.)*"
    return Counter(re.sub(rf"^{wrappers}", "", key).split(".")[0] for key in keys)


# --- the network ------------------------------------------------------------------------------------------------------


def _the_encoder(path: Path, tensors: dict[str, Tensor]) -> tuple[str, str]:
    found = find_encoders(tensors)
    if not found:
        some = ", ".join(list(tensors)[:3])
        raise ContractError(f"{path}: no ResNet whose names are known; its {len(tensors)} tensors begin with {some}")
    if len(found) > 1:
        raise ContractError(f"{path}: holds {len(found)} encoders ({', '.join(map(repr, found))}); save the wanted one alone")
    ((prefix, layout),) = found.items()
    return layout, prefix


def _network(path: Path, state: dict[str, Tensor]) -> dict[str, Any]:
    """Depth, width and stem, from names and shapes."""
    blocks = {match[0] for name in state if (match := re.match(r"layer\d+\.\d+", name))}
    counts = tuple(sum(block.startswith(f"layer{stage}.") for block in blocks) for stage in range(1, 5))
    block = Bottleneck if "layer1.0.conv3.weight" in state else BasicBlock
    arch = next((arch for arch, kind in LAYERS.items() if kind == (block, counts)), None)
    if arch is None:
        raise ContractError(f"{path}: {counts} {block.__name__}s in the stages; wanted those of {', '.join(LAYERS)}")
    sk = "layer1.0.conv2.streams.weight" in state
    first, last = (state.get(name) for name in (("conv1.0.weight", "conv1.6.weight") if sk else ("conv1.weight",) * 2))
    if first is None or last is None:
        raise ContractError(f"{path}: no first convolution in front of the {arch}")
    kernel = 7 if sk else first.shape[-1]
    if kernel not in (3, 7) or first.shape[1] != 3:
        raise ContractError(f"{path}: first convolution is {tuple(first.shape)}; wanted 3x3 or 7x7 on 3 channels")
    return {"arch": arch, "width": len(last) / 64, "stem": "small" if kernel == 3 else "imagenet", "sk": sk}


def _load(path: Path, project: Project, encoder: Encoder, state: dict[str, Tensor]) -> None:
    wanted = encoder.state_dict()
    lacking = [name for name in wanted if name not in state and not name.endswith("num_batches_tracked")]
    foreign = [name for name in state if name not in wanted]
    shapes = [name for name in state if name in wanted and state[name].shape != wanted[name].shape]
    for names, complaint in (
        (lacking, "lacks"),
        (foreign, "has beyond that network"),
        (shapes, "has other shapes than that network for"),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            kind = f"{encoder.facts['arch']} of width {encoder.facts['width']:g}"
            raise ContractError(f"{path}: {project.name}, {kind}, but it {complaint} {', '.join(names[:3])}{more}")
    encoder.load_state_dict(state, strict=False)


def _choose_pixels(path: Path, project: Project, pixels: Pixels, *, small: bool) -> tuple[str, str]:
    if pixels != "auto":
        return pixels, "as asked"
    if project.pixels is None:
        choices = "official, unit, imagenet, cifar10, cifar100 or stl10"
        raise ContractError(f"{path}: {project.name}: what it was trained on cannot be told; say --pixels {choices}")
    if small and project.small_pixels:
        return project.small_pixels, f"assumed of {project.name}'s 3x3 stem; else say --pixels"
    return project.pixels, project.why


def _head(tensors: dict[str, Tensor], feature_dim: int) -> dict[str, str]:
    """Key -> name in `ProjectionHead`, if all of lightly's or SimCLRv2-Pytorch's head fits and its last bias does nothing."""
    matches = {key: re.search(r"(?:^|\.)(?:projection_head|head)\.layers\.(\d+\.\w+)$", key) for key in tensors}
    names = {key: match[1] for key, match in matches.items() if match}
    by_name = {name: tensors[key] for key, name in names.items()}
    dense = [name for name, value in by_name.items() if value.ndim == 2]
    if not dense:
        return {}
    last = max(dense, key=lambda name: int(name.split(".")[0]))
    with torch.device("meta"):
        wanted = ProjectionHead(feature_dim, len(by_name[last]), len(dense)).state_dict()
    rest = [name for name in by_name if name not in wanted]
    fits = all(name in by_name and by_name[name].shape == value.shape for name, value in wanted.items())
    if not fits or any(not name.endswith(".bias") or by_name[name].any() for name in rest):
        return {}
    return {key: name for key, name in names.items() if name in wanted}


def _frame(size_px: int) -> Preprocess:
    """The projects' evaluation: 256 -> 224 or 0.875 of the side; pictures as small as CIFAR's and STL-10's whole."""
    crop = 0.875 if size_px > 96 else 1.0
    return Preprocess(height_px=size_px, width_px=size_px, resize="center_crop", crop=crop, resample="bicubic", jpeg="full")
