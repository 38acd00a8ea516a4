"""What an encoder has learned: weighted kNN and a linear head on frozen features.

Shapes: N bank pictures, Q queries, D dimensions, C classes. Vectors are unit vectors.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from serve.bulk import embed_samples
from serve.classify import Head
from serve.encoder import Encoder as ServedEncoder
from serve.errors import TrainingError
from serve.heads.fit import HOW_TO_LABEL, Examples, fit_head
from serve.heads.labelled import kin_of
from serve.samples import ImageSet, Sample
from serve.sources import open_source
from train.augment import SimCLRAugment
from train.data import load_pixels, spread, step_generator, training_frame
from train.encoder import Encoder, UnitEncoder

KNN_NEIGHBOURS, KNN_TEMPERATURE = 200, 0.1
HELD_BACK = 5
"""Without a test split, every fifth picture is held back to score on."""


def knn_predict(bank_ND: Tensor, labels_N: Tensor, queries_QD: Tensor, *, k: int, temperature: float, classes: int) -> Tensor:
    """Class of each query (Q,): votes of its k nearest, weighted by exp(cosine / temperature) (Wu et al. 2018, 3.4)."""
    predicted = []
    for chunk in queries_QD.split(1024):
        similarity, nearest = (chunk @ bank_ND.T).topk(min(k, len(bank_ND)), dim=1)
        votes = torch.zeros(len(chunk), classes, device=chunk.device)
        votes.scatter_add_(1, labels_N[nearest], (similarity / temperature).exp())
        predicted.append(votes.argmax(1))
    return torch.cat(predicted)


def knn_accuracy(
    bank: NDArray[np.float32], bank_groups: Sequence[str], queries: NDArray[np.float32], groups: Sequence[str]
) -> float:
    """Share of queries whose class wins the vote of their 200 nearest, temperature 0.1."""
    classes = sorted(set(bank_groups))
    number = {name: index for index, name in enumerate(classes)}
    labels = torch.tensor([number[name] for name in bank_groups])
    wanted = torch.tensor([number.get(name, -1) for name in groups])
    predicted = knn_predict(
        torch.from_numpy(bank),
        labels,
        torch.from_numpy(queries),
        k=KNN_NEIGHBOURS,
        temperature=KNN_TEMPERATURE,
        classes=len(classes),
    )
    return (predicted == wanted).float().mean().item()


def evaluate(encoder: ServedEncoder, source: str, test: str | None, protocol: Literal["knn", "linear"]) -> dict[str, Any]:
    """Score any encoder's vectors on labelled pictures. Raises: TrainingError without labels."""
    bank, queries = split_for_scoring(labelled_images(source, test))
    bank_vectors, bank, bank_bad = embed_samples(encoder, bank, "bank")
    query_vectors, queries, query_bad = embed_samples(encoder, queries, "queries")
    if protocol == "knn":
        accuracy = knn_accuracy(bank_vectors, groups_of(bank), query_vectors, groups_of(queries))
    else:
        head = fit_head(Examples(bank_vectors, groups_of(bank), kin_of(bank)), encoder.encoder_id)
        accuracy = head_accuracy(head, query_vectors, groups_of(queries))
    return {
        "protocol": protocol,
        "encoder_id": encoder.encoder_id,
        "accuracy": accuracy,
        "chance": chance_accuracy(queries),
        "classes": len(set(groups_of(bank))),
        "bank": len(bank),
        "queries": len(queries),
        "unreadable": len(bank_bad) + len(query_bad),
    }


def labelled_images(source: str, test: str | None) -> ImageSet:
    """A source, with the pictures of another as its test split. Raises: TrainingError without labels to score on."""
    images = open_source(source)
    if test is not None:
        scored = open_source(test)
        images = ImageSet(train=images.train, test=scored.test or scored.train)
    if not all(split_for_scoring(images)):
        raise TrainingError(f"{source}: no labels to score on; {HOW_TO_LABEL}")
    return images


def chance_accuracy(queries: Sequence[Sample]) -> float:
    """What naming the largest class every time would reach."""
    return Counter(groups_of(queries)).most_common(1)[0][1] / len(queries)


def score_head(head: Head, encoder: ServedEncoder, samples: Sequence[Sample]) -> Head:
    """The head with its accuracy on other labelled pictures in its report."""
    vectors, kept, _ = embed_samples(encoder, [sample for sample in samples if sample.label is not None], "test")
    scores = {"test_accuracy": head_accuracy(head, vectors, groups_of(kept)), "test_pictures": len(kept)}
    return replace(head, report=head.report | scores)


def head_accuracy(head: Head, vectors: NDArray[np.float32], groups: Sequence[str]) -> float:
    """Share of vectors whose likeliest class is their group."""
    named = np.array(head.classes)[head.probabilities(vectors).argmax(1)]
    return float((named == np.array(groups)).mean())


def groups_of(samples: Sequence[Sample]) -> tuple[str, ...]:
    """The class or identity of labelled pictures."""
    return tuple(str(sample.group) for sample in samples)


def split_for_scoring(images: ImageSet) -> tuple[list[Sample], list[Sample]]:
    """Labelled pictures to learn from and to score on: train and test, or four fifths and one fifth of train."""
    bank = [sample for sample in images.train if sample.group is not None]
    queries = [sample for sample in images.test if sample.group is not None]
    if queries:
        return bank, queries
    return [sample for place, sample in enumerate(bank) if not _held_back(place)], bank[HELD_BACK - 1 :: HELD_BACK]


def _held_back(place: int) -> bool:
    return place % HELD_BACK == HELD_BACK - 1


@torch.inference_mode()
def embed_pixels(encoder: Encoder, images_NCHW: Tensor, device: torch.device) -> NDArray[np.float32]:
    """Unit vectors (N, D) of prepared uint8 pictures, in float32, batch norm in evaluation mode."""
    model = UnitEncoder(encoder).eval()
    vectors = [model(chunk.permute(0, 2, 3, 1).to(device)).cpu() for chunk in images_NCHW.split(256)]
    return torch.cat(vectors).numpy()


def view_retrieval(encoder: ServedEncoder, samples: Sequence[Sample], *, most: int = 1000, seed: int = 0) -> float:
    """Share of pictures that one random view of them finds first among all: what can be scored without any label."""
    preprocess = encoder.manifest.preprocess
    pixels = load_pixels(spread(samples, most), training_frame(preprocess))
    augment = SimCLRAugment((preprocess.height_px, preprocess.width_px), strength=0.5, blur=False)
    views = augment(pixels.images, step_generator(seed, 0)).mul(255).round().byte().permute(0, 2, 3, 1)
    vectors, kept, _ = embed_samples(encoder, pixels.samples, "views")
    assert len(kept) == len(views)
    nearest = (encoder.embed(list(views.numpy())) @ vectors.T).argmax(1)
    return float((nearest == np.arange(len(nearest))).mean())
