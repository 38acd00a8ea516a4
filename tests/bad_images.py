"""Pictures as they come from the world: damaged, hostile, or only unusual. One function for all the doors they are tried at."""

import io
import struct
import zlib

import numpy as np
from PIL import Image


def good(number: int = 0) -> bytes:
    """A picture like any other; another one for each number."""
    pixels = np.random.default_rng(number).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    return encoded(Image.fromarray(pixels))


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def refused() -> dict[str, bytes]:
    """Name -> a file that no picture can be made of."""
    jpeg = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8)), "JPEG")
    png = good()
    return {
        "empty": b"",
        "truncated JPEG": jpeg[: len(jpeg) // 2],
        "truncated PNG": png[: len(png) // 2],
        "header alone": jpeg[:20],
        "wrong magic bytes": b"\x89PNG\r\n\x1a\n" + jpeg[8:],
        "text": b"<html>404 not found</html>",
        "20,000 x 20,000": png_of_size(20_000, 20_000),
        "decompression bomb": png_of_size(2_000_000, 2_000_000),
        "GIF that claims 65,535 x 65,535": b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0) + b",",
        "compressed text bomb": png_with_text_bomb(),
    }


def accepted() -> dict[str, bytes]:
    """Name -> an unusual file that is a picture all the same."""
    rng = np.random.default_rng(1)
    colours = Image.fromarray(rng.integers(0, 256, (40, 30, 3), dtype=np.uint8))
    frames = [Image.fromarray(rng.integers(0, 256, (40, 30, 3), dtype=np.uint8)) for _ in range(3)]
    return {
        "1 x 1": encoded(colours.crop((0, 0, 1, 1))),
        "1 x 3000": encoded(Image.new("RGB", (1, 3000), "red")),
        "animated": encoded(colours, "GIF", save_all=True, append_images=frames),
        "CMYK": encoded(colours.convert("CMYK"), "JPEG"),
        "16-bit": encoded(Image.fromarray(rng.integers(0, 65536, (40, 30), dtype=np.uint16))),
    }


def png_of_size(width: int, height: int) -> bytes:
    """A PNG of some bytes that says it has so many pixels."""
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)) + _chunk(b"IDAT", b"")


def png_with_text_bomb() -> bytes:
    """A good PNG with 200 MB of compressed text in front of its pixels."""
    png = good()
    text = b"comment\0\0" + zlib.compress(bytes(200_000_000), 9)
    return png[:33] + _chunk(b"zTXt", text) + png[33:]


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
