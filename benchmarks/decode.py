"""JPEG bytes -> uint8 frames of 224 px on one core: reduced decoding beside full, three sizes of photo, in one run.

python benchmarks/decode.py
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.embed import draw_scene  # noqa: E402
from serve.contract import Preprocess  # noqa: E402
from serve.preprocess import load_image  # noqa: E402

SIZES = ((500, 375), (1024, 768), (4000, 3000))
PHOTOS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    report = [measure(photos(rng, size), size, arguments.repeats) for size in SIZES]
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


def measure(files: list[bytes], size: tuple[int, int], repeats: int) -> dict[str, Any]:
    frames = {jpeg: frame(jpeg) for jpeg in ("full", "reduced")}
    pixels = {jpeg: np.stack([load_image(file, wanted) for file in files]) for jpeg, wanted in frames.items()}
    times_ms: dict[str, list[float]] = {jpeg: [] for jpeg in frames}
    for _ in range(repeats):
        for jpeg, wanted in frames.items():
            started = time.perf_counter()
            for file in files:
                load_image(file, wanted)
            times_ms[jpeg].append(1e3 * (time.perf_counter() - started) / len(files))
    apart = np.abs(pixels["full"].astype(int) - pixels["reduced"])
    full, reduced = (statistics.median(found) for found in times_ms.values())
    spread = ", ".join(f"{jpeg} {min(found):.1f} to {max(found):.1f}" for jpeg, found in times_ms.items())
    print(
        f"{size[0]} x {size[1]}: full {full:.1f} ms, reduced {reduced:.1f} ms ({full / reduced:.1f}x; {spread}); "
        f"apart {apart.mean():.2f} of 255 on average, {apart.max()} at most"
    )
    return {"size_px": size, "ms": times_ms, "mean_difference": float(apart.mean()), "max_difference": int(apart.max())}


def frame(jpeg: str) -> Preprocess:
    size = {"height_px": 224, "width_px": 224, "crop": 0.875}
    return Preprocess.model_validate(size | {"resize": "center_crop", "resample": "bicubic", "jpeg": jpeg})


def photos(rng: np.random.Generator, size: tuple[int, int]) -> list[bytes]:
    files = []
    for _ in range(PHOTOS):
        pixels = np.asarray(draw_scene(rng, size), np.float32) + rng.normal(0, 6, (size[1], size[0], 3))
        buffer = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
        files.append(buffer.getvalue())
    return files


if __name__ == "__main__":
    main()
