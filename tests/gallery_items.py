"""Samples, vectors and facts for galleries, drawn with a seed."""

import numpy as np

from serve.samples import Sample
from serve.storage.catalog_schema import Facts


def vectors_of(count, seed=0, dim=16):
    return np.random.default_rng(seed).standard_normal((count, dim)).astype(np.float32)


def clustered(count, seed=0, clusters=30, dim=16):
    """Unit vectors about the same centres, whatever the seed."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).standard_normal((clusters, dim))
    vectors = centres[rng.integers(0, clusters, count)] + 0.7 * rng.standard_normal((count, dim))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def samples_of(count, prefix="s"):
    return [
        Sample(f"{prefix}{i}", label=f"l{i % 3}", identity=str(i % 5), camera=str(i % 2), time=float(i)) for i in range(count)
    ]


def toy_facts(dim=16):
    """Of a catalog for which no encoder is needed."""
    return Facts(encoder_id="e" * 16, encoder_name="toy", embedding_dim=dim, manifest="{}")
