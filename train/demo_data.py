"""The built-in demo set: generated drawings of people walking past four cameras, in the Market-1501 layout.

No photograph and no real person is behind these pictures: every pixel is drawn here, from a seed. The set stands in
for a surveillance data set where none may be shipped. It keeps what makes re-identification hard: each camera has its
own background, colour cast, exposure, viewpoint and side of the person; clothes come from one small palette, so many
people share their colours and differ in pattern, cut, hair and bag; boxes jitter and bodies are sometimes hidden.

Two CSVs at the root of the set, `patterns_train.csv` and `patterns_test.csv`, make a classification task of the same
pictures: name the pattern of a person's top, and do it for people who were not in the training. A third, `tracks.csv`,
lists the training pictures as a tracker would hand them over: camera, time and track, and nobody's identity.
"""

import csv
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from tqdm import tqdm

from serve.files import atomic_folder
from serve.samples import JUNK_IDENTITY
from train.demo_figure import FACINGS, Facing, Look, Pen, draw_person, look_of, shade

WIDTH_PX, HEIGHT_PX, JPEG_QUALITY = 64, 128, 90
SUPERSAMPLING = 3  # everything is drawn this much larger, then averaged down: PIL's shapes have no smooth edges
DRAWING_VERSION = 1  # raise it when the pictures change: a folder drawn by older code is then not taken for this set
CAMERAS = (1, 2, 3, 4)
MOST_PEOPLE = 9999
DISTRACTOR_IDENTITY = "0000"  # Market-1501's mark for boxes of people who are in no query
PANORAMA_PX = (4 * WIDTH_PX * SUPERSAMPLING, HEIGHT_PX * SUPERSAMPLING + 40)
LOOK, WALK, FRAME, PLAN, TRACKER = range(5)  # keep the random streams of one seed apart
TRAIN, QUERY, GALLERY = "bounding_box_train", "query", "bounding_box_test"
PATTERN_FILES = {"patterns_train.csv": (TRAIN,), "patterns_test.csv": (QUERY, GALLERY)}
"""Each CSV and the folders whose pictures it lists; distractors and junk are in neither."""
TRACK_FILE = "tracks.csv"


@dataclass(frozen=True, kw_only=True)
class DemoSet:
    """How many pictures the demo set holds, and the seed they are drawn from."""

    train_identities: int = 160
    test_identities: int = 60
    train_images: int = 4
    """Per identity and camera, in bounding_box_train."""
    gallery_images: int = 3
    """Per identity and camera, in bounding_box_test; query holds one more of each."""
    distractors: int = 100
    """Boxes `0000_c...` of people nobody asks for, in bounding_box_test."""
    junk: int = 30
    """Boxes `-1_c...` that miss most of the person, in bounding_box_test."""
    seed: int = 0

    @property
    def people(self) -> int:
        """How many different people are drawn, passers-by aside."""
        return self.train_identities + self.test_identities + self.distractors + self.junk

    def __post_init__(self) -> None:
        for name, count in asdict(self).items():
            least = 1 if name.endswith(("identities", "images")) else 0
            if count < least:
                raise ValueError(f"{name} of a demo set: got {count}, wanted {least} or more; give a larger number")
        if self.people > MOST_PEOPLE:
            raise ValueError(
                f"people in a demo set: got {self.people}, wanted {MOST_PEOPLE} or fewer, for the file names have four "
                f"digits for an identity; ask for fewer identities, distractors or junk boxes"
            )


@dataclass(frozen=True)
class _Camera:
    """What stays with a camera: its place, its side of the people, and what its lens and sensor do."""

    paint_place: Callable[[ImageDraw.ImageDraw, int, int], None]
    facing: Facing
    tint: tuple[float, float, float]
    saturation: float
    black: float
    shear: float
    taper: float
    blur_px: float
    noise: float


@dataclass(frozen=True)
class _Box:
    """One picture to draw: where it goes, and the numbers that seed it."""

    folder: str
    name: str
    identity: str
    person: int
    camera: int
    frame: int

    @property
    def path(self) -> str:
        return f"{self.folder}/{self.name}"


def _cameras() -> tuple[_Camera, ...]:
    """The four cameras, in the order of their numbers."""
    return (
        _Camera(_paint_street, "front", (1.05, 1.01, 0.95), 1.00, 4.0, 0.02, 0.05, 0.2, 4.0),
        _Camera(_paint_station, "back", (0.88, 0.94, 0.93), 0.88, 2.0, -0.05, 0.16, 0.5, 6.0),
        _Camera(_paint_park, "right", (0.98, 1.03, 0.97), 1.00, 8.0, 0.05, 0.00, 0.1, 4.0),
        _Camera(_paint_car_park, "left", (0.94, 0.96, 1.03), 0.85, 16.0, -0.03, 0.22, 0.6, 5.0),
    )


def _scene_of(camera: _Camera) -> Image.Image:
    """What the camera sees without people, wide enough for a box anywhere along the way.

    Out of focus, greyish and about as bright in all four: the place must not be the easy cue, clothes must.
    """
    image = Image.new("RGB", PANORAMA_PX, (156, 154, 150))
    camera.paint_place(ImageDraw.Draw(image), *PANORAMA_PX)
    return image.filter(ImageFilter.GaussianBlur(SUPERSAMPLING))


def _paint_street(draw: ImageDraw.ImageDraw, width: int, height: int) -> None:
    draw.rectangle((0, 0, width, 230), fill=(160, 150, 140))
    for x in range(20, width, 150):
        draw.rectangle((x, 30, x + 90, 190), fill=(126, 132, 140), outline=(186, 178, 168), width=7)
        draw.line((x + 45, 30, x + 45, 190), fill=(182, 174, 166), width=5)
    draw.rectangle((0, 222, width, 234), fill=(124, 118, 112))
    for x in range(0, width + 60, 70):
        draw.line((x, 234, x - 50, height), fill=(140, 138, 134), width=4)


def _paint_station(draw: ImageDraw.ImageDraw, width: int, height: int) -> None:
    for x in range(0, width, 190):
        draw.rectangle((x + 20, 0, x + 64, 230), fill=(132, 136, 136))
        draw.rectangle((x + 90, 50, x + 160, 110), fill=(120, 134, 150), outline=(176, 176, 172), width=6)
    draw.rectangle((0, 222, width, height), fill=(146, 142, 136))
    for k in range(1, 6):
        draw.line((0, 216 + 8 * k * k, width, 216 + 8 * k * k), fill=(168, 164, 158), width=2 + k)


def _paint_park(draw: ImageDraw.ImageDraw, width: int, height: int) -> None:
    draw.rectangle((0, 0, width, 220), fill=(166, 176, 172))
    for k, x in enumerate(range(-60, width, 60)):
        draw.ellipse((x, 20 + 25 * (k % 3), x + 130, 250), fill=(126, 142 + 8 * (k % 3), 118))
    draw.rectangle((0, 200, width, height), fill=(146, 154, 128))
    draw.polygon([(0, 320), (width, 280), (width, 420), (0, 440)], fill=(172, 164, 148))


def _paint_car_park(draw: ImageDraw.ImageDraw, width: int, height: int) -> None:
    draw.rectangle((0, 0, width, 60), fill=(164, 164, 160))
    for k, paint in enumerate(((150, 116, 112), (118, 132, 150), (176, 176, 172), (112, 114, 116))):
        x = 200 * k
        draw.rounded_rectangle((x + 30, 44, x + 140, 120), 26, fill=shade(paint, 0.82))
        draw.rounded_rectangle((x, 86, x + 170, 160), 26, fill=paint)
        draw.line((x + 186, 130, x + 140, height), fill=(186, 184, 178), width=9)


def _box_image(spec: DemoSet, box: _Box, camera: _Camera, scene: Image.Image) -> Image.Image:
    """The finished picture of one box; depends on nothing but its arguments."""
    look = _look_of_person(spec, box.person)
    walk = np.random.default_rng((spec.seed, WALK, box.person, box.camera))
    rng = np.random.default_rng((spec.seed, FRAME, box.person, box.camera, box.frame))
    facing = camera.facing if walk.random() < 0.6 else FACINGS[int(walk.integers(4))]
    # Junk is what a detector returns when it misses: the person stands mostly outside the box.
    people = [(look, rng.choice((-1, 1)) * rng.uniform(0.45, 0.7) if box.identity == JUNK_IDENTITY else 0.0)]
    if rng.random() < 0.1:
        passer_by = (look_of(rng), rng.choice((-1, 1)) * rng.uniform(0.36, 0.5))
        people.insert(int(rng.integers(2)), passer_by)
    canvas = _crop_scene(scene, rng)
    for someone, aside in people:
        pen = _pen_of(canvas, camera, someone, facing, rng, float(aside))
        draw_person(pen, someone, facing, rng.uniform(0, math.tau))
    _draw_obstacle(ImageDraw.Draw(canvas), rng)
    return _photograph(canvas, camera, rng)


def _look_of_person(spec: DemoSet, person: int) -> Look:
    return look_of(np.random.default_rng((spec.seed, LOOK, person)))


def _crop_scene(scene: Image.Image, rng: np.random.Generator) -> Image.Image:
    width, height = WIDTH_PX * SUPERSAMPLING, HEIGHT_PX * SUPERSAMPLING
    left, upper = int(rng.integers(scene.width - width)), int(rng.integers(scene.height - height))
    return scene.crop((left, upper, left + width, upper + height))


def _pen_of(canvas: Image.Image, camera: _Camera, look: Look, facing: Facing, rng: np.random.Generator, aside: float) -> Pen:
    """Stands a person in the box, `aside` box widths from its middle, as loosely as a detector frames people."""
    foot = canvas.width * (0.5 + aside + rng.uniform(-0.13, 0.13)), canvas.height * rng.uniform(0.93, 1.0)
    height = canvas.height * 0.95 * look.stature * rng.uniform(0.88, 1.1)
    return Pen(canvas, foot=foot, height=height, shear=camera.shear, taper=camera.taper, mirror=facing in ("left", "back"))


def _draw_obstacle(draw: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    """Now and then a lamp post or a bush between the camera and the person."""
    width, height = WIDTH_PX * SUPERSAMPLING, HEIGHT_PX * SUPERSAMPLING
    what, x = rng.random(), float(rng.uniform(0, width))
    if what < 0.06:
        draw.rectangle((x, 0, x + 0.1 * width, height), fill=(92, 94, 98))
        draw.rectangle((x, 0, x + 0.03 * width, height), fill=(122, 124, 128))
    elif what < 0.13:
        for dx, rise in rng.uniform((-0.5, 0.1), (0.5, 0.3), (14, 2)):
            cx, cy, radius = x + dx * width, height * (1.05 - rise), 0.13 * width
            green = (70 + round(90 * rise), 112 + round(80 * rise), 66)
            draw.ellipse((cx - radius, cy - radius, cx + radius, cy + radius), fill=green)


def _photograph(canvas: Image.Image, camera: _Camera, rng: np.random.Generator) -> Image.Image:
    """Lens, sensor and colour cast of the camera; the light changes a little from frame to frame."""
    image = canvas.reduce(SUPERSAMPLING).filter(ImageFilter.BoxBlur(camera.blur_px))
    grey = np.array((0.3, 0.59, 0.11))
    mix = camera.saturation * np.eye(3) + (1 - camera.saturation) * grey
    light = rng.uniform(0.8, 1.2) * rng.uniform(0.95, 1.05, 3)  # a cloud, a lamp, the white balance hunting
    gain = np.array(camera.tint) * light * (1 - camera.black / 255)
    matrix = np.column_stack([gain[:, None] * mix, np.full(3, camera.black)])
    image = image.convert("RGB", tuple(matrix.ravel().tolist()))
    noisy = np.asarray(image) + rng.normal(0, camera.noise, (HEIGHT_PX, WIDTH_PX, 1))
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))


def _plan(spec: DemoSet) -> list[_Box]:
    """Every picture of the set; identities of training and test are drawn from one shuffled range, as in Market-1501."""
    order = np.random.default_rng((spec.seed, PLAN)).permutation(spec.train_identities + spec.test_identities) + 1
    train, test = order[: spec.train_identities].tolist(), order[spec.train_identities :].tolist()
    first_distractor = len(order) + 1
    return [
        *_tracks(TRAIN, train, spec.train_images, 0, spec),
        *_tracks(QUERY, test, 1, 0, spec),
        *_tracks(GALLERY, test, spec.gallery_images, 1, spec),
        *_strangers(DISTRACTOR_IDENTITY, first_distractor, spec.distractors, spec),
        *_strangers(JUNK_IDENTITY, first_distractor + spec.distractors, spec.junk, spec),
    ]


def _tracks(folder: str, identities: list[int], count: int, first: int, spec: DemoSet) -> Iterator[_Box]:
    """`count` frames of each identity in each camera, from the `first` frame of its walk on."""
    for identity in sorted(identities):
        for camera in CAMERAS:
            for step in range(first, first + count):
                yield _box_of(folder, f"{identity:04d}", identity, camera, step, spec)


def _strangers(identity: str, first_person: int, count: int, spec: DemoSet) -> Iterator[_Box]:
    for person in range(first_person, first_person + count):
        yield _box_of(GALLERY, identity, person, CAMERAS[person % len(CAMERAS)], 0, spec)


def _box_of(folder: str, identity: str, person: int, camera: int, step: int, spec: DemoSet) -> _Box:
    walk = np.random.default_rng((spec.seed, PLAN, person, camera))
    sequence, start, number = (int(walk.integers(*span)) for span in ((1, 7), (0, 80), (1, 6)))
    # The person is in the frame number too, so that boxes that share the mark 0000 or -1 never share a name.
    frame = 100 * person + start + 5 * step
    name = f"{identity}_c{camera}s{sequence}_{frame:06d}_{number:02d}.jpg"
    return _Box(folder, name, identity, person, camera, frame)


def draw_demo_set(out: Path, spec: DemoSet = DemoSet(), *, progress: bool = True) -> Path:
    """Draws the set into the folder `out` and returns it; a complete set of the same spec is kept as it is.

    Raises FileExistsError where `out` holds anything else. `out` appears whole or not at all.
    """
    out, boxes = Path(out), _plan(spec)
    if _holds_set(out, spec, boxes):
        return out
    _refuse_anything_else(out, spec)
    with atomic_folder(out) as staged:
        _draw_boxes(staged, spec, boxes, progress)
        _write_patterns(staged, spec, boxes)
        _write_tracks(staged, spec, boxes)
        (staged / "demo_set.json").write_text(json.dumps(_described(spec), indent=2) + "\n")
        _refuse_anything_else(out, spec)  # again: what came here while we drew would be replaced
    return out


def _refuse_anything_else(out: Path, spec: DemoSet) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(
            f"demo set: got {out}, which holds something else, wanted a new folder or a complete set drawn with "
            f"{spec}; move it away or name another folder"
        )


def _draw_boxes(folder: Path, spec: DemoSet, boxes: list[_Box], progress: bool) -> None:
    for name in (TRAIN, QUERY, GALLERY):
        (folder / name).mkdir()
    views = [(camera, _scene_of(camera)) for camera in _cameras()]
    for box in tqdm(boxes, desc="drawing the demo set", unit="image", disable=not progress):
        image = _box_image(spec, box, *views[box.camera - 1])
        image.save(folder / box.path, quality=JPEG_QUALITY)


def _write_patterns(folder: Path, spec: DemoSet, boxes: list[_Box]) -> None:
    for name, folders in PATTERN_FILES.items():
        with (folder / name).open("w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file, lineterminator="\n")
            rows.writerow(("path", "label", "identity", "camera", "time"))
            for box in boxes:
                if box.folder in folders and box.identity not in (DISTRACTOR_IDENTITY, JUNK_IDENTITY):
                    pattern = _look_of_person(spec, box.person).pattern
                    rows.writerow((box.path, pattern, box.identity, box.camera, box.frame))


def _write_tracks(folder: Path, spec: DemoSet, boxes: list[_Box]) -> None:
    """Tracks are numbered at random, lest the same number in two cameras, or its order, tell who it is."""
    walks = sorted({(box.person, box.camera) for box in boxes if box.folder == TRAIN})
    numbers = np.random.default_rng((spec.seed, TRACKER)).permutation(len(walks)).tolist()
    track_of = dict(zip(walks, numbers, strict=True))
    with (folder / TRACK_FILE).open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(("path", "camera", "time", "track"))
        rows.writerows(
            (box.path, box.camera, box.frame, track_of[box.person, box.camera]) for box in boxes if box.folder == TRAIN
        )


def _described(spec: DemoSet) -> dict[str, int]:
    return {"drawing_version": DRAWING_VERSION, **asdict(spec)}


def _holds_set(folder: Path, spec: DemoSet, boxes: list[_Box]) -> bool:
    try:
        found = json.loads((folder / "demo_set.json").read_text())
    except (OSError, ValueError):
        return False
    wanted = [*PATTERN_FILES, TRACK_FILE, *(box.path for box in boxes)]
    return bool(found == _described(spec)) and all((folder / path).is_file() for path in wanted)
