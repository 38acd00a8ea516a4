"""Ways to find the nearest rows: exactly, or by an index of FAISS whose best candidates are then scored exactly.

FAISS's own names say which index: https://github.com/facebookresearch/faiss/wiki/The-index-factory
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeAlias

import faiss
import numpy as np
from numpy.typing import NDArray

from serve.ann.cells import Cells, nearest_centres

Faiss: TypeAlias = Any
"""An index of FAISS: its type stubs miss what its Python layer adds."""

EXACT = "exact"
GRAPH = "HNSW16"


@dataclass(frozen=True)
class Method:
    """One way to search, with its parameters."""

    key: str = EXACT
    """"exact", or the name of an index in FAISS's factory."""
    effort: int = 0
    """Cells looked into (IVF: nprobe), or length of the list of candidates (HNSW: efSearch)."""
    fetch: int = 1
    """Candidates scored exactly for each result wanted."""

    def __str__(self) -> str:
        if self.key == EXACT:
            return EXACT
        effort = f"{'efSearch' if self.key == GRAPH else 'nprobe'} {self.effort}"
        return f"{self.key}, {effort}" + (f", {self.fetch} candidates for each result" if self.fetch > 1 else "")


def cells_for(count: int) -> int:
    """How many cells suit so many rows."""
    return int(2 ** max(0, round(math.log2(4 * math.sqrt(count)))))


def keys_for(cells: int, dim: int) -> list[str]:
    """The indexes worth measuring for rows of `dim` numbers in so many cells."""
    lists = f"IVF{cells}"
    if cells > 1024 and dim % 2 == 0:  # so many centres are searched by codes, and the best scored exactly
        lists += f"(PQ{dim // 2}x4fs,RFlat)"
    codes = ["Flat", "SQ8", "RaBitQ"]
    if dim % 4 == 0:
        codes += [f"PQ{dim // 4}x4fs", f"PQ{dim // 4}x4fsr"]  # of the vectors, and of their difference from the centre
    return [f"{lists},{code}" for code in codes] + [GRAPH]


def efforts(key: str) -> list[int]:
    """The efforts worth measuring, growing."""
    if key == GRAPH:
        return [16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512]
    return [1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256]


def fetches(key: str) -> list[int]:
    """The numbers of candidates worth measuring: more the coarser the codes are."""
    if key == GRAPH or key.endswith("Flat"):
        return [1]  # FAISS's scores are exact here
    return [2, 4] if key.endswith("SQ8") else [4, 7, 10, 14, 20, 30, 40]


def trained(key: str, centres: NDArray[np.float32], sample_ND: NDArray[np.float32]) -> Faiss:
    """An empty index over these cells, whose codes are trained on a sample of the rows."""
    index: Faiss = faiss.index_factory(sample_ND.shape[1], key, faiss.METRIC_INNER_PRODUCT)
    if key == GRAPH:
        index.hnsw.efConstruction = 100
        return index
    quantizer: Faiss = faiss.downcast_index(index.quantizer)
    if isinstance(quantizer, faiss.IndexRefine):
        quantizer.k_factor = 12
    quantizer.train(centres)
    quantizer.add(centres)
    index.train(sample_ND)
    return index


def has_cells(index: Faiss) -> bool:
    """Whether it looks into cells: IVF."""
    return isinstance(index, faiss.IndexIVF)


def cells_of(index: Faiss, centres: NDArray[np.float32], vectors_ND: NDArray[np.float32]) -> Cells:
    """The cell of each of its rows."""
    if not has_cells(index):
        return Cells(centres, nearest_centres(vectors_ND, centres))
    of_rows, lists = np.zeros(index.ntotal, np.int32), faiss.downcast_InvertedLists(index.invlists)
    for cell in range(index.nlist):
        if size := lists.list_size(cell):
            of_rows[faiss.rev_swig_ptr(lists.get_ids(cell), size)] = cell
    return Cells(centres, of_rows)


def lists_beside(index: Faiss, centres: NDArray[np.float32]) -> Faiss:
    """An empty index with exact scores and these cells, for the rows that come after `index` was built."""
    quantizer: Faiss = faiss.clone_index(index.quantizer) if has_cells(index) else faiss.IndexFlatIP(index.d)
    if not quantizer.ntotal:
        quantizer.add(centres)
    lists = faiss.IndexIVFFlat(quantizer, index.d, len(centres), faiss.METRIC_INNER_PRODUCT)
    lists.own_fields = True
    quantizer.this.disown()
    lists.nprobe = 2 * index.nprobe if has_cells(index) else 16
    return lists


def rescored(index: Faiss, vectors_ND: NDArray[np.float32], fetch: int) -> Faiss:
    """An index that scores the best candidates of `index`, so many for each result, by the vectors themselves."""
    if fetch == 1:
        return index
    flat: Faiss = faiss.IndexFlatIP(index.d)
    # FAISS has no call for this: the flat index is told where the vectors lie instead of being given a copy.
    codes, start, size = flat.codes, faiss.swig_ptr(vectors_ND.view(np.uint8)), vectors_ND.nbytes
    codes.is_owned, codes.view_data, codes.view_size, codes.c_ptr, codes.c_size = False, start, size, start, size
    flat.ntotal = len(vectors_ND)
    refined: Faiss = faiss.IndexRefine(index, flat)
    refined.k_factor = fetch
    return refined


def bytes_of(index: Faiss) -> int:
    """What an index takes, on disk or in memory."""
    if has_cells(index):
        return int(index.ntotal * (index.code_size + 8) + index.nlist * index.d * 4)
    return int(index.ntotal * index.d * 4 + index.hnsw.neighbors.size() * 4 + index.hnsw.offsets.size() * 8)


def set_effort(index: Faiss, effort: int) -> None:
    """What to search with from now on."""
    if has_cells(index):
        index.nprobe = effort
    else:
        index.hnsw.efSearch = effort
