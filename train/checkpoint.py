"""What a run leaves on disk: a checkpoint to go on from, and the encoder to export. Files appear whole or not at all.

RUN/config.json, checkpoint.pt, encoder.safetensors + encoder.json, metrics.jsonl, contact_sheet.png, tensorboard/
"""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import torch
from pydantic import JsonValue
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from serve.contract import Manifest, Preprocess, TensorSpec, file_sha256
from serve.errors import ContractError, TrainingError, first_line
from serve.files import atomic_path
from train.encoder import Encoder

CHECKPOINT, WEIGHTS, CARD, CONFIG, METRICS, CONTACT_SHEET = (
    "checkpoint.pt",
    "encoder.safetensors",
    "encoder.json",
    "config.json",
    "metrics.jsonl",
    "contact_sheet.png",
)
MAY_DIFFER = frozenset({"images", "run", "preset"})
"""Facts that say nothing that other facts do not say: the list of pictures has a digest of its own."""
HINTS = {
    "streamed": "give --workers 0 for pictures in memory, 1 or more for streamed ones",
    "sources_sha256": "the list of pictures is another one: other files, or --images written in another way",
    "tracks_sha256": "the pictures' tracks are others",
}


def save_checkpoint(run: Path, state: dict[str, Any]) -> None:
    """Write RUN/checkpoint.pt. Raises: OSError, and then the former checkpoint is still there."""
    with atomic_path(run / CHECKPOINT) as path:
        try:
            torch.save(state, path)
        except RuntimeError as error:  # torch's own file writer reports a full disk this way
            raise OSError(f"{run / CHECKPOINT}: cannot be written ({first_line(error)}); is the disk full?") from error


def load_checkpoint(run: Path) -> dict[str, Any]:
    """Read RUN/checkpoint.pt without unpickling code. Raises: TrainingError."""
    path = run / CHECKPOINT
    if not path.exists():
        raise TrainingError(f"{run}: no checkpoint to resume; start it without --resume")
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as error:
        raise TrainingError(f"{path}: truncated or not a checkpoint ({first_line(error)}); start a new --run") from error
    if not isinstance(state, dict) or not {"step", "model", "optimizer", "facts"} <= state.keys():
        raise TrainingError(f"{path}: not a checkpoint of simclr pretrain; start a new --run")
    return state


def refuse_to_overwrite(run: Path, *, resume: bool) -> None:
    """Raises: TrainingError if another run would be written over."""
    if not resume and any((run / name).exists() for name in (CHECKPOINT, CARD)):
        raise TrainingError(f"{run}: already holds a run; add --resume to go on with it, or choose another --run")


def refuse_other_settings(run: Path, recorded: dict[str, Any], facts: dict[str, Any]) -> None:
    """Raises: TrainingError if the run to resume was started with other facts than these."""
    different = [name for name, value in facts.items() if name not in MAY_DIFFER and recorded.get(name) != value]
    if different:
        was = ", ".join(f"{name} {recorded.get(name)!r} -> {facts[name]!r}" for name in different[:3])
        hints = [HINTS[name] for name in different if name in HINTS] or [f"resume with its own settings, in {CONFIG}"]
        raise TrainingError(f"{run}: the run was started differently ({was}); {'; '.join(hints)}")


def write_config(run: Path, config: dict[str, JsonValue]) -> None:
    """Write RUN/config.json."""
    with atomic_path(run / CONFIG) as path:
        path.write_text(json.dumps(config, indent=2) + "\n")


def save_encoder(run: Path, encoder: Encoder, preprocess: Preprocess, training: dict[str, JsonValue]) -> Manifest:
    """Write RUN/encoder.safetensors and its card RUN/encoder.json, which gets the network's facts besides `training`."""
    with atomic_path(run / WEIGHTS) as path:
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in encoder.state_dict().items()}
        try:
            save_file(state, path, _extras(encoder))
        except SafetensorError as error:
            raise OSError(f"{run / WEIGHTS}: cannot be written ({error}); is the disk full?") from error
    manifest = Manifest.create(
        name=run.name,
        embedding_dim=encoder.feature_dim,
        input=TensorSpec(name="image", shape=(preprocess.height_px, preprocess.width_px, 3), dtype="uint8"),
        output=TensorSpec(name="embedding", shape=(encoder.feature_dim,), dtype="float32"),
        preprocess=preprocess,
        metric="cosine",
        precision="fp32",
        weights_sha256=file_sha256(run / WEIGHTS),
        parity=None,
        retrieval=None,
        training=training | encoder.facts,
    )
    with atomic_path(run / CARD) as path:
        path.write_text(manifest.model_dump_json(indent=2) + "\n")
    return manifest


def is_finished(run: Path) -> bool:
    """Whether a pretraining has made all its steps. Raises: ContractError."""
    if not (run / CARD).exists():
        return False
    training = Manifest.read(run / CARD).training
    return training["steps"] == training["total_steps"]


def load_encoder(run: Path) -> tuple[Encoder, Manifest]:
    """The encoder of a run, in evaluation mode, and its card. Raises: ContractError."""
    if not (run / CARD).exists():
        raise ContractError(f"{run}: holds no {CARD}; wanted the --run folder of a finished `simclr pretrain`")
    manifest = Manifest.read(run / CARD)
    try:
        if file_sha256(run / WEIGHTS) != manifest.weights_sha256:
            raise ContractError(f"{run}: {WEIGHTS} is not the file that {CARD} describes; resume the run to write both again")
        training: dict[str, Any] = manifest.training
        encoder = Encoder.from_facts(training)
        encoder.load_state_dict(load_file(run / WEIGHTS))
        with safe_open(run / WEIGHTS, "pt") as file:
            if file.metadata() != _extras(encoder):
                raise ContractError(f"{run}: {WEIGHTS} and {CARD} say different pixels or borders; write both again")
    except (OSError, SafetensorError, KeyError, RuntimeError, ValueError) as error:
        raise ContractError(f"{run}: {WEIGHTS} does not fit {CARD} ({first_line(error)})") from error
    return encoder.eval(), manifest


def _extras(encoder: Encoder) -> dict[str, str] | None:
    """What changes the vectors but not the weights goes into the weights' file, because its digest makes the encoder_id.

    One entry: safetensors writes several in any order.
    """
    return {"encoder": json.dumps(encoder.extras, sort_keys=True)} if encoder.extras else None
