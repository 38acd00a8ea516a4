"""Processes and threads that read a gallery while others write it: no error, no half transaction, nobody waits for a reader."""

import multiprocessing
import threading
import time
from collections import Counter

from serve.gallery import Gallery
from serve.samples import Sample
from tests.gallery_writer import new_gallery, vectors_of

CONTEXT = multiprocessing.get_context("spawn")
BATCH = 10


def write(folder, name, all_there, for_s, told):
    """Batches of ten come, change their label, get other vectors, and go, each time all ten at once."""
    tag, writes = 0, 0
    with Gallery.open(folder) as gallery:
        all_there.wait(60)  # a process may take seconds to start
        until = time.time() + for_s
        while time.time() < until:
            batches = []
            for _ in range(4):
                tags = list(range(tag, tag + BATCH))
                samples = [Sample(f"{name} {t}", label=f"{name} {tag}") for t in tags]
                batches.append(gallery.add(samples, vectors_of(tags)).ids)
                tag += BATCH
            gallery.relabel(batches[0], label=f"{name} changed {tag}")
            gallery.update(batches[1][0], vectors_of([tag])[0])
            for batch in batches[1:]:
                gallery.remove(batch)
            writes += 9
    told.put(("writes", writes))


def read(folder, all_there, for_s, told):
    """Two threads over one gallery."""
    failures, searches = [], Counter()

    def look(gallery, query, until):
        while time.time() < until:
            listed = Counter(item.label for item in gallery.items())
            found = Counter(hit.label for hit in gallery.search(query, 10**6))
            for counts in (listed, found):
                assert set(counts.values()) <= {BATCH}, counts
            for label in list(listed)[-3:]:
                hits = gallery.search(query, 50, f'label = "{label}"')
                assert {hit.label for hit in hits} <= {label}
                assert len(hits) in (0, BATCH), (label, len(hits))
            searches["n"] += 1 + len(listed)

    def guarded(*task):
        try:
            look(*task)
        except BaseException as error:
            failures.append(repr(error))

    with Gallery.open(folder) as gallery:
        all_there.wait(60)
        until = time.time() + for_s
        threads = [threading.Thread(target=guarded, args=(gallery, query, until)) for query in vectors_of([1, 2])]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    told.put(("failures", failures))
    told.put(("searches", searches["n"]))


def test_readers_see_whole_transactions_of_other_processes(tmp_path, full):
    folder, told = new_gallery(tmp_path / "gallery"), CONTEXT.Queue()
    shared = CONTEXT.Barrier(4), 60 if full else 6, told
    processes = [CONTEXT.Process(target=write, args=(folder, name, *shared)) for name in ("one", "two")]
    processes += [CONTEXT.Process(target=read, args=(folder, *shared)) for _ in range(2)]
    for process in processes:
        process.start()
    said = [told.get(timeout=120) for _ in range(6)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert [what for word, what in said if word == "failures"] == [[], []]
    assert min(what for word, what in said if word == "searches") > 20
    writes = [what for word, what in said if word == "writes"]
    assert min(writes) > 20
    with Gallery.open(folder) as gallery:
        assert gallery.verify() == []
        assert len(gallery) == BATCH * sum(writes) // 9
