"""The shape bias of an encoder with a linear head over ImageNet's classes, as `simclr evaluate` prints it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from serve.classify import Head
from serve.contract import Manifest, Preprocess
from serve.encoder import Encoder
from serve.errors import SourceError
from serve.literature import compare, comparison_lines, network_of
from serve.samples import Unreadable
from serve.shape_bias.classes import columns_of, decide
from serve.shape_bias.cue_conflict import Stimulus, differences, read_stimuli
from serve.shape_bias.tally import tally
from serve.sources import read_batches

REFERENCES = {(2, "resnet50", width, False): value for width, value in {1: 38.9, 2: 41.7, 4: 40.7}.items()}
SOURCE = "Geirhos et al. 2020, the official SimCLR weights with their own linear layer"
SIZE_PX = 224


def evaluate(encoder: Encoder, head: Head, source: str) -> dict[str, Any]:
    """Shape bias of an encoder with a head over ImageNet's 1000 classes. Returns plain JSON, which `report_lines` words.

    Raises: ContractError (EncoderMismatch) if the head is another's or not ImageNet's, SourceError.
    """
    head.require(encoder.encoder_id)
    columns = columns_of(head.classes)
    stimuli = read_stimuli(source)
    findings = differences(stimuli)
    preprocess = whole_picture(encoder.manifest)
    if (preprocess.height_px, preprocess.width_px) != (SIZE_PX, SIZE_PX):
        findings.append(f"an encoder for {preprocess.height_px}x{preprocess.width_px} px, not {SIZE_PX}x{SIZE_PX}")
    seen, decisions, unreadable = classify(encoder, head, columns, stimuli, preprocess)
    report = {
        "protocol": "shape-bias",
        "encoder_id": encoder.encoder_id,
        "preprocess": preprocess.model_dump(),
        "unreadable": len(unreadable),
        **tally(seen, decisions),
    }
    return report | compare(report["shape_bias"], REFERENCES.get(network_of(encoder.manifest)), SOURCE, findings)


def whole_picture(manifest: Manifest) -> Preprocess:
    """The encoder's frame without its crop: the pictures are shown as they are, 224 px on both sides."""
    return manifest.preprocess.model_copy(update={"crop": 1.0})


def classify(
    encoder: Encoder, head: Head, columns: dict[str, list[int]], stimuli: Sequence[Stimulus], preprocess: Preprocess
) -> tuple[list[Stimulus], list[str], list[Unreadable]]:
    """The pictures that could be read, the class decided on for each, and the others. Raises: SourceError if none can be."""
    by_source = {stimulus.sample.source: stimulus for stimulus in stimuli}
    seen: list[Stimulus] = []
    decisions: list[str] = []
    unreadable: list[Unreadable] = []
    with tqdm(total=len(stimuli), desc="cue conflict", unit="img", dynamic_ncols=True) as bar:
        for good, pixels, bad in read_batches([stimulus.sample for stimulus in stimuli], preprocess):
            if good:
                decisions += decide(head.probabilities(encoder.embed(list(pixels))), columns)
            seen += [by_source[sample.source] for sample in good]
            unreadable += bad
            bar.update(len(good) + len(bad))
    if not seen:
        raise SourceError(f"none of {len(stimuli)} pictures can be read; the first: {unreadable[0].reason}")
    return seen, decisions, unreadable


def report_lines(report: dict[str, Any]) -> list[str]:
    """A report of `evaluate` in words."""
    conflicts, shape_hits, texture_hits = (report[key] for key in ("conflicts", "shape_hits", "texture_hits"))
    counts = f"{shape_hits} answers name the shape, {texture_hits} the texture, of {conflicts} conflicts"
    if report["shape_bias"] is None:
        first = f"no shape bias: {counts}"
    else:
        low, high = report["interval"]
        first = f"shape bias {report['shape_bias']:.2%} (95 % interval {low:.2%} to {high:.2%}): {counts}"
    alone = report["accuracy_without_conflict"]
    frame = report["preprocess"]
    return [
        first,
        f"of all {report['pictures']} pictures {report['shape_share']:.2%} by shape, {report['texture_share']:.2%} by texture"
        + (f"; right where both agree {alone:.2%}" if alone is not None else ""),
        f"pictures: whole, {frame['height_px']}x{frame['width_px']} px, {report['unreadable']} unreadable",
        *comparison_lines(report, "shape bias"),
    ]
