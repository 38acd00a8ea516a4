"""kill -9 at random moments of add, update, relabel, remove, save and rebuild: what was acknowledged is there, and right."""

import multiprocessing
import random
import time

import numpy as np

from serve.gallery import Gallery
from serve.index import unit_vectors
from tests.gallery_writer import DIM, new_gallery, vectors_of, write

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["pytest", "tests.gallery_writer"])  # else each child would import for a second


def test_nothing_acknowledged_is_lost_and_nothing_is_there_by_halves(tmp_path, full):
    cycles, folder, rng = 500 if full else 20, new_gallery(tmp_path / "gallery"), random.Random(0)  # noqa: S311
    model, ever, steps = {}, set(), 0
    for cycle in range(cycles):
        done, pending = killed_writer(folder, cycle, rng.uniform(0, 0.15))
        for step, new_ids in done:
            model = after(model, step, new_ids)
            ever |= model.keys()
        with Gallery.open(folder) as gallery:
            there = {item.id: (item.source, item.label, gallery.vector(item.id).tobytes()) for item in gallery.items()}
            wanted = [model] if pending is None else [model, after(model, pending, sorted(there.keys() - model.keys()))]
            assert there in wanted, f"cycle {cycle}, pending {pending}"
            assert not there.keys() & (ever - model.keys()), "an id was used again"
            assert gallery.verify() == []
            check_search(gallery, there, rng)
        model, steps = there, steps + len(done)
        ever |= model.keys()
    assert steps > 3 * cycles


def killed_writer(folder, seed, after_s):
    """Steps that were done, with the ids they added, and the one that was under way or None."""
    here, there = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=write, args=(folder, seed, there))
    process.start()
    there.close()
    assert here.poll(60)  # the gallery is open
    time.sleep(after_s)
    process.kill()
    process.join()
    done, pending = [], None
    while True:
        try:
            word, what = here.recv()
        except EOFError:
            return done, pending
        if word == "begins":
            pending = what
        else:
            done.append((pending, what))
            pending = None


def stored(tags):
    """The vectors as a gallery keeps them."""
    return unit_vectors(vectors_of(tags), DIM)


def after(model, step, new_ids):
    """`model` (id -> source, label, vector) after a step that added `new_ids`."""
    rows = [model.get(item_id) for item_id in step.get("ids", [])]
    match step["do"]:
        case "add" if len(new_ids) == len(step["tags"]):
            vectors = [vector.tobytes() for vector in stored(step["tags"])]
            items = zip(step["sources"], vectors, strict=True)
            return model | {i: (source, step["label"], vector) for i, (source, vector) in zip(new_ids, items, strict=True)}
        case "update":
            source, label, _ = model[step["id"]]
            return model | {step["id"]: (source, label, stored([step["tag"]])[0].tobytes())}
        case "relabel":
            return model | {
                i: (source, step["label"], vector) for i, (source, _, vector) in zip(step["ids"], rows, strict=True)
            }
        case "remove":
            return {i: row for i, row in model.items() if i not in step["ids"]}
    return model


def check_search(gallery, model, rng):
    for item_id in rng.sample(sorted(model), min(5, len(model))):
        _, label, vector = model[item_id]
        query = np.frombuffer(vector, np.float32)
        hits = gallery.search(query, len(model) + 5)
        assert (hits[0].id, hits[0].label) == (item_id, label)
        assert {hit.id for hit in hits} == model.keys()
        assert gallery.search(query, 1, f'label = "{label}"')[0].id == item_id
