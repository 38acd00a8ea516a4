"""Linear heads: a softmax layer over the vectors of one encoder, stored as plain arrays."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from serve.errors import ContractError, EncoderMismatch
from serve.files import atomic_path


@dataclass(frozen=True, eq=False, kw_only=True)
class Head:
    """softmax(vectors @ weight.T + bias) over named classes. Raises: ValueError if the parts do not fit together."""

    weight: NDArray[np.float32]
    """(C, D)"""
    bias: NDArray[np.float32]
    """(C,)"""
    classes: tuple[str, ...]
    encoder_id: str
    """Whose vectors it was fitted on; it means nothing on others."""
    abstain_below: float = 0.0
    """A picture whose likeliest class is less likely than this is uncertain."""
    report: dict[str, Any] = field(default_factory=dict)
    """How it was fitted and scored."""

    def __post_init__(self) -> None:
        weight, bias, count = self.weight, self.bias, len(self.classes)
        shapes = f"weight {weight.dtype}{weight.shape}, bias {bias.dtype}{bias.shape}, {count} classes"
        if weight.ndim != 2 or len(weight) != count or bias.shape != (count,) or count == 0:
            raise ValueError(f"{shapes}: wanted weight (C, D), bias (C,) and C classes")
        if weight.dtype != np.float32 or bias.dtype != np.float32:
            raise ValueError(f"{shapes}: wanted float32")
        if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
            raise ValueError("weight or bias holds numbers that are not finite")
        if len(set(self.classes)) != count:
            raise ValueError("two classes have the same name")
        if not 0 <= self.abstain_below <= 1:
            raise ValueError(f"abstains below {self.abstain_below}, wanted 0 to 1")

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read HEAD.npz; nothing in it is ever unpickled. Raises: ContractError."""
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return cls(
                    weight=arrays["weight"],
                    bias=arrays["bias"],
                    classes=tuple(map(str, arrays["classes"])),
                    encoder_id=str(arrays["encoder_id"]),
                    abstain_below=float(arrays.get("abstain_below", 0.0)),  # earlier heads always decide
                    report=json.loads(str(arrays["report"])),
                )
        except OSError as error:
            raise ContractError(
                f"{path}: cannot be read ({error.strerror or error}); give a file of `simclr fit-head`"
            ) from error
        except Exception as error:  # on damaged bytes zipfile and numpy raise a dozen unrelated types
            reason = next(iter(str(error).strip("\"'").splitlines()), type(error).__name__)
            raise ContractError(f"{path}: not a head ({reason}); give a file written by `simclr fit-head`") from error

    def save(self, path: Path) -> None:
        """Write HEAD.npz, whole or not at all."""
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            np.savez(
                file,
                weight=self.weight,
                bias=self.bias,
                classes=np.array(self.classes, dtype=np.str_),
                encoder_id=np.array(self.encoder_id, dtype=np.str_),
                abstain_below=np.array(self.abstain_below),
                report=np.array(json.dumps(self.report), dtype=np.str_),
            )

    def probabilities(self, vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        """(N, D) unit vectors -> (N, C), rows sum to 1."""
        if vectors.ndim != 2 or vectors.shape[1] != self.weight.shape[1]:
            raise ValueError(f"vectors are {vectors.shape}, the head wants (N, {self.weight.shape[1]})")
        logits = vectors @ self.weight.T + self.bias
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))  # the largest exponent is 0: nothing overflows
        return np.asarray(powers / powers.sum(axis=1, keepdims=True), dtype=np.float32)

    def decide(self, probability_C: NDArray[np.float32]) -> str | None:
        """The likeliest class, or None: uncertain."""
        likeliest = int(probability_C.argmax())
        return self.classes[likeliest] if probability_C[likeliest] >= self.abstain_below else None

    def require(self, encoder_id: str) -> None:
        """Refuse another encoder's vectors. Raises: EncoderMismatch."""
        if encoder_id != self.encoder_id:
            raise EncoderMismatch(
                f"the head was fitted on vectors of encoder {self.encoder_id}, the encoder here is {encoder_id}; "
                "fit it again: simclr fit-head --encoder ENC --images SRC --out HEAD.npz"
            )


def load_heads(paths: Iterable[Path]) -> dict[str, Head]:
    """Several heads by the names of their files, without `.npz`. Raises: ContractError, also where two have one name."""
    heads: dict[str, Head] = {}
    for path in paths:
        if path.stem in heads:
            raise ContractError(f"{path}: there is a head named {path.stem} already; rename one of the two files")
        heads[path.stem] = Head.load(path)
    return heads
