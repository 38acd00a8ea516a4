"""Uploads as no client makes them: pictures cut, flipped, spliced and blown up; forms, lengths and types that lie; slow bodies.

Every trial has a number, which is its seed. Whatever comes, the server answers that it does not like it or hangs up on who
hangs up; never with a 5xx, never at the cost of a good picture in the same form, in bounded memory.
"""

import json
import random
import re
import socket
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
from PIL import Image

from serve.encoder import OnnxEncoder
from tests.api_server import LIMITS, api_server
from tests.bad_images import accepted, encoded, good, png_of_size, refused
from tests.toy_encoder import write_toy_encoder

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the server's memory is read from /proc")
PATIENCE_S = 60
ANSWERS = {200, 201, 400, 408, 409, 413, 415, 422}
MOST_MB = 800
"""It has 260 after thousands of these; a picture of 64 megapixels, the largest that is decoded, is 192 for each core."""
KINDS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF")
ROUTES = (
    *("POST /v1/embed", "POST /v1/classify", "POST /v1/search/image", "POST /v1/reid/identify/image"),
    *("POST /v1/items", "PUT /v1/items/1/image"),
)
TYPES = (
    *("image/png", "image/jpeg", "application/octet-stream", 'IMAGE/x; q="', "image/", "text/html", "application/json", ""),
    *("multipart/form-data", "multipart/form-data; boundary=", "multipart/mixed; boundary=x", "\xff", "a" * 5000),
)
GOOD = [good(number) for number in range(4)]


@dataclass(frozen=True)
class Attack:
    wire: bytes
    """All that is sent."""
    pause_s: float = 0.0
    """In the middle of it."""
    hangs_up: bool = False
    """It promises more than it sends, and may get no answer."""
    places: dict[int, int] = field(default_factory=dict)
    """Where among the results which of the good pictures has to be."""


def test_no_upload_hurts(tmp_path, full):
    trials = 20_000 if full else 800
    wanted = OnnxEncoder(write_toy_encoder(tmp_path / "encoder")[0]).embed(GOOD)
    with api_server(tmp_path / "server") as (url, process), ThreadPoolExecutor(6) as pool:
        address = urlsplit(url).hostname, urlsplit(url).port
        found = list(pool.map(lambda trial: judged(address, trial, wanted), range(trials)))
        assert [fault for fault, _ in found if fault] == []
        assert httpx.get(f"{url}/health/ready").json() == {"status": "ready"}
        assert memory_mb(process.pid) < MOST_MB
    statuses = Counter(status for _, status in found)
    print(f"{trials} uploads: {dict(statuses)}")
    assert {200, 400, 408, 413, 415, 422} <= statuses.keys(), "the attacks have lost their edge"


def judged(address, trial, wanted):
    """What is wrong with the answer, and its status."""
    attack = make_attack(random.Random(trial))  # noqa: S311
    status, body = send(address, attack)
    what = f"trial {trial}, {attack.wire[:60]!r}: {status} {body[:200]!r}"
    if status is None:
        return None if attack.hangs_up else what, status
    if status not in ANSWERS or (attack.places and status != 200):
        return what, status
    results = json.loads(body)["results"] if attack.places else []
    for place, number in attack.places.items():
        vector = results[place].get("embedding", [0.0])
        if len(vector) != len(wanted[0]) or not np.allclose(vector, wanted[number], atol=1e-5):
            return what, status
    return None, status


def send(address, attack):
    """The status and the body of the answer; None, b"" if the server hangs up."""
    half = len(attack.wire) // 2
    with socket.create_connection(address, timeout=PATIENCE_S) as connection:
        with suppress(OSError):  # it does not want to hear the rest; its answer may be there
            connection.sendall(attack.wire[:half])
            time.sleep(attack.pause_s)
            connection.sendall(attack.wire[half:])
            if attack.hangs_up:
                connection.shutdown(socket.SHUT_WR)
        try:
            answer = HTTPResponse(connection)
            answer.begin()
            return answer.status, answer.read()
        except (HTTPException, ConnectionError):
            return None, b""


def make_attack(rng):
    kinds = {bad_picture: 30, bad_neighbours: 30, bad_form: 20, wrong_type: 8, lying_length: 8, broken_chunks: 3, slow: 1}
    (kind,) = rng.choices(list(kinds), kinds.values())
    return kind(rng)


def bad_picture(rng):
    return Attack(request(rng.choice(ROUTES), mutated(rng), rng.choice(TYPES[:3])))


def bad_neighbours(rng):
    numbers = [rng.choice([None, 0, 1, 2, 3]) for _ in range(rng.randint(2, LIMITS.max_pictures))]
    body, boundary = form([mutated(rng) if number is None else GOOD[number] for number in numbers])
    places = {place: number for place, number in enumerate(numbers) if number is not None}
    wire = request("POST /v1/embed", body, f"multipart/form-data; boundary={boundary}")
    return Attack(wire, places=places if len(body) <= LIMITS.max_bytes else {})


def bad_form(rng):
    body, boundary = form([rng.choice(GOOD), mutated(rng)][: rng.randint(1, 2)])
    mark = f"--{boundary}".encode()
    broken = rng.choice(
        [
            lambda: flipped(rng, body),
            lambda: body[: rng.randrange(len(body))],
            lambda: body.replace(mark, b"--other", rng.randint(1, 2)),
            lambda: body.replace(mark, mark + b"\n"),
            lambda: body.replace(b"\r\n", b"\n"),
            lambda: body.replace(b'name="images"', rng.choice([b"", b'name="images', b"name*=utf-8''images", b'name="\x00"'])),
            lambda: body.replace(b'filename="', b'filename="../../' + rng.choice([b"\xff\xfe", b"a" * 9000, b"\r\nX: y\r\n"])),
            lambda: body.replace(b"Content-Type:", b"Content-Transfer-Encoding: base64\r\nContent-Type:"),
            lambda: body.replace(b"octet-stream", b"mixed; boundary=inner") + form([GOOD[0]], "inner")[0],
            lambda: form([form([GOOD[0]], "inner")[0], body])[0],
            lambda: form([b""] * rng.choice([17, 2000]))[0],
            lambda: mark + b"\r\n" + b"X: y\r\n" * rng.choice([10, 10_000]) + b"\r\n" + body,
            lambda: b"",
        ]
    )()
    kind = rng.choice(
        ["multipart/form-data; boundary={}", 'multipart/form-data; boundary="{}"', "multipart/form-data;boundary={};x=y"]
    )
    return Attack(request(rng.choice(ROUTES), broken, kind.format(boundary)))


def wrong_type(rng):
    body = rng.choice([mutated(rng), form([rng.choice(GOOD)])[0], b"", b'{"images": []}'])
    return Attack(request(rng.choice(ROUTES), body, rng.choice(TYPES)))


def lying_length(rng):
    body = mutated(rng)
    lie = rng.choice(
        [len(body) + 1, len(body) + 10_000, len(body) // 2, 2**21 + 1, 2**62, -1, "1e3", "0x10", "", f"{len(body)}, 7"]
    )
    more = "Transfer-Encoding: chunked\r\n" if rng.random() < 0.2 else ""
    return Attack(request(rng.choice(ROUTES), body, "image/png", f"Content-Length: {lie}\r\n{more}"), hangs_up=True)


def broken_chunks(rng):
    body = mutated(rng)[:5000]
    sizes = rng.choice([f"{len(body):x}", "fffffffffffffff", "-1", "zz", "0", f"{len(body):x};a=b", f"{len(body) // 2:x}"])
    chunks = f"{sizes}\r\n".encode() + body + rng.choice([b"\r\n0\r\n\r\n", b"\r\n", b"0\r\n\r\n"])
    return Attack(request(rng.choice(ROUTES), chunks, "image/png", "Transfer-Encoding: chunked\r\n"), hangs_up=True)


def slow(rng):
    body = rng.choice(GOOD)
    late = rng.choice([0.2, LIMITS.upload_s + 1])
    return Attack(request(rng.choice(ROUTES), body, "image/png"), pause_s=late)


def request(route, body, kind, length=None):
    said = f"Content-Length: {len(body)}\r\n" if length is None else length
    head = f"{route} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: {kind}\r\n{said}\r\n"
    return head.encode("latin-1") + body


def form(pictures, boundary="outer"):
    """A form's body, and its boundary."""
    mark = f"--{boundary}".encode()
    head = (
        mark
        + b'\r\nContent-Disposition: form-data; name="images"; filename="%d"\r\nContent-Type: application/octet-stream\r\n\r\n'
    )
    parts = [head % number + picture + b"\r\n" for number, picture in enumerate(pictures)]
    return b"".join(parts) + mark + b"--\r\n", boundary


def mutated(rng):
    """A file that was once a picture, in one of many formats."""
    data, other = a_picture(rng), a_picture(rng)
    cut, place = rng.randrange(len(data)), rng.randrange(len(other))
    return rng.choice(
        [
            lambda: data[:cut],
            lambda: flipped(rng, data),
            lambda: flipped(rng, data[:64]) + data[64:],
            lambda: data[:cut] + other[place:],
            lambda: data[:cut] + rng.randbytes(rng.randint(1, 300)) + data[cut:],
            lambda: data[: rng.randrange(4, 40)] + b"\xff" * 4 + data[44:],
            lambda: data + other,
            lambda: png_of_size(rng.choice([0, 1, 7999, 2**16, 2**31 - 1]), rng.choice([0, 1, 7999, 2**31])),
            lambda: rng.choice([*BAD.values(), *UNUSUAL.values()]),
        ]
    )()


def a_picture(rng):
    size = rng.randint(1, 90), rng.randint(1, 90), 3
    pixels = np.frombuffer(rng.randbytes(int(np.prod(size))), np.uint8).reshape(size)
    return encoded(Image.fromarray(pixels), rng.choice(KINDS))


def flipped(rng, data):
    bits = bytearray(data)
    for _ in range(rng.randint(1, 20)):
        bits[rng.randrange(len(bits))] ^= 1 << rng.randrange(8)
    return bytes(bits)


BAD, UNUSUAL = refused(), accepted()


def memory_mb(pid):
    """The most that the process ever had."""
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())[1]) / 1024
