from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from serve.contract import Preprocess
from serve.encoder import OnnxEncoder
from serve.gallery import Gallery
from serve.pictures import Picture, prepare_batch
from serve.samples import Sample
from tests.plain_manifest import plain_manifest
from tests.toy_encoder import write_toy_encoder

if TYPE_CHECKING:
    from serve.page.desk import Desk

TOY_DIM = 16


class ToyEncoder:
    """Mean colours of a 4 x 4 grid, projected and normalised: deterministic, and similar pictures are near each other."""

    def __init__(self, name: str = "toy", seed: int = 0) -> None:
        frame = Preprocess(height_px=8, width_px=8, resize="stretch", crop=1.0, resample="bicubic", jpeg="full")
        self.manifest = plain_manifest(name, TOY_DIM, frame, seed=seed)
        self._projection = np.random.default_rng(seed).standard_normal((48, TOY_DIM)).astype(np.float32)

    @property
    def encoder_id(self) -> str:
        return self.manifest.encoder_id

    def embed(self, images: Sequence[Picture]) -> NDArray[np.float32]:
        pixels = prepare_batch(images, self.manifest.preprocess).astype(np.float32)
        grid = pixels.reshape(len(pixels), 4, 2, 4, 2, 3).mean(axis=(2, 4)).reshape(len(pixels), 48)
        vectors = (grid - 127.3) @ self._projection  # the odd offset: no picture becomes the zero vector
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def toy_encoder() -> ToyEncoder:
    return ToyEncoder()


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> OnnxEncoder:
    """A toy that is a graph in ONNX Runtime."""
    return OnnxEncoder(write_toy_encoder(tmp_path_factory.mktemp("toy"))[0])


@pytest.fixture
def other_encoder() -> ToyEncoder:
    return ToyEncoder("other", seed=1)


@pytest.fixture(scope="module")
def milvus_lite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a file of Milvus Lite that stays open, for a collection per test: it starts slowly."""
    pytest.importorskip("pymilvus", reason="pymilvus is not installed (the extra `scale`)")
    pytest.importorskip("milvus_lite", reason="Milvus Lite is not installed (the extra `scale`)")
    address = f"milvus-lite://{tmp_path_factory.mktemp('milvus')}/galleries.db"
    with Gallery.open(address, ToyEncoder(), create=True):
        yield address


@pytest.fixture
def milvus_address(milvus_lite: str) -> str:
    """Where no gallery is yet."""
    return f"{milvus_lite}#test_{uuid.uuid4().hex}"


@pytest.fixture(params=["folder", pytest.param("milvus", marks=pytest.mark.milvus)])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where no gallery is yet, of either kind."""
    return str(tmp_path / "gallery") if request.param == "folder" else request.getfixturevalue("milvus_address")


@pytest.fixture
def gallery(tmp_path: Path, toy_encoder: ToyEncoder) -> Iterator[Gallery]:
    """An empty one in a folder, open."""
    with Gallery.open(tmp_path / "gallery", toy_encoder, create=True) as gallery:
        yield gallery


@pytest.fixture
def toasts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the page shows as a toast."""
    shown: list[str] = []
    monkeypatch.setattr("gradio.Warning", lambda message, **_: shown.append(message))
    return shown


@pytest.fixture
def desk(gallery: Gallery, toy_encoder: ToyEncoder, pictures: Callable[[int], list[Sample]], toasts: list[str]) -> Desk:
    """The page's, over a gallery of identities 0 to 3, five pictures each."""
    from serve.page.desk import Desk  # brings Gradio

    gallery.add(pictures(20))
    return Desk(gallery, toy_encoder)


@pytest.fixture
def pictures(tmp_path: Path) -> Callable[[int], list[Sample]]:
    """Draws n different pictures and returns their samples."""

    def draw(count: int) -> list[Sample]:
        rng = np.random.default_rng(count)
        samples = []
        for i in range(count):
            path = tmp_path / "pictures" / f"{i:03}.png"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (9, 7, 3), np.uint8)).save(path)
            samples.append(Sample(str(path), label=f"class {i % 3}", identity=str(i % 4), camera=str(i % 2), time=float(i)))
        return samples

    return draw


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Such small tensors are quickest on one thread, and the same in every run."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def one_cpu(one_thread: None) -> Iterator[None]:
    """Bit for bit is promised on one kind of machine: no GPU, even where there is one."""
    import torch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield
