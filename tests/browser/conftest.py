"""A small gallery of generated people, an encoder that needs no training, the app on a free port, and Chromium."""

import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from playwright.sync_api import Browser, Page, expect, sync_playwright

from app import build_app, serve_app
from serve.classify import Head
from serve.contract import Preprocess
from serve.gallery import Gallery
from serve.identity.calibration import Calibration
from serve.pictures import Picture, prepare_batch
from serve.samples import Sample
from serve.sources import open_source
from tests.browser.page_parts import visited
from tests.browser.screenshots import CHROMIUM, CHROMIUM_OPTIONS
from tests.plain_manifest import plain_manifest
from tests.thresholds import calibration
from train.demo_data import DemoSet, draw_demo_set

HOSTILE = """<img src=x onerror="window.hacked=1">{{#each}}${window.hacked=1}"""
GRID_H, GRID_W, DIM = 8, 4, 48


class GridEncoder:
    """Mean colours of a grid's middle, projected at random: deterministic, and people in the same clothes are near."""

    def __init__(self) -> None:
        frame = Preprocess(height_px=32, width_px=16, resize="stretch", crop=1.0, resample="bicubic", jpeg="full")
        self.manifest = plain_manifest("grid", DIM, frame)
        self._projection = np.random.default_rng(0).standard_normal(((GRID_H - 1) * 2 * 3, DIM)).astype(np.float32)

    @property
    def encoder_id(self) -> str:
        return self.manifest.encoder_id

    def embed(self, images: Sequence[Picture]) -> NDArray[np.float32]:
        pixels = prepare_batch(images, self.manifest.preprocess).astype(np.float32)
        grid = pixels.reshape(len(pixels), GRID_H, 4, GRID_W, 4, 3).mean(axis=(2, 4))
        clothes = grid[:, 1:, 1:3] - grid.mean(axis=(1, 2), keepdims=True)  # without the camera's tint and most of the street
        vectors = (clothes.reshape(len(pixels), -1) + 0.1) @ self._projection
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@dataclass(frozen=True)
class Served:
    """What the tests need to know of the running app."""

    url: str
    gallery: Gallery
    images: Path
    probe: Sample


def hostile_sample(like: Sample, folder: Path) -> Sample:
    """A picture whose name and label try to become code in the page, or to break Gradio's template."""
    copy = folder / "hostile {{#each}} ${1+1} <i>.jpg"
    copy.write_bytes(Path(like.source).read_bytes())
    return Sample(str(copy), label=HOSTILE)


def random_head(encoder_id: str) -> Head:
    weight = np.random.default_rng(1).standard_normal((6, DIM)).astype(np.float32)
    classes = ("red coat", "blue coat", "backpack", "handbag", "umbrella", "skirt")
    report = {"held_back_accuracy": 0.873}
    return Head(weight=2 * weight, bias=np.zeros(6, np.float32), classes=classes, encoder_id=encoder_id, report=report)


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The root of a small demo set; as long as it is there, all apps put uploads into one folder of the tests'."""
    spec = DemoSet(train_identities=1, test_identities=8, train_images=1, gallery_images=2, distractors=4, junk=2)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("uploads")))
        yield draw_demo_set(tmp_path_factory.mktemp("drawn") / "demo", spec, progress=False)


@contextmanager
def opened(gallery: Gallery, encoder: GridEncoder, decided: Calibration | None = None) -> Iterator[str]:
    """The URL of the app over a gallery."""
    heads = {"head": random_head(encoder.encoder_id)}
    blocks = build_app(gallery, encoder, heads=heads, encoder_spec="model_repository", calibration=decided)
    yield serve_app(blocks, port=free_port(), wait=False)
    blocks.close(verbose=False)


@contextmanager
def serving(folder: Path, demo: Path, decided: Calibration | None = None) -> Iterator[Served]:
    """The app over a gallery in `folder`, with the demo set's gallery in it and a hostile picture."""
    images, encoder = open_source(demo), GridEncoder()
    with Gallery.open(folder / "people", encoder, create=True) as gallery:
        gallery.add(images.gallery)
        gallery.add([hostile_sample(images.gallery[0], folder)])
        with opened(gallery, encoder, decided) as url:
            yield Served(url, gallery, demo, images.query[0])


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory, demo: Path) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("app"), demo) as served:
        yield served


@pytest.fixture(scope="module")
def identities(tmp_path_factory: pytest.TempPathFactory, demo: Path) -> Iterator[Served]:
    """An app of its own, with a threshold, for tests that change the gallery."""
    decided = calibration(encoder_id=GridEncoder().encoder_id, threshold=0.7)
    with serving(tmp_path_factory.mktemp("identities"), demo, decided) as served:
        yield served


@pytest.fixture
def empty(tmp_path: Path, demo: Path) -> Iterator[str]:
    """The URL of an app over a gallery without a picture."""
    encoder = GridEncoder()
    with Gallery.open(tmp_path / "new", encoder, create=True) as gallery, opened(gallery, encoder) as url:
        yield url


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# Not of the session: Playwright's event loop runs on this thread until it is closed, and asyncio.run of later tests is refused.
@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if not CHROMIUM.is_file():
        pytest.skip(f"no Chromium at {CHROMIUM}")
    expect.set_options(timeout=20_000)  # a busy machine
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_OPTIONS)
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: Browser, served: Served) -> Iterator[Page]:
    with visited(browser, served.url) as page:
        page.get_by_role("tab", name="Search").wait_for()
        yield page
