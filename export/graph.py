"""An encoder as one ONNX graph: uint8 NHWC -> scale, mean and std -> encoder -> L2 norm, the manifest within."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import onnx
import torch
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from torch import nn

from serve.contract import METADATA_KEY, Manifest
from serve.errors import ExportError
from train.encoder import UnitEncoder

OPSET, MAX_OPSET, MAX_IR_VERSION = 18, 20, 10
"""What every Triton since 24.10 loads (its ONNX Runtime 1.19 reads IR 10 and opset 21)."""
MAX_BYTES = 2**31 - 1
"""What protobuf puts into one message, and so into one file."""


def write_graph(encoder: nn.Module, manifest: Manifest, path: Path) -> None:
    """Export to one file that `check_graph` has passed. Raises: ExportError.

    Args: encoder, float images in [0, 1] (B, 3, H, W) -> features (B, D); the pixels' scale and the L2 norm are put around it.
    """
    weight_bytes = sum(tensor.nbytes for tensor in (*encoder.parameters(), *encoder.buffers()))
    if weight_bytes > MAX_BYTES:  # rather now than after minutes of tracing
        raise ExportError(f"the weights are {_too_large(weight_bytes)}; export a narrower network")
    model = _traced(UnitEncoder(encoder).eval(), manifest)
    stamp(model, manifest)
    onnx.save_model(model, path)
    check_graph(path, manifest)


def _traced(network: nn.Module, manifest: Manifest) -> onnx.ModelProto:
    height, width, _ = manifest.input.shape
    example = torch.zeros(2, height, width, 3, dtype=torch.uint8)  # a batch of 1 would be baked in as a constant
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        try:
            program = torch.onnx.export(
                network,
                (example,),
                input_names=[manifest.input.name],
                output_names=[manifest.output.name],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                opset_version=OPSET,
                dynamo=True,
                external_data=False,
                verbose=False,
            )
        except Exception as error:  # of any type: what a module does wrong under the tracer is its own affair
            raise ExportError(f"torch cannot export the network with a free batch size ({reason(error)})") from error
    assert program is not None
    return program.model_proto


def stamp(model: onnx.ModelProto, manifest: Manifest) -> None:
    """Put the manifest into the graph's metadata, in place of a former one."""
    kept = {entry.key: entry.value for entry in model.metadata_props if entry.key != METADATA_KEY}
    onnx.helper.set_model_props(model, kept | {METADATA_KEY: manifest.model_dump_json()})


def check_graph(path: Path, manifest: Manifest) -> None:
    """What every rewriting step must leave true. Raises: ExportError.

    One valid file that Triton loads, in ONNX's own operators, with the manifest's tensors and a free batch size.
    """
    if path.stat().st_size > MAX_BYTES:
        raise ExportError(f"{path}: {_too_large(path.stat().st_size)}; export a narrower network")
    try:
        model = onnx.load(path, load_external_data=False)
        _require_one_file(path, model)
        onnx.checker.check_model(path, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, DecodeError) as error:
        raise ExportError(f"{path}: not a valid ONNX graph ({reason(error)})") from error
    for fault in (*_version_faults(model), *_tensor_faults(model, manifest)):
        raise ExportError(f"{path}: {fault}")


def _require_one_file(path: Path, model: onnx.ModelProto) -> None:
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            raise ExportError(f"{path}: {tensor.name} lies in another file; wanted one file, which can be renamed and copied")


def _version_faults(model: onnx.ModelProto) -> Iterator[str]:
    opsets = {entry.domain or "ai.onnx": entry.version for entry in model.opset_import}
    opset = opsets.pop("ai.onnx", 0)
    if model.ir_version > MAX_IR_VERSION or not OPSET <= opset <= MAX_OPSET:
        yield (
            f"IR {model.ir_version}, opset {opset}; wanted IR <= {MAX_IR_VERSION} and opset {OPSET} to {MAX_OPSET} for Triton"
        )
    if opsets:
        yield f"uses the operators of {', '.join(sorted(opsets))}; wanted ONNX's own alone, which every runtime has"


def _tensor_faults(model: onnx.ModelProto, manifest: Manifest) -> Iterator[str]:
    values = (*model.graph.input, *model.graph.output)
    if (len(model.graph.input), len(model.graph.output)) != (1, 1):
        yield f"inputs and outputs are {', '.join(value.name for value in values)}; wanted one of each"
        return
    for value, spec in zip(values, (manifest.input, manifest.output), strict=True):
        tensor = value.type.tensor_type
        shape = [dim.dim_param or dim.dim_value for dim in tensor.shape.dim]
        kind = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
        free = bool(shape) and isinstance(shape[0], str)
        if (value.name, kind, *shape[1:]) != (spec.name, spec.dtype, *spec.shape) or not free:
            wanted = f"{spec.name} {spec.dtype} {['batch', *spec.shape]}"
            yield f"has {value.name} {kind} {shape}, wanted {wanted}"
    batches = [dim.dim_param for value in values for dim in value.type.tensor_type.shape.dim[:1]]
    if len(set(batches)) > 1:
        yield f"the batch is {batches[0]} at the input and {batches[1]} at the output; wanted the same"


def _too_large(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.3g} GB, more than the {MAX_BYTES / 1e9:.3g} GB that one ONNX file can hold"


def reason(error: BaseException) -> str:
    """Type and first line of what lies at the bottom of an error: exporters wrap it in pages of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
