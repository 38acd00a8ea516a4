"""An encoder that somebody else wrote: any `torch.nn.Module`, named by its import path, and how its pictures are prepared.

`my_models:make_encoder` is looked for where Python looks, and in the current folder first. It runs the code that it names, as
an import does; nothing in the file of weights is run.
"""

from __future__ import annotations

import hashlib
import importlib
import operator
import sys
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import torch
from pydantic import Field, ValidationError
from torch import Tensor, nn

from export.graph import reason
from serve.contract import Manifest, Preprocess, TensorSpec
from serve.errors import ContractError, ExportError
from train.weights import read_tensors

ROW_TOLERANCE = 1e-4
"""How far a picture's features may differ in other company, as a share of the largest."""

_Mean: TypeAlias = Annotated[float, Field(ge=0, le=1)]
_Deviation: TypeAlias = Annotated[float, Field(gt=0, le=1)]


class PixelSpec(Preprocess):
    """What the file of `--preprocess` holds: a Preprocess, and what is taken off pixels in [0, 1] and divides them then."""

    mean: tuple[_Mean, _Mean, _Mean]
    std: tuple[_Deviation, _Deviation, _Deviation]


class ForeignEncoder(nn.Module):
    """Float images in [0, 1] (B, 3, H, W) -> features (B, D), as `train.encoder.Encoder`, by a network of whatever make."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, spec: PixelSpec) -> None:
        super().__init__()
        self.network = network
        for name, values in (("mean", spec.mean), ("std", spec.std)):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32).view(3, 1, 1))

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Features (B, D)."""
        return torch.flatten(self.raw(images_BCHW), 1)

    def raw(self, images_BCHW: Tensor) -> Any:  # noqa: ANN401 - what comes out is to be looked at
        """What the network itself gives for pixels as it wants them."""
        return self.network((images_BCHW - self.mean) / self.std)


def load_module(import_path: str, weights: Path | None, preprocess: Path) -> tuple[ForeignEncoder, Manifest]:
    """Import the module (an instance, or a class or function without arguments), and find out by running it what it gives.

    Args: import_path, `package.module:name`; weights, its state dict as safetensors or of torch.save; preprocess, a PixelSpec
    as JSON. The encoder_id is that of import path, weights and pixels; change one of them when you change the code.
    Returns: the encoder in evaluation mode and its card. Raises: ContractError for the files, ExportError for the module.
    """
    spec = _read_spec(preprocess)
    network = _imported(import_path)
    if weights is not None:
        _load_weights(network, import_path, weights)
    encoder = ForeignEncoder(network, spec).eval()
    dim = _feature_dim(encoder, import_path, spec)
    manifest = Manifest.create(
        name=import_path.rpartition(":")[2],
        embedding_dim=dim,
        input=TensorSpec(name="image", shape=(spec.height_px, spec.width_px, 3), dtype="uint8"),
        output=TensorSpec(name="embedding", shape=(dim,), dtype="float32"),
        preprocess=Preprocess(**spec.model_dump(exclude={"mean", "std"})),
        metric="cosine",
        precision="fp32",
        weights_sha256=_digest(encoder, import_path),
        parity=None,
        retrieval=None,
        training={
            "module": import_path,
            "weights": weights and weights.name,
            "mean": list(spec.mean),
            "std": list(spec.std),
        },
    )
    return encoder, manifest


def _read_spec(path: Path) -> PixelSpec:
    try:
        return PixelSpec.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        fields = ", ".join(PixelSpec.model_fields)
        raise ContractError(
            f"{path}: {where}: {first['msg']}; wanted JSON with {fields}, mean and std of pixels in [0, 1]"
        ) from error


def _imported(import_path: str) -> nn.Module:
    module_name, colon, name = import_path.partition(":")
    if not (module_name and colon and name):
        raise ExportError(f"--module is {import_path!r}, wanted package.module:name of a torch.nn.Module or what makes one")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)  # a console script does not look there
    try:
        module = importlib.import_module(module_name)
        found = operator.attrgetter(name)(module)
        made = found if isinstance(found, nn.Module) or not callable(found) else found()
        if isinstance(made, nn.Module):
            made.cpu().float()  # in place
    except (Exception, SystemExit) as error:  # of any type: it is the user's code
        raise ExportError(f"{import_path}: cannot be imported or made without arguments ({reason(error)})") from error
    if not isinstance(made, nn.Module):
        raise ExportError(f"{import_path}: is {_kind(made)}, wanted a torch.nn.Module, or a class or function that makes one")
    return made


def _load_weights(network: nn.Module, import_path: str, weights: Path) -> None:
    tensors = read_tensors(weights)
    wanted = network.state_dict()
    lacking, beyond = [name for name in wanted if name not in tensors], [name for name in tensors if name not in wanted]
    if lacking or beyond:
        complaints = [f"{what} {_some(names)}" for what, names in (("lacks", lacking), ("has besides", beyond)) if names]
        raise ContractError(
            f"{weights}: {' and '.join(complaints)}; wanted the state dict of {import_path}, {len(wanted)} tensors, alone"
        )
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        details = " ".join(str(error).split())
        raise ContractError(f"{weights}: does not fit {import_path} ({details[:300]})") from error


def _feature_dim(encoder: ForeignEncoder, import_path: str, spec: PixelSpec) -> int:
    """D, from a batch of two. Raises: ExportError unless each picture has features of its own, the same in any company."""
    pair = torch.rand(2, 3, spec.height_px, spec.width_px, generator=torch.Generator().manual_seed(0))
    together = _run(encoder, import_path, pair)
    alone = torch.cat([_run(encoder, import_path, picture) for picture in pair.split(1)])
    if not together.isfinite().all() or not alone.isfinite().all():
        raise ExportError(f"{import_path}: gives NaN or infinity for pictures of random pixels; are its weights whole?")
    difference = float((together - alone).abs().max() / together.abs().max().clamp_min(1e-12))
    if difference > ROW_TOLERANCE:
        raise ExportError(
            f"{import_path}: a picture's features differ by {difference:.2g} of the largest beside another one; wanted them "
            "to be the picture's alone: no batch norm of the batch's statistics, no dropout"
        )
    return together.shape[1]


def _run(encoder: ForeignEncoder, import_path: str, images_BCHW: Tensor) -> Tensor:
    shape = tuple(images_BCHW.shape)
    try:
        with torch.no_grad():
            features = encoder.raw(images_BCHW)
    except Exception as error:  # of any type: it is the user's code
        raise ExportError(f"{import_path}: fails on float pictures {shape} ({reason(error)})") from error
    if not isinstance(features, Tensor) or not features.is_floating_point():
        raise ExportError(f"{import_path}: gives {_kind(features)}, wanted a float tensor (B, D) or (B, D, 1, 1)")
    if features.ndim not in (2, 4) or len(features) != len(images_BCHW) or features.shape[2:].numel() != 1:
        raise ExportError(
            f"{import_path}: gives {tuple(features.shape)} for pictures {shape}, wanted (B, D) or (B, D, 1, 1); "
            "pool in a module around it"
        )
    return features.flatten(1)


def _digest(encoder: ForeignEncoder, import_path: str) -> str:
    """SHA-256 over parameters and buffers, the pixels' mean and std among them, and the import path: weights are not all."""
    digest = hashlib.sha256(import_path.encode())
    tensors = dict(encoder.named_parameters()) | dict(encoder.named_buffers())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _kind(value: object) -> str:
    return f"a tensor of {value.dtype}" if isinstance(value, Tensor) else f"a value of type {type(value).__name__}"
