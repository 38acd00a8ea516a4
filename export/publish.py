"""Encoder -> graph -> parity -> precision -> model repository. Nothing is published unless every step before it held."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray
from torch import nn

from export.graph import check_graph, stamp, write_graph
from export.parity import measure_parity
from export.precision import FLOORS, FOR_TENSORRT, sweep, to_fp16, to_int8
from export.repository import Target, write_repository
from export.retrieval import NEAREST, measure_retrieval
from serve.classify import Head
from serve.contract import Manifest, Retrieval
from serve.errors import ExportError
from serve.sources import open_source, read_batches
from train.checkpoint import CONFIG

Precision: TypeAlias = Literal["fp32", "fp16", "int8"]
CALIBRATE_MOST, MEASURE_MOST, PARITY_MOST = 256, 2000, 32


def publish(
    encoder: nn.Module,
    manifest: Manifest,
    repository: Path,
    *,
    name: str,
    head: Head | None,
    target: Target,
    tensorrt: bool = False,
    dali: bool = False,
    precision: Precision = "fp32",
    images: str | None = None,
    accept_loss: bool = False,
    pictures: Sequence[bytes] = (),
    changed: Callable[[list[str]], None] = lambda _: None,
) -> tuple[Manifest, list[str]]:
    """Export an encoder into a Triton model repository; returns the manifest and the names of the models.

    Args: encoder and manifest, as `load_encoder` and `load_module` give them; tensorrt, dali and changed, as in
    `write_repository`; images, pictures that calibrate int8 and measure what fp16 and int8 cost a search, which need them;
    accept_loss, publish below the floor of recall too; pictures, encoded, added to the golden images of the parity check.
    Raises: SourceError, EncoderMismatch for a foreign head, ExportError beyond tolerance or below the floor.
    """
    if precision != "fp32" and images is None:
        raise ValueError(f"precision is {precision}, images is None; wanted pictures to measure it on")
    if head is not None:
        head.require(manifest.encoder_id)
    manifest = manifest.model_copy(update={"name": name})
    with tempfile.TemporaryDirectory() as folder:
        graph = Path(folder) / "fp32.onnx"
        write_graph(encoder, manifest, graph)
        manifest = manifest.model_copy(update={"parity": measure_parity(encoder, graph, manifest, pictures)})
        if precision != "fp32":
            assert images is not None
            calibration, measured, labels = _pixels(images, manifest)
            reference, graph = graph, graph.with_name(f"{precision}.onnx")
            manifest = _converted(reference, graph, manifest, precision, target, calibration)
            familiar = calibration[:PARITY_MOST] if precision == "int8" else None
            parity = measure_parity(encoder, graph, manifest, pictures, images=familiar)
            retrieval = measure_retrieval(graph, reference, manifest, measured, labels=labels, head=head)
            manifest = manifest.model_copy(update={"parity": parity, "retrieval": retrieval})
            _require_floor(manifest, accept_loss=accept_loss)
        model = onnx.load(graph)
        stamp(model, manifest)
        onnx.save_model(model, graph)
        check_graph(graph, manifest)
        if head is not None:
            head = replace(head, encoder_id=manifest.encoder_id)
        return manifest, write_repository(
            repository, graph=graph, manifest=manifest, head=head, target=target, tensorrt=tensorrt, dali=dali, changed=changed
        )


def report_lines(manifest: Manifest) -> list[str]:
    """What a person wants to know of a publication, float32's figures in brackets."""
    assert manifest.parity is not None
    error, images = manifest.parity.max_abs_error, manifest.parity.images
    lines = [f"encoder {manifest.encoder_id}, parity: largest error {error:.2g} on {images} images"]
    if (found := manifest.retrieval) is None:
        return lines
    if "int8" in manifest.training:
        lines.append(f"int8: {manifest.training['int8']}, calibrated on {manifest.training['calibration_pictures']} pictures")
    size, size_fp32 = found.size_bytes / 1e6, found.size_bytes_fp32 / 1e6
    lines += [
        f"{manifest.precision} on {found.pictures} pictures, float32 in brackets:",
        f"  recall@10      {found.recall_at_10:.1%} in the float32 gallery; {found.overlap_at_10:.1%} in its own",
        f"  cosine         {found.mean_cosine:.5f} on average, {found.min_cosine:.5f} at worst",
        f"  size           {size:.1f} MB ({size_fp32:.1f})",
        f"  speed          {found.images_per_s:.0f} img/s ({found.images_per_s_fp32:.0f}) in ONNX Runtime on this CPU",
    ]
    if found.knn_accuracy is not None:
        lines.append(f"  kNN accuracy   {found.knn_accuracy:.1%} ({found.knn_accuracy_fp32:.1%})")
    if found.head_agreement is not None:
        lines.append(f"  same class     {found.head_agreement:.1%} of the pictures by the head")
    return lines


def _converted(
    graph: Path, out: Path, manifest: Manifest, precision: Precision, target: Target, calibration: NDArray[np.uint8]
) -> Manifest:
    """Write the graph in another precision; its manifest is that of another encoder."""
    manifest = _as_precision(manifest, precision, {})
    training: dict[str, Any] = {}
    if precision == "fp16":
        to_fp16(graph, manifest, out)
    elif target == "gpu":
        to_int8(graph, manifest, out, calibration, FOR_TENSORRT)
        training = {"int8": str(FOR_TENSORRT), "calibration_pictures": len(calibration)}
    else:
        how, tried = sweep(graph, manifest, out, calibration)
        training = {"int8": str(how), "int8_tried": tried, "calibration_pictures": len(calibration)}
    return _as_precision(manifest, precision, training, graph_digest(out))


def graph_digest(graph: Path) -> str:
    """SHA-256 of what a graph computes: nodes and weights, without names of files, tools and metadata."""
    content = onnx.load(graph).graph
    parts = [node.SerializeToString(deterministic=True) for node in content.node]
    parts += sorted(tensor.SerializeToString(deterministic=True) for tensor in content.initializer)
    return hashlib.sha256(b"".join(parts)).hexdigest()


def _as_precision(manifest: Manifest, precision: Precision, training: dict[str, Any], digest: str | None = None) -> Manifest:
    """The same encoder in another precision is another encoder: its vectors differ."""
    fields = dict(manifest) | {"precision": precision, "training": manifest.training | training}
    fields["weights_sha256"] = digest or manifest.weights_sha256
    for derived in ("schema_version", "encoder_id"):
        del fields[derived]
    return Manifest.create(**fields)


def training_images(run: Path) -> str:
    """Where a run's training pictures are. Raises: ExportError."""
    try:
        source = json.loads((run / CONFIG).read_text(encoding="utf-8"))["images"]
    except (OSError, ValueError, KeyError) as error:
        raise ExportError(f"{run}: does not say which pictures it was trained on; give some with --images SRC") from error
    return str(source)


def _pixels(source: str, manifest: Manifest) -> tuple[NDArray[np.uint8], NDArray[np.uint8], list[str | None]]:
    """Pictures to calibrate on; others, where there are enough, to measure on, and their labels."""
    images = open_source(source)
    samples = images.everything
    most = min(len(samples), CALIBRATE_MOST + MEASURE_MOST)
    rows = np.random.default_rng(0).permutation(len(samples))[:most]
    pixels, kept = [], []
    for good, batch, _ in read_batches([samples[row] for row in rows], manifest.preprocess):
        pixels.append(batch)
        kept += good
    prepared = np.concatenate(pixels) if pixels else np.empty((0, 0, 0, 3), np.uint8)
    if len(kept) <= NEAREST + 1:
        raise ExportError(f"{source}: {len(kept)} readable pictures, wanted a few hundred to calibrate and measure on")
    half = min(CALIBRATE_MOST, len(kept) // 2)
    apart = half if len(kept) - half >= 10 * NEAREST else 0  # a handful is used for both
    return prepared[:half], prepared[apart:], [sample.label for sample in kept[apart:]]


def _require_floor(manifest: Manifest, *, accept_loss: bool) -> None:
    found: Retrieval | None = manifest.retrieval
    assert found is not None
    floor = FLOORS[manifest.precision]
    if not found.recall_at_10 >= floor and not accept_loss:
        raise ExportError(
            f"{manifest.precision} finds {found.recall_at_10:.1%} of float32's ten nearest, wanted {floor:.0%}; nothing was "
            "published. Give more pictures of the kind to be searched with --images, another --precision, or --accept-loss"
        )
