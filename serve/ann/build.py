"""Writing a base: from the catalog, or from the base before and what came since. In memory is the index alone."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import faiss
import numpy as np
from numpy.typing import NDArray

from serve.ann.base import (
    FAISS_NAME,
    IDS_NAME,
    PLOT_NAME,
    VECTORS_NAME,
    Base,
    Header,
    mapped,
    next_folder,
    write_array,
    write_header,
    write_index,
)
from serve.ann.cells import Cells
from serve.ann.choice import IndexLimits, Report, Work, median_ms
from serve.ann.method import cells_of
from serve.ann.report import draw
from serve.ann.segment import Segment
from serve.ann.state import State
from serve.ann.tuning import HELD_ROWS, add, build_best, check
from serve.catalog import Catalog, Change
from serve.files import atomic_folder

_BLOCK_ROWS = 8192
_GROWTH = 4
"""After growing so many times, it is time to choose anew."""
_ENOUGH_TO_CHECK = 50


def build(catalog: Catalog, index: Path, limits: IndexLimits, work: Work, *, choose: bool) -> Path:
    """A base of all that the catalog holds. With `choose`, the index is the one that measures best."""
    at = catalog.last_change()
    with atomic_folder(target := next_folder(index)) as folder:
        vectors_ND = mapped(folder, _write_rows(catalog, at, folder, work), catalog.facts.embedding_dim)
        report = Report(exact_ms=_exact_ms(vectors_ND))
        slow = report.exact_ms > limits.latency_ms and len(vectors_ND) > 10 * HELD_ROWS
        if slow and choose:
            found, cells, report = build_best(vectors_ND, limits, work, report.exact_ms)
            write_index(folder, found, cells)
            draw(report, limits, folder / PLOT_NAME)
        header = Header(
            seq=at.seq,
            stamp=at.stamp,
            count=len(vectors_ND),
            dim=vectors_ND.shape[1],
            chosen_at=len(vectors_ND),
            outgrown=slow and not choose,
            limits=limits,
            report=report,
        )
        write_header(folder, header)
    return target


def extend(state: State, work: Work) -> Path:
    """A base of what a state holds: its base's rows, some of them dead, and behind them the rows in memory."""
    assert state.base is not None
    base, new = state.base, [segment.living() for segment in (state.listed, state.tail)]
    new_ids, new_ND = np.concatenate([ids for ids, _ in new]), np.concatenate([block for _, block in new])
    with atomic_folder(target := next_folder(base.folder.parent)) as folder:
        old_ids = np.where(state.mapped.alive, state.mapped.ids, -1)
        write_array(folder / IDS_NAME, np.concatenate([old_ids, new_ids]), "<i8")
        shutil.copyfile(base.folder / VECTORS_NAME, folder / VECTORS_NAME)
        with (folder / VECTORS_NAME).open("ab") as file:
            file.write(new_ND.tobytes())
        work.proceed()
        header = replace(base.header, seq=state.at.seq, stamp=state.at.stamp, count=len(old_ids) + len(new_ids))
        if base.segment.cells is None:
            exact_ms = _exact_ms(mapped(folder, header.count, header.dim))
            slow = exact_ms > header.limits.latency_ms
            header = replace(header, report=replace(header.report, exact_ms=exact_ms), outgrown=slow)
        else:
            header = _extend_index(base, base.segment.cells, header, new_ND, folder, work)
        write_header(folder, header)
    return target


def _extend_index(base: Base, cells: Cells, header: Header, new_ND: NDArray[np.float32], folder: Path, work: Work) -> Header:
    """Write the index with the new rows in it. They are first asked whether it still finds what it should."""
    index, report = faiss.read_index(str(base.folder / FAISS_NAME)), header.report
    if len(new_ND) >= _ENOUGH_TO_CHECK:
        report = check(index, report, base.segment.vectors, new_ND, header.limits, work)
    add(index, new_ND, work)
    write_index(folder, index, cells_of(index, cells.centres, mapped(folder, header.count, header.dim)))
    if (base.folder / PLOT_NAME).is_file():
        shutil.copyfile(base.folder / PLOT_NAME, folder / PLOT_NAME)
    was, limit = header.report.chosen, header.limits.recall
    missed = report.checked is not None and was is not None and report.checked < limit <= was.recall
    return replace(header, report=report, outgrown=missed or header.count > _GROWTH * header.chosen_at)


def _write_rows(catalog: Catalog, at: Change, folder: Path, work: Work) -> int:
    """rows.ids and rows.vectors. A random few come last, so that they may ask before they are in the index."""
    share, drawn = HELD_ROWS / max(1, len(catalog)), np.random.default_rng(0)
    first, last = [np.empty(0, np.int64)], list[tuple[NDArray[np.int64], NDArray[np.float32]]]()
    with (folder / VECTORS_NAME).open("wb") as file:
        for ids, vectors_ND in catalog.vectors(0, at.seq, _BLOCK_ROWS):
            work.proceed()
            held = drawn.random(len(ids)) < share
            first.append(ids[~held])
            file.write(vectors_ND[~held].tobytes())
            last.append((ids[held], vectors_ND[held]))
        file.writelines(vectors_ND.tobytes() for _, vectors_ND in last)
    rows = np.concatenate([*first, *(ids for ids, _ in last)])
    write_array(folder / IDS_NAME, rows, "<i8")
    return len(rows)


def _exact_ms(vectors_ND: NDArray[np.float32]) -> float:
    """How long a search of all these rows takes."""
    return median_ms(Segment.of(np.arange(len(vectors_ND)), vectors_ND), vectors_ND[:5])
