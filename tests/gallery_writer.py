"""A process that changes a gallery at random, and tells each step before it begins and after it is done. Made to be killed.

Vectors are drawn from a number (a tag), so that whoever listens can work out what must be there.
"""

import random
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import serve.ann.state
from serve.catalog import Catalog
from serve.gallery import Gallery
from serve.samples import Sample
from serve.storage.gallery_folder import CATALOG_NAME
from tests.gallery_items import toy_facts

DIM = 16
Step = dict[str, Any]


def new_gallery(folder: Path) -> Path:
    """An empty gallery of vectors, without an encoder."""
    folder.mkdir()
    Catalog(folder / CATALOG_NAME, toy_facts(DIM)).close()
    return folder


def vectors_of(tags: list[int]) -> NDArray[np.float32]:
    """Vectors (n, DIM), not of unit length."""
    return np.stack([np.random.default_rng(tag).standard_normal(DIM, np.float32) for tag in tags])


def random_step(rng: random.Random, ids: list[int]) -> Step:
    """What to do next, to a gallery that holds these ids."""
    some = rng.sample(ids, min(len(ids), rng.randint(1, 20)))
    kind = rng.choices(["add", "update", "relabel", "remove", "save", "rebuild"], [5, 3, 3, 3, 1, 1])[0]
    if kind == "add" or not ids:
        tags = [rng.getrandbits(48) for _ in range(rng.randint(1, 25))]
        return {"do": "add", "sources": [f"{tag}.jpg" for tag in tags], "tags": tags, "label": f"new {rng.randint(0, 3)}"}
    if kind == "update":
        return {"do": "update", "id": some[0], "tag": rng.getrandbits(48)}
    return {"do": kind, "ids": some, "label": f"label {rng.randint(0, 3)}"}


def take(gallery: Gallery, step: Step) -> list[int]:
    """Do a step. Returns: the ids that it added."""
    match step["do"]:
        case "add":
            samples = [Sample(source, label=step["label"]) for source in step["sources"]]
            return list(gallery.add(samples, vectors_of(step["tags"]), batch_size=len(samples)).ids)
        case "update":
            gallery.update(step["id"], vectors_of([step["tag"]])[0])
        case "relabel":
            gallery.relabel(step["ids"], label=step["label"])
        case "remove":
            gallery.remove(step["ids"])
        case "save":
            gallery.save()
        case "rebuild":
            gallery.rebuild()
    return []


def write(folder: Path, seed: int, pipe: Connection) -> None:
    """Change the gallery until killed."""
    serve.ann.state.MANY_ROWS = 30  # the index is written in the background all the time
    rng = random.Random(seed)  # noqa: S311
    with Gallery.open(folder) as gallery:
        while True:
            step = random_step(rng, gallery.ids().tolist())
            pipe.send(("begins", step))
            pipe.send(("done", take(gallery, step)))
