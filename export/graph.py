"""A trained encoder as one ONNX graph: uint8 NHWC -> scale, mean and std -> encoder -> L2 norm, the manifest within."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from pathlib import Path

import onnx
import torch

from serve.contract import METADATA_KEY, Manifest
from serve.errors import ExportError
from train.encoder import Encoder, UnitEncoder

OPSET, MAX_IR_VERSION = 18, 10
"""What every Triton since 24.10 loads (its ONNX Runtime 1.19 reads IR 10 and opset 21)."""


def write_graph(encoder: Encoder, manifest: Manifest, path: Path) -> None:
    """Export to one file. Raises: ExportError if the batch dimension is not free or Triton could not load it."""
    height, width, _ = manifest.input.shape
    example = torch.zeros(2, height, width, 3, dtype=torch.uint8)  # a batch of 1 would be baked in as a constant
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.onnx.export(
            UnitEncoder(encoder).eval(),
            (example,),
            input_names=[manifest.input.name],
            output_names=[manifest.output.name],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            opset_version=OPSET,
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    stamp(model, manifest)
    onnx.save_model(model, path)
    check_graph(path, manifest)


def stamp(model: onnx.ModelProto, manifest: Manifest) -> None:
    """Put the manifest into the graph's metadata, in place of a former one."""
    kept = {entry.key: entry.value for entry in model.metadata_props if entry.key != METADATA_KEY}
    onnx.helper.set_model_props(model, kept | {METADATA_KEY: manifest.model_dump_json()})


def check_graph(path: Path, manifest: Manifest) -> None:
    """What every rewriting step must leave true. Raises: ExportError."""
    onnx.checker.check_model(path, full_check=True)
    model = onnx.load(path, load_external_data=False)
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    if model.ir_version > MAX_IR_VERSION or not 18 <= opset <= 20:
        raise ExportError(
            f"{path}: IR {model.ir_version}, opset {opset}; wanted IR <= {MAX_IR_VERSION} and opset 18 to 20 for Triton"
        )
    tensors = zip((*model.graph.input, *model.graph.output), (manifest.input, manifest.output), strict=True)
    for value, wanted in tensors:
        batch, *shape = value.type.tensor_type.shape.dim
        if value.name != wanted.name or not batch.dim_param or tuple(dim.dim_value for dim in shape) != wanted.shape:
            raise ExportError(
                f"{path}: {value.name} has shape {value.type.tensor_type.shape}, wanted ['batch', *{wanted.shape}]"
            )
