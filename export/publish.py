"""RUN -> graph -> parity -> model repository. Nothing is published unless every step before it held."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import onnx

from export.graph import check_graph, stamp, write_graph
from export.parity import measure_parity
from export.repository import Target, write_repository
from serve.classify import Head
from serve.contract import Manifest
from train.checkpoint import load_encoder


def publish(
    run: Path, repository: Path, *, name: str, head: Head | None, target: Target, pictures: Sequence[bytes] = ()
) -> tuple[Manifest, list[str]]:
    """Export a run into a Triton model repository; returns the manifest and the names of the models.

    `pictures` are added to the golden images of the parity check.
    Raises: ContractError, EncoderMismatch for a foreign head, ExportError beyond tolerance.
    """
    encoder, trained = load_encoder(run)
    if head is not None:
        head.require(trained.encoder_id)
    manifest = trained.model_copy(update={"name": name})
    with tempfile.TemporaryDirectory() as folder:
        graph = Path(folder) / "model.onnx"
        write_graph(encoder, manifest, graph)
        parity = measure_parity(encoder, graph, manifest, pictures)
        manifest = manifest.model_copy(update={"parity": parity})
        model = onnx.load(graph)
        stamp(model, manifest)
        onnx.save_model(model, graph)
        check_graph(graph, manifest)
        return manifest, write_repository(repository, graph=graph, manifest=manifest, head=head, target=target)
