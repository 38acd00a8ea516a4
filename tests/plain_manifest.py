"""The manifest of an encoder that a test makes up."""

from typing import Any

from serve.contract import Manifest, Preprocess, TensorSpec


def plain_manifest(name: str, dim: int, frame: Preprocess, *, seed: int = 0, **changes: Any) -> Manifest:
    """Another seed is another encoder."""
    fields = {
        "name": name,
        "embedding_dim": dim,
        "input": TensorSpec(name="image", shape=(frame.height_px, frame.width_px, 3), dtype="uint8"),
        "output": TensorSpec(name="embedding", shape=(dim,), dtype="float32"),
        "preprocess": frame,
        "metric": "cosine",
        "precision": "fp32",
        "weights_sha256": f"{seed:064d}",
        "parity": None,
        "retrieval": None,
        "training": {},
    }
    return Manifest.create(**fields | changes)
