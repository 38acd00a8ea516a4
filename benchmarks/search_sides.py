"""The sides of benchmarks/search.py: each library builds an index of the rows, opens it again, and is asked for neighbours.

The peers' environment has neither our code nor our packages: nothing of ours is imported at the top.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Protocol

import numpy as np

EFFORTS = (10, 16, 24, 32, 40, 48, 64, 96, 128, 192, 256, 384, 512)
M, EF_CONSTRUCTION = 16, 128
"""The same graph for all that build one: their own defaults lie around it."""


class Side(Protocol):
    """One library. `settings` are tried from left to right until recall is enough."""

    settings: tuple[int, ...]

    def build(self, rows: np.ndarray, folder: Path) -> None:
        """Write an index of the rows; their numbers are the ids."""

    def open(self, rows: np.ndarray, folder: Path) -> None:
        """Open it to be searched."""

    def set(self, setting: int) -> None:
        """Look so hard."""

    def search(self, queries: np.ndarray, k: int) -> np.ndarray:
        """Row numbers (Q, k). One query on one core, many on all."""


class Ours:
    """`Gallery.search_many` on a gallery whose items are in its catalog, with the index that it chose."""

    settings = (0,)

    def build(self, rows: np.ndarray, folder: Path) -> None:  # noqa: ARG002  # one signature for all sides
        from serve.gallery import Gallery

        with Gallery.open(folder / "gallery") as gallery:  # which `fill` of search.py has filled
            gallery.rebuild()

    def open(self, rows: np.ndarray, folder: Path) -> None:  # noqa: ARG002
        from serve.gallery import Gallery

        self.gallery = Gallery.open(folder / "gallery")

    def set(self, setting: int) -> None:
        pass

    def search(self, queries: np.ndarray, k: int) -> np.ndarray:
        return self.gallery.search_many(queries, k)[1] - 1  # ids begin with 1


class FaissHnsw:
    """Plain FAISS."""

    settings = EFFORTS

    def build(self, rows: np.ndarray, folder: Path) -> None:
        import faiss

        index = faiss.IndexHNSWFlat(rows.shape[1], M, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = EF_CONSTRUCTION
        index.add(rows)
        faiss.write_index(index, str(folder / "faiss.index"))

    def open(self, rows: np.ndarray, folder: Path) -> None:  # noqa: ARG002
        import faiss

        self.faiss, self.index = faiss, faiss.read_index(str(folder / "faiss.index"))

    def set(self, setting: int) -> None:
        self.index.hnsw.efSearch = setting

    def search(self, queries: np.ndarray, k: int) -> np.ndarray:
        self.faiss.omp_set_num_threads(1 if len(queries) == 1 else os.cpu_count())
        return self.index.search(queries, k)[1]


class Hnswlib:
    settings = EFFORTS

    def build(self, rows: np.ndarray, folder: Path) -> None:
        import hnswlib

        index = hnswlib.Index("ip", rows.shape[1])
        index.init_index(len(rows), M=M, ef_construction=EF_CONSTRUCTION)
        index.add_items(rows)
        index.save_index(str(folder / "hnswlib.index"))

    def open(self, rows: np.ndarray, folder: Path) -> None:
        import hnswlib

        self.index = hnswlib.Index("ip", rows.shape[1])
        self.index.load_index(str(folder / "hnswlib.index"))

    def set(self, setting: int) -> None:
        self.index.set_ef(setting)

    def search(self, queries: np.ndarray, k: int) -> np.ndarray:
        return self.index.knn_query(queries, k, num_threads=1 if len(queries) == 1 else -1)[0].astype(np.int64)


class Usearch:
    settings = EFFORTS

    def build(self, rows: np.ndarray, folder: Path) -> None:
        index = self._index(rows)
        index.add(np.arange(len(rows)), rows)
        index.save(str(folder / "usearch.index"))

    def open(self, rows: np.ndarray, folder: Path) -> None:
        self.index = self._index(rows)
        self.index.load(str(folder / "usearch.index"))

    def _index(self, rows: np.ndarray) -> Any:  # noqa: ANN401
        from usearch.index import Index

        return Index(ndim=rows.shape[1], metric="ip", dtype="f32", connectivity=M, expansion_add=EF_CONSTRUCTION)

    def set(self, setting: int) -> None:
        self.index.expansion_search = setting

    def search(self, queries: np.ndarray, k: int) -> np.ndarray:
        found = self.index.search(queries, k, threads=1 if len(queries) == 1 else 0)
        return np.asarray(found.keys).astype(np.int64).reshape(len(queries), -1)


class MilvusLite:
    settings = EFFORTS

    def build(self, rows: np.ndarray, folder: Path) -> None:
        from pymilvus import DataType, MilvusClient

        client = MilvusClient(str(folder / "milvus.db"))
        schema = client.create_schema(auto_id=False)
        schema.add_field("id", DataType.INT64, is_primary=True)
        schema.add_field("vector", DataType.FLOAT_VECTOR, dim=rows.shape[1])
        index = client.prepare_index_params()
        graph = {"M": M, "efConstruction": EF_CONSTRUCTION}
        index.add_index("vector", index_type="HNSW", metric_type="IP", params=graph)
        client.create_collection("rows", schema=schema, index_params=index)
        for start in range(0, len(rows), 1000):
            client.insert("rows", [{"id": start + i, "vector": row} for i, row in enumerate(rows[start : start + 1000])])
        client.close()

    def open(self, rows: np.ndarray, folder: Path) -> None:  # noqa: ARG002
        from pymilvus import MilvusClient

        self.client = MilvusClient(str(folder / "milvus.db"))
        self.client.load_collection("rows")

    def set(self, setting: int) -> None:
        self.parameters = {"metric_type": "IP", "params": {"ef": setting}}

    def search(self, queries: np.ndarray, k: int) -> np.ndarray:
        found = self.client.search("rows", list(queries), limit=k, search_params=self.parameters)
        return np.array([[hit["id"] for hit in hits] for hits in found])


class QdrantLocal:
    settings = (0,)

    def build(self, rows: np.ndarray, folder: Path) -> None:
        from qdrant_client import QdrantClient, models

        client = QdrantClient(path=str(folder / "qdrant"))
        client.create_collection("rows", models.VectorParams(size=rows.shape[1], distance=models.Distance.DOT))
        for start in range(0, len(rows), 1000):
            block = rows[start : start + 1000]
            client.upsert("rows", models.Batch(ids=list(range(start, start + len(block))), vectors=block.tolist()))
        client.close()

    def open(self, rows: np.ndarray, folder: Path) -> None:  # noqa: ARG002
        from qdrant_client import QdrantClient

        self.client = QdrantClient(path=str(folder / "qdrant"))

    def set(self, setting: int) -> None:
        pass

    def search(self, queries: np.ndarray, k: int) -> np.ndarray:
        return np.array([[hit.id for hit in self.client.query_points("rows", query, limit=k).points] for query in queries])


SIDES: dict[str, type[Side]] = {
    "ours": Ours,
    "faiss-hnsw": FaissHnsw,
    "hnswlib": Hnswlib,
    "usearch": Usearch,
    "milvus-lite": MilvusLite,
    "qdrant-local": QdrantLocal,
}
SLOW = ("milvus-lite", "qdrant-local")
"""Those that would take more than a few minutes at a million rows, and get fewer."""
OURS_ENVIRONMENT = ("ours", "faiss-hnsw")
