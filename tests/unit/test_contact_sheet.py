"""The contact sheet: which pictures stand where, against a loop; what is on it, by the colour of its pixels."""

import math
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from serve.contact_sheet import GAP_PX, PAPER, save_sheet
from train.contact_sheet import CELL_PX, _nearest, contact_sheet


def flat_pictures(count: int, height: int = 32, width: int = 32) -> NDArray[np.uint8]:
    """Picture i is flat, of a colour that names i."""
    images = np.zeros((count, 3, height, width), np.uint8)
    images[:, 0] = np.arange(count)[:, None, None] * 2
    images[:, 1] = 40
    images[:, 2] = 90
    return images


def number_at(sheet: Image.Image, x: float, y: float) -> int:
    red, green, blue = sheet.getpixel((round(x), round(y)))  # type: ignore[misc]
    assert (green, blue) == (40, 90), "no picture here"
    return int(red) // 2


def on_a_circle(count: int) -> NDArray[np.float32]:
    """Vector i stands at i degrees: i's neighbours are i - 1, i + 1, i - 2, ..."""
    angles = np.deg2rad(np.arange(count) + np.arange(count) ** 2 / 1e4)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32) * 7


def test_the_neighbours_are_those_of_a_loop_over_cosines() -> None:
    vectors = np.random.default_rng(0).normal(size=(30, 5)).astype(np.float32)
    rows, nearest, cosines = _nearest(vectors, 6, 4)
    assert rows.tolist() == [0, 5, 10, 15, 20, 25]
    for row, found, values in zip(rows.tolist(), nearest.tolist(), cosines.tolist(), strict=True):
        query = vectors[row].tolist()
        slow = {
            i: sum(a * b for a, b in zip(query, other, strict=True)) / math.hypot(*query) / math.hypot(*other)
            for i, other in enumerate(vectors.tolist())
            if i != row
        }
        wanted = sorted(slow, key=lambda i: -slow[i])[:4]
        assert found == wanted
        assert values == pytest.approx([slow[i] for i in wanted], abs=1e-5)


def test_queries_stand_left_and_their_neighbours_follow() -> None:
    sheet = contact_sheet(flat_pictures(100), on_a_circle(100), queries=4, neighbours=3)
    rows, nearest, _ = _nearest(on_a_circle(100), 4, 3)
    pixels = np.asarray(sheet)
    columns = [x for x in range(1, sheet.width) if _starts(pixels, x)]
    tops = [
        y
        for y in range(1, sheet.height)
        if (pixels[y, columns[0] + 5, 1:] == (40, 90)).all() and _is_top(pixels, y, columns[0])
    ]
    found = [[number_at(sheet, x + CELL_PX / 2, y + CELL_PX / 2) for x in columns] for y in tops]
    assert found == [[row, *others] for row, others in zip(rows.tolist(), nearest.tolist(), strict=True)]


def _starts(pixels: NDArray[np.uint8], x: int) -> bool:
    here, before = ((pixels[:, column, 1:] == (40, 90)).all(-1).any() for column in (x, x - 1))
    return bool(here and not before)


def _is_top(pixels: NDArray[np.uint8], y: int, x: int) -> bool:
    return not (pixels[y - 1, x + 5, 1:] == (40, 90)).all()


@pytest.mark.parametrize(
    ("frame", "cell"), [((32, 32), (96, 96)), ((256, 128), (192, 96)), ((224, 224), (96, 96)), ((16, 160), (19, 192))]
)
def test_small_and_tall_pictures_keep_their_shape(frame: tuple[int, int], cell: tuple[int, int]) -> None:
    images = flat_pictures(3, *frame)
    one, two = (contact_sheet(images, on_a_circle(3), queries=rows, neighbours=columns) for rows, columns in ((1, 1), (2, 2)))
    assert two.width - one.width == cell[1] + GAP_PX
    assert two.height - one.height >= cell[0] + GAP_PX


def test_each_neighbour_has_its_cosine_below_it() -> None:
    vectors = np.float32([[1, 0], [0.6, 0.8], [-1, 0]])
    sheets = [
        np.asarray(contact_sheet(flat_pictures(3), other, queries=1, neighbours=2))
        for other in (vectors, vectors * 3, np.float32([[1, 0], [0.8, 0.6], [-1, 0]]))
    ]
    assert (sheets[0] == sheets[1]).all(), "lengths do not count"
    changed = (sheets[0] != sheets[2]).any(-1)
    rows, columns = np.nonzero(changed)
    assert len(rows), "0.60 and 0.80 look the same"
    assert np.ptp(rows) < 15, "only the caption changes"
    assert np.ptp(columns) < CELL_PX


def test_the_title_is_written_on_top() -> None:
    plain, titled = (np.asarray(contact_sheet(flat_pictures(4), on_a_circle(4), title=title)) for title in ("", "step 12"))
    rows, _ = np.nonzero((plain != titled).any(-1))
    assert 0 < rows.max() < 40
    assert tuple(plain[0, 0]) == PAPER


def test_few_pictures_make_a_small_sheet() -> None:
    small, large = (contact_sheet(flat_pictures(count), on_a_circle(count)) for count in (2, 9))
    assert small.width < large.width
    assert small.height < large.height


def test_vectors_of_zero_do_no_harm() -> None:
    contact_sheet(flat_pictures(5), np.zeros((5, 3), np.float32))


@pytest.mark.parametrize(
    ("images", "vectors"),
    [
        (flat_pictures(1), on_a_circle(1)),
        (flat_pictures(3), on_a_circle(4)),
        (flat_pictures(3).astype(np.float32), on_a_circle(3)),
        (flat_pictures(3).transpose(0, 2, 3, 1), on_a_circle(3)),
    ],
)
def test_what_fits_nothing_is_refused(images: NDArray[np.uint8], vectors: NDArray[np.float32]) -> None:
    with pytest.raises(ValueError, match="wanted"):
        contact_sheet(images, vectors)


def test_it_is_saved_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sheet = contact_sheet(flat_pictures(4), on_a_circle(4))
    path = tmp_path / "run" / "contact_sheet.png"
    save_sheet(path, sheet)
    with Image.open(path) as read:
        assert read.format == "PNG"
        assert (np.asarray(read) == np.asarray(sheet)).all()
    before = path.read_bytes()

    def half_written(self: Image.Image, target: Path, kind: str, quality: int) -> None:
        Path(target).write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(Image.Image, "save", half_written)
    with pytest.raises(OSError, match="no space"):
        save_sheet(path, sheet)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["contact_sheet.png"]
