"""The HTTP API with all that it can have, in a process of its own: `python -m tests.api_server FOLDER`."""

import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

from serve.api import create_api
from serve.encoder import OnnxEncoder
from serve.gallery import Gallery
from serve.gateway.http_server import serve_api
from serve.gateway.limits import Limits
from serve.samples import Sample
from tests.bad_images import good
from tests.thresholds import calibration
from tests.toy_encoder import toy_head, write_toy_encoder

ROOT = Path(__file__).parents[1]
ITEMS = 20
LIMITS = Limits(upload_s=6, max_bytes=2**21, max_pictures=16)


def main(folder: Path) -> None:
    encoder = OnnxEncoder(write_toy_encoder(folder)[0])
    samples = [
        Sample(f"{number}.png", label=("cat", "dog")[number % 2], identity=str(number % 5), time=float(number))
        for number in range(ITEMS)
    ]
    facts = {"heads": {"toy": toy_head(encoder.encoder_id)}, "calibration": calibration(encoder_id=encoder.encoder_id)}
    with Gallery.open(folder / "gallery", encoder, create=True) as gallery:
        gallery.add(samples, encoder.embed([good(number) for number in range(ITEMS)]))
        serve_api(create_api(encoder, **facts, gallery=gallery, limits=LIMITS), port=0)


@contextmanager
def api_server(folder: Path):
    """The address and the process."""
    command = [sys.executable, "-m", "tests.api_server", str(folder)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield next(word for word in process.stdout.readline().split() if word.startswith("http://")), process
        finally:
            process.terminate()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
