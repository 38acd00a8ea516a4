"""Samples and vectors for galleries, drawn with a seed."""

import numpy as np

from serve.samples import Sample


def vectors_of(count, seed=0, dim=16):
    return np.random.default_rng(seed).standard_normal((count, dim)).astype(np.float32)


def samples_of(count, prefix="s"):
    return [
        Sample(f"{prefix}{i}", label=f"l{i % 3}", identity=str(i % 5), camera=str(i % 2), time=float(i)) for i in range(count)
    ]
