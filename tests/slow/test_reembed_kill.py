"""kill -9 at random moments of re-embedding, with a writer beside it: the end is that of a run that nobody disturbed."""

import multiprocessing
import random
import shutil
import sqlite3
import time
from contextlib import closing, suppress

import numpy as np
from PIL import Image

import serve.transfer.reembed
from serve.encoder import OnnxEncoder
from serve.gallery import Gallery
from serve.samples import Sample
from serve.transfer.next_vectors import NextVectors
from serve.transfer.reembed import reembed
from tests.toy_encoder import write_toy_encoder

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["pytest", "tests.toy_encoder", "serve.transfer.reembed"]
)  # else each child would import for a second
PICTURES = 120


def draw(folder, number):
    path = folder / f"{number}.png"
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (9, 7, 3), np.uint8)).save(path)
    return str(path)


def run(folder, graph, told=None):
    """`told` hears of every batch that is stored, and of the taking over when it begins."""
    serve.transfer.reembed._BLOCK_ITEMS = 4  # many transactions
    if told is not None:
        put, take_over = NextVectors.put, NextVectors.take_over
        NextVectors.put = lambda *arguments: (put(*arguments), told.send(1))
        NextVectors.take_over = lambda *arguments: (told.send(1), take_over(*arguments))[1]
    reembed(str(folder), OnnxEncoder(graph), str(graph), drop_unreadable=True)


def killed(folder, graph, batches, after_s):
    """Whether it was killed, `after_s` after so many batches, or had ended by itself."""
    here, there = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=run, args=(folder, graph, there))
    process.start()
    there.close()
    with suppress(EOFError):
        for _ in range(batches):
            here.recv()
    process.join(after_s)
    process.kill()
    process.join()
    return process.exitcode != 0


def content(folder):
    with Gallery.open(folder) as gallery:
        assert gallery.verify() == []
        return {item.id: (item, gallery.vector(item.id)) for item in gallery.items()}


def filled(folder, pictures, encoder):
    with Gallery.open(folder, encoder, create=True) as gallery:
        gallery.add([Sample(draw(pictures, number), label=f"l{number % 3}", time=float(number)) for number in range(PICTURES)])
        gallery.remove([5, PICTURES])


def change(gallery, pictures, number, rng):
    """What a writer does meanwhile, while the old encoder's vectors are there; the same in every run."""
    ids = gallery.ids().tolist()
    gallery.add([Sample(draw(pictures, number), label="late")])
    picture = draw(pictures, number + 1000)
    gallery.update(rng.choice(ids), picture, source=picture)
    gallery.relabel([rng.choice(ids)], camera=str(number))
    gallery.remove([rng.choice(ids)])


def test_killed_and_undisturbed_runs_end_alike(tmp_path, full):
    (pictures := tmp_path / "pictures").mkdir()
    graphs = [write_toy_encoder(tmp_path / f"encoder{seed}", seed=seed)[0] for seed in (0, 1)]
    old, new = map(OnnxEncoder, graphs)
    rng, kills = random.Random(0), 0  # noqa: S311
    for cycle in range(15 if full else 2):
        folder, whole = tmp_path / f"gallery{cycle}", tmp_path / f"whole{cycle}"
        filled(folder, pictures, old)
        for number in range(PICTURES, 10 * PICTURES):
            kills += killed(folder, graphs[1], rng.randint(0, 6), rng.uniform(0, 0.02))
            with Gallery.open(folder) as gallery:
                if gallery.encoder_id == new.encoder_id:
                    break
                assert gallery.encoder_id == old.encoder_id
                assert gallery.verify() == []
            if number < PICTURES + 4:
                with Gallery.open(folder, old) as gallery:
                    change(gallery, pictures, number, rng)
                shutil.rmtree(whole, ignore_errors=True)
                shutil.copytree(folder, whole)
        run(folder, graphs[1])
        found = content(folder)
        for item, vector in found.values():
            np.testing.assert_allclose(vector, new.embed([item.source])[0], atol=1e-6)
        if whole.exists():
            with closing(sqlite3.connect(whole / "catalog.sqlite")) as db:  # begin anew
                db.execute(f"DROP TRIGGER IF EXISTS next_{new.encoder_id}_removed")
                db.execute(f"DROP TABLE IF EXISTS next_{new.encoder_id}")
                db.commit()
            run(whole, graphs[1])
            undisturbed = content(whole)
            assert {i: item for i, (item, _) in found.items()} == {i: item for i, (item, _) in undisturbed.items()}
            for i, (_, vector) in undisturbed.items():
                np.testing.assert_allclose(found[i][1], vector, atol=1e-6)
        with Gallery.open(folder, new) as gallery:
            assert gallery.encoder_spec == str(graphs[1])
    assert kills > cycle + 1, "hardly ever killed: it had ended before"


def look(folder, old_graph, until, told):
    """Searches for as long as it is told, in a process of its own; opened under the old encoder."""
    failures, answers = [], 0
    with Gallery.open(folder, OnnxEncoder(old_graph)) as gallery:
        query = gallery.vector(1)
        wanted = [(hit.id, hit.score) for hit in gallery.search(query, 10)]
        told.put("open")
        while time.time() < until.value:
            found = [(hit.id, hit.score) for hit in gallery.search(query, 10)]
            answers += 1
            if found != wanted:
                failures.append(found)
    told.put((failures[:3], answers))


def test_the_old_vectors_are_searched_by_another_process_all_the_while(tmp_path):
    (pictures := tmp_path / "pictures").mkdir()
    graphs = [write_toy_encoder(tmp_path / f"encoder{seed}", seed=seed)[0] for seed in (0, 1)]
    filled(tmp_path / "gallery", pictures, OnnxEncoder(graphs[0]))
    until, told = CONTEXT.Value("d", time.time() + 600), CONTEXT.Queue()
    process = CONTEXT.Process(target=look, args=(tmp_path / "gallery", graphs[0], until, told))
    process.start()
    assert told.get(timeout=60) == "open"
    run(tmp_path / "gallery", graphs[1])
    until.value = time.time() + 1
    failures, answers = told.get(timeout=60)
    process.join()
    assert failures == []
    assert answers > 20
    for item, vector in content(tmp_path / "gallery").values():
        np.testing.assert_allclose(vector, OnnxEncoder(graphs[1]).embed([item.source])[0], atol=1e-6)
