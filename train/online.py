"""What the encoder has learned so far, measured while it trains: kNN and a linear probe where there are labels, and the
pictures and vectors of a contact sheet always.

None of it reaches the training: features are detached, no random number is drawn, batch norms are left as they were.
Shapes: b pictures of a step, so 2b views, D feature dimensions, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from serve.contract import Preprocess
from serve.samples import ImageSet, Sample
from train.data import load_pixels, spread
from train.encoder import Encoder
from train.probe import embed_pixels, groups_of, knn_accuracy, split_for_scoring

MOST_BANK, MOST_QUERIES, MOST_UNLABELLED = 5000, 1000, 1000
UNLABELLED = -1
PROGRESS = "reading those to look at"
PROBE_RATE = 8.0
"""Of the probe, over D: the standardised features of D dimensions have a variance of D in all, which bounds a stable rate.
From a third to three times as much gave the same accuracy (CIFAR-10, ResNet-18 x0.5, 150 steps)."""


class OnlineProbe:
    """A linear classifier trained beside the encoder, on features that pass no gradient back (tf2/run.py, `supervised_head`).

    Features grow and shrink during training, so the probe takes their directions, standardised by a batch norm without
    parameters; a plain SGD with Nesterov momentum then fits every encoder. Pictures that score it (those held back where
    there is no test split) never teach it.
    """

    def __init__(self, images: ImageSet, feature_dim: int, device: torch.device) -> None:
        taught, _ = split_for_scoring(images)
        self.classes = tuple(sorted(set(groups_of(taught))))
        self._number = {name: index for index, name in enumerate(self.classes)}
        self._taught = {sample.source for sample in taught}
        self._norm = nn.BatchNorm1d(feature_dim, affine=False, device=device)
        self._weight_CD = torch.zeros(len(self.classes), feature_dim, device=device, requires_grad=True)
        self._bias_C = torch.zeros(len(self.classes), device=device, requires_grad=True)
        self._optimizer = torch.optim.SGD(
            [self._weight_CD, self._bias_C], lr=PROBE_RATE / feature_dim, momentum=0.9, nesterov=True
        )

    def targets(self, samples: Sequence[Sample]) -> Tensor:
        """Class number of each sample (N,), -1 for those that do not teach."""
        numbers = [self._number[str(sample.group)] if sample.source in self._taught else UNLABELLED for sample in samples]
        return torch.tensor(numbers, dtype=torch.int64)

    @torch.enable_grad()
    def learn(self, features_2bD: Tensor, targets_b: Tensor) -> dict[str, float]:
        """One step on both views of the labelled pictures; their cross entropy and accuracy before it, {} without any.

        Args: targets_b: rows of `targets`, of the pictures whose views are rows i and i + b.
        """
        labelled = torch.cat([targets_b, targets_b]) != UNLABELLED
        if labelled.sum() < 2:  # one vector has no variance to be standardised by
            return {}
        wanted = torch.cat([targets_b, targets_b])[labelled].to(features_2bD.device)
        logits = self._logits(features_2bD.detach()[labelled.to(features_2bD.device)])
        loss = F.cross_entropy(logits, wanted)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._optimizer.step()
        return {"probe_loss": loss.item(), "probe_train_accuracy": (logits.argmax(1) == wanted).float().mean().item()}

    @torch.no_grad()
    def accuracy(self, vectors: NDArray[np.float32], groups: Sequence[str]) -> float:
        """Share of vectors whose likeliest class is their group."""
        self._norm.eval()
        chosen: list[int] = self._logits(torch.from_numpy(vectors).to(self._weight_CD.device)).argmax(1).tolist()
        self._norm.train()
        return sum(self.classes[index] == group for index, group in zip(chosen, groups, strict=True)) / len(groups)

    def _logits(self, features_ND: Tensor) -> Tensor:
        with torch.autocast(features_ND.device.type, enabled=False):
            logits: Tensor = F.linear(self._norm(F.normalize(features_ND.float(), dim=1)), self._weight_CD, self._bias_C)
        return logits

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on bit for bit; tensors and plain values."""
        return {
            "weight": self._weight_CD.detach(),
            "bias": self._bias_C.detach(),
            "norm": self._norm.state_dict(),
            "optimizer": self._optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`. Raises: RuntimeError if it is of other classes or another encoder."""
        with torch.no_grad():
            for own, saved in ((self._weight_CD, state["weight"]), (self._bias_C, state["bias"])):
                if own.shape != saved.shape:
                    raise RuntimeError(f"the saved probe is {tuple(saved.shape)}, wanted {tuple(own.shape)}")
                own.copy_(saved)
        self._norm.load_state_dict(state["norm"])
        self._optimizer.load_state_dict(state["optimizer"])


@dataclass(frozen=True)
class OnlineSet:
    """Pictures that are looked at now and then, prepared as serving prepares them: a bank, and queries where there are labels.

    `images` of the bank (N, 3, H, W) and the vectors that `measure` returns make a contact sheet.
    """

    images: Tensor
    groups: tuple[str, ...]
    queries: Tensor
    query_groups: tuple[str, ...]

    @classmethod
    def from_samples(cls, images: ImageSet, preprocess: Preprocess) -> OnlineSet:
        """Decode up to 5,000 labelled pictures and 1,000 queries, or else 1,000 training pictures. Raises: SourceError."""
        bank, queries = split_for_scoring(images)
        if not bank or not queries:
            pixels = load_pixels(spread(images.train, MOST_UNLABELLED), preprocess, progress=PROGRESS)
            return cls(pixels.images, (), torch.empty(0, 3, 1, 1, dtype=torch.uint8), ())
        banked, asked = (
            load_pixels(spread(bank, MOST_BANK), preprocess, progress=PROGRESS),
            load_pixels(spread(queries, MOST_QUERIES), preprocess, progress=PROGRESS),
        )
        return cls(banked.images, groups_of(banked.samples), asked.images, groups_of(asked.samples))

    @property
    def has_labels(self) -> bool:
        """Whether accuracies can be measured."""
        return bool(self.query_groups)

    def measure(
        self, encoder: Encoder, device: torch.device, probe: OnlineProbe | None = None
    ) -> tuple[dict[str, float], NDArray[np.float32]]:
        """Shares in [0, 1], `knn_accuracy` and (with a probe) `probe_accuracy`, {} without labels; vectors of `images` (N, D).

        The encoder is left in the mode it was in.
        """
        training = encoder.training
        bank_ND = embed_pixels(encoder, self.images, device)
        metrics = {}
        if self.has_labels:
            queries_QD = embed_pixels(encoder, self.queries, device)
            metrics["knn_accuracy"] = knn_accuracy(bank_ND, self.groups, queries_QD, self.query_groups)
            if probe is not None:
                metrics["probe_accuracy"] = probe.accuracy(queries_QD, self.query_groups)
        encoder.train(training)
        return metrics, bank_ND
