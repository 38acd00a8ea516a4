"""One generated person for the demo set: looks drawn from a seed, and the pen that draws them as one camera sees them.

Clothes come from one small palette, so many people share their colours and differ in pattern, cut, hair and bag.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal, TypeVar

import numpy as np
from PIL import Image, ImageDraw

RGB = tuple[int, int, int]
Ink = RGB | tuple[int, int, int, int]  # the fourth is opacity
Point = tuple[float, float]
Facing = Literal["front", "back", "left", "right"]
FACINGS: tuple[Facing, ...] = ("front", "back", "left", "right")
Choice = TypeVar("Choice")

PATTERNS = ("plain", "horizontal stripes", "vertical stripes", "checks", "dots", "half and half")
"""What a top may look like, in words for a reader: these are the labels of the demo's classes."""
CLOTHES: tuple[RGB, ...] = (
    (236, 234, 228), (38, 38, 44), (132, 136, 142), (36, 52, 104), (96, 156, 206),
    (190, 44, 46), (52, 112, 70), (222, 176, 62), (198, 178, 146), (176, 96, 142),
)  # fmt: skip
LOWER_CLOTHES: tuple[RGB, ...] = ((42, 42, 50), (44, 60, 98), (92, 118, 158), (128, 128, 132), (190, 172, 140))
SKINS: tuple[RGB, ...] = ((244, 208, 180), (226, 178, 140), (188, 132, 94), (138, 92, 64), (96, 64, 46))
HAIRS: tuple[RGB, ...] = ((30, 26, 26), (74, 48, 34), (128, 84, 48), (206, 168, 100), (156, 152, 150))


@dataclass(frozen=True)
class Look:
    """What stays with an identity from camera to camera. Lengths are fractions of the body height."""

    stature: float
    girth: float
    hip: float
    skin: RGB
    hair: str
    hair_colour: RGB
    top: RGB
    trim: RGB
    pattern: str
    hem: float
    long_sleeves: bool
    lower: str
    lower_colour: RGB
    shoes: RGB
    bag: str
    bag_colour: RGB


def look_of(rng: np.random.Generator) -> Look:
    """The next person that `rng` comes up with."""

    def pick(options: Sequence[Choice]) -> Choice:
        return options[int(rng.integers(len(options)))]

    top = pick(CLOTHES)
    # A trim as bright as its ground would leave no pattern to see once colours are jittered or lost.
    trims = tuple(colour for colour in CLOTHES if abs(_brightness(colour) - _brightness(top)) > 70)
    return Look(
        stature=rng.uniform(0.92, 1.0),
        girth=rng.uniform(0.84, 1.14),
        hip=rng.uniform(0.43, 0.49),
        skin=pick(SKINS),
        hair=pick(("short", "short", "long", "long", "bun", "curls", "cap")),
        hair_colour=pick(HAIRS),
        top=top,
        trim=pick(trims),
        pattern=pick(PATTERNS),
        hem=pick((0.02, 0.02, 0.13)),
        long_sleeves=bool(rng.random() < 0.55),
        lower=pick(("trousers", "trousers", "shorts", "skirt")),
        lower_colour=pick(LOWER_CLOTHES),
        shoes=pick(CLOTHES),
        bag=pick(("none", "backpack", "handbag")),
        bag_colour=pick(CLOTHES),
    )


def _brightness(colour: RGB) -> float:
    return 0.3 * colour[0] + 0.59 * colour[1] + 0.11 * colour[2]


def shade(colour: RGB, factor: float) -> RGB:
    """The colour `factor` times as bright: below 1 for what lies in shadow."""
    red, green, blue = (min(255, round(channel * factor)) for channel in colour)
    return red, green, blue


class Pen:
    """Draws in body units (x right, y up, feet at 0, crown at 1) as one camera sees them."""

    def __init__(self, image: Image.Image, *, foot: Point, height: float, shear: float, taper: float, mirror: bool) -> None:
        self.draw = ImageDraw.Draw(image, "RGBA")
        self.foot, self.height, self.shear, self.taper = foot, height, shear, taper
        self.sign = -1.0 if mirror else 1.0

    def at(self, x: float, y: float) -> Point:
        """Where a body point lands: a camera that looks down sees the head larger than the feet."""
        spread = 1 + self.taper * (y - 0.5)
        return self.foot[0] + self.height * (self.sign * x * spread + self.shear * y), self.foot[1] - self.height * y

    def shape(self, points: list[Point], colour: Ink) -> None:
        """A filled polygon."""
        self.draw.polygon([self.at(x, y) for x, y in points], fill=colour)

    def disc(self, x: float, y: float, radius_x: float, radius_y: float, colour: Ink) -> None:
        """A filled ellipse; the camera moves its middle and leaves its outline as it is."""
        (cx, cy), rx, ry = self.at(x, y), radius_x * self.height, radius_y * self.height
        self.draw.ellipse((cx - rx, cy - ry, cx + rx, cy + ry), fill=colour)

    def crown(self, x: float, y: float, radius_x: float, radius_y: float, colour: RGB, tilt: float) -> None:
        """The upper half of a disc, turned towards the back of the head by `tilt` degrees."""
        (cx, cy), rx, ry = self.at(x, y), radius_x * self.height, radius_y * self.height
        start = 180 + self.sign * tilt
        self.draw.chord((cx - rx, cy - ry, cx + rx, cy + ry), start, start + 180, fill=colour)

    def limb(self, points: list[Point], width: float, colour: RGB) -> None:
        """A thick line from joint to joint, round at each."""
        radius = width * self.height / 2
        joints = [self.at(x, y) for x, y in points]
        self.draw.line(joints, fill=colour, width=round(2 * radius))
        for x, y in joints:
            self.draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)


def draw_person(pen: Pen, look: Look, facing: Facing, phase: float) -> None:
    """One walking person, far parts first. `phase` is the angle within a stride, in radians."""
    side = facing in ("left", "right")
    swing = math.sin(phase)
    pen.disc(0.0, 0.012, 0.3, 0.03, (0, 0, 0, 70))  # cast on the ground
    _draw_leg(pen, look, side, -1, -swing)
    _draw_arm(pen, look, side, -1, swing)
    _draw_leg(pen, look, side, 1, swing)
    _draw_skirt(pen, look, side, swing)
    nearer = (_draw_loose_hair, _draw_backpack, _draw_torso) if facing != "back" else (_draw_torso, _draw_backpack)
    for part in nearer:
        part(pen, look, facing)
    _draw_head(pen, look, facing)
    _draw_arm(pen, look, side, 1, -swing)


def _draw_leg(pen: Pen, look: Look, side: bool, which: int, swing: float) -> None:
    hip, lift = look.hip, 0.045 * max(0.0, swing)
    if side:
        joints = [(0.0, hip), (0.10 * swing + 0.02, hip * 0.53), (0.19 * swing, 0.05 + 0.5 * lift)]
    else:
        x = 0.07 * which * look.girth
        joints = [(x, hip), (x * 1.1, hip * 0.53), (x * 1.1, 0.04 + lift)]
    colour = shade(look.lower_colour, 0.78 if which < 0 else 1.0)
    pen.limb(joints, 0.07, shade(look.skin, 0.85 if which < 0 else 1.0))
    if look.lower == "trousers":
        pen.limb(joints, 0.105 * look.girth, colour)
    elif look.lower == "shorts":
        pen.limb(joints[:2], 0.125 * look.girth, colour)
    (foot_x, foot_y), toe = joints[2], 0.035 if side else 0.0
    pen.disc(foot_x + toe, foot_y - 0.02, 0.07 if side else 0.048, 0.028, look.shoes)


def _draw_skirt(pen: Pen, look: Look, side: bool, swing: float) -> None:
    if look.lower == "skirt":
        waist, flare = (0.10, 0.16) if side else (0.13, 0.20)
        waist, flare, sway = waist * look.girth, flare * look.girth, 0.02 * swing
        knee = look.hip * 0.55
        hem = [(flare + sway, knee), (-flare + sway, knee)]
        pen.shape([(-waist, look.hip + 0.05), (waist, look.hip + 0.05), *hem], look.lower_colour)


def _draw_arm(pen: Pen, look: Look, side: bool, which: int, swing: float) -> None:
    dark = 0.8 if which < 0 else 1.0
    shoulder = (0.0, 0.765) if side else (0.158 * which * look.girth, 0.765)
    if side:
        joints = [shoulder, (0.09 * swing - 0.02, 0.62), (0.19 * swing + 0.03, 0.48)]
    else:
        joints = [shoulder, (shoulder[0] * 1.22, 0.62), (shoulder[0] * 1.22, 0.48 + 0.03 * swing)]
    pen.limb(joints, 0.058, shade(look.skin, dark))
    sleeve = joints if look.long_sleeves else joints[:2]
    end = (0.85 * sleeve[-1][0] + 0.15 * sleeve[-2][0], 0.85 * sleeve[-1][1] + 0.15 * sleeve[-2][1])
    pen.limb([*sleeve[:-1], end], 0.078, shade(look.top, dark * 0.9))
    if look.bag == "handbag" and which > 0:
        _draw_handbag(pen, look, joints[2])


def _draw_handbag(pen: Pen, look: Look, hand: Point) -> None:
    x, y = hand
    pen.limb([(x - 0.05, y - 0.09), (x, y), (x + 0.05, y - 0.09)], 0.018, shade(look.bag_colour, 0.7))
    pen.shape([(x - 0.08, y - 0.07), (x + 0.08, y - 0.07), (x + 0.1, y - 0.21), (x - 0.1, y - 0.21)], look.bag_colour)


def _draw_torso(pen: Pen, look: Look, facing: Facing) -> None:
    hem, shoulder = look.hip - look.hem, 0.81
    narrow = look.girth * (0.68 if facing in ("left", "right") else 1.0)

    def place(u: float, v: float) -> Point:
        """Cloth coordinates (u in -1..1 across, v in 0..1 from hem to shoulder) to body units."""
        half = 0.122 + 0.04 * v if v < 0.85 else 0.156 - 0.5 * (v - 0.85)
        return u * half * narrow, hem + v * (shoulder - hem)

    def cloth(left: float, right: float, low: float, high: float, colour: Ink) -> None:
        levels = [low, *(v for v in (0.85,) if low < v < high), high]
        pen.shape([place(left, v) for v in levels] + [place(right, v) for v in reversed(levels)], colour)

    cloth(-1, 1, 0, 1, look.top)
    for left, right, low, high in _pattern_patches(look.pattern):
        cloth(left, right, low, high, look.trim)
    if look.pattern == "dots":
        for row, column in product(range(4), (-0.68, 0.0, 0.55)):
            pen.disc(*place(column + 0.33 * (row % 2), 0.12 + 0.21 * row), 0.03, 0.03, look.trim)
    cloth(0.6, 1, 0, 1, (0, 0, 0, 40))
    if facing == "front" and look.bag == "backpack":
        for x in (-0.085, 0.085):
            pen.limb([(x, 0.79), (x * 1.2, 0.62)], 0.032, shade(look.bag_colour, 0.72))


def _pattern_patches(pattern: str) -> list[tuple[float, float, float, float]]:
    """The trim-coloured patches of a pattern: left, right, low, high in cloth coordinates."""
    if pattern == "horizontal stripes":
        return [(-1.0, 1.0, k / 4 + 0.02, k / 4 + 0.13) for k in range(4)]
    if pattern == "vertical stripes":
        return [(k / 2.5 - 0.9, k / 2.5 - 0.7, 0.0, 1.0) for k in range(5)]
    if pattern == "checks":
        return [(i / 2 - 1, i / 2 - 0.5, j / 5, j / 5 + 0.2) for i, j in product(range(4), range(5)) if (i + j) % 2]
    return [(-1.0, 1.0, 0.0, 0.5)] if pattern == "half and half" else []


def _draw_backpack(pen: Pen, look: Look, facing: Facing) -> None:
    if look.bag == "backpack" and facing != "front":
        x, half = (0.0, 0.115) if facing == "back" else (-0.15, 0.075)
        corners = [(-1.0, 0.53), (-1.0, 0.74), (-0.7, 0.785), (0.7, 0.785), (1.0, 0.74), (1.0, 0.53)]
        pocket = [(-0.75, 0.55), (-0.75, 0.64), (0.75, 0.64), (0.75, 0.55)]
        pen.shape([(x + u * half, y) for u, y in corners], look.bag_colour)
        pen.shape([(x + u * half, y) for u, y in pocket], shade(look.bag_colour, 0.72))


def _draw_loose_hair(pen: Pen, look: Look, facing: Facing) -> None:
    """What hangs or stands out around the head; from the front it is behind face and shoulders."""
    x = -0.04 if facing in ("left", "right") else 0.0
    if look.hair == "long":
        pen.limb([(x, 0.905), (1.3 * x, 0.78)], 0.165 if x else 0.19, look.hair_colour)
    elif look.hair == "curls":
        pen.disc(x / 2, 0.92, 0.112, 0.1, look.hair_colour)
    elif look.hair == "bun":
        pen.disc(2 * x, 0.99, 0.042, 0.036, look.hair_colour)


def _draw_head(pen: Pen, look: Look, facing: Facing) -> None:
    side, y = facing in ("left", "right"), 0.905
    pen.limb([(0.0, 0.79), (0.0, 0.85)], 0.07, shade(look.skin, 0.85))
    pen.disc(0.0, y, 0.076, 0.086, look.skin)
    if facing == "back":
        _draw_loose_hair(pen, look, facing)
        pen.disc(0.0, y + 0.008, 0.081, 0.084, look.hair_colour)
    else:
        for x in (0.045,) if side else (-0.028, 0.028):
            pen.disc(x, y - 0.012, 0.010, 0.012, (40, 32, 32))
    cap = look.hair == "cap"
    colour = look.bag_colour if cap else look.hair_colour
    pen.crown(0.0, y + 0.018, 0.083, 0.082, colour, tilt=-40 if side and not cap else 0)
    if cap and facing != "back":
        pen.disc(0.08 if side else 0.0, y + 0.022, 0.055 if side else 0.072, 0.014, shade(colour, 0.75))
