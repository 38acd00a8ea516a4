"""What training on one's own unlabelled crops brings to re-ID: before and after, all on one harness.

    python benchmarks/adaptation.py OUT --minutes 20                                   # the generated people of `simclr demo`
    python benchmarks/adaptation.py OUT --tracks crops.csv --test ROOT --weights resnet50.safetensors

Rows: the network untrained; trained with two crops of one picture as views; the same network, pictures, steps and seed with
two pictures of one track as views; and, where given, weights from elsewhere (ImageNet's labels, say), read as by `simclr
import-weights`. `--tracks` lists crops as a tracker gives them, path,camera,track, and no identity is read from it. `--test` is
any re-ID set with a query and a gallery. The time is that of both trainings; run again, finished ones are taken as they are,
others go on.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from export.demo import fitting_config, former_config
from serve.encoder import Encoder
from serve.files import atomic_path
from serve.protocols.run import Options, evaluate_pictures
from serve.samples import ImageSet, Sample
from serve.sources import open_source
from train.checkpoint import CHECKPOINT, is_finished
from train.config import PretrainConfig
from train.data import preprocess_for
from train.demo_data import TRACK_FILE, draw_demo_set
from train.positives import track_numbers
from train.pretrain import pretrain
from train.torch_encoder import TorchEncoder, open_run, untrained
from train.weights import read_weights

FIGURES = {"rank1": "Rank-1", "map_step": "mAP", "map_trapezoid": "mAP, trapezoid"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the runs and of adaptation.json")
    parser.add_argument("--minutes", type=float, default=20, help="of both trainings together")
    parser.add_argument("--tracks", type=Path, help="CSV of crops: path,camera,track")
    parser.add_argument("--test", help="re-ID set to score on")
    parser.add_argument("--weights", type=Path, nargs="*", default=[], help="files of other encoders")
    arguments = parser.parse_args()
    if (arguments.tracks is None) != (arguments.test is None):
        parser.error("--tracks and --test go together: crops to learn from, and a set to score on")
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.tracks is None:
        people = draw_demo_set(arguments.out / "people")
        arguments.tracks, arguments.test = people / TRACK_FILE, str(people)
    report = {name: scored(name, encoder, arguments.test) for name, encoder in contenders(arguments)}
    with atomic_path(arguments.out / "adaptation.json") as path:
        path.write_text(json.dumps(report, indent=2) + "\n")


def contenders(arguments: argparse.Namespace) -> Iterator[tuple[str, Encoder]]:
    """Each with its name, as soon as there is one."""
    pictures = open_source(arguments.tracks)
    config = settings(arguments.out / "picture", str(arguments.tracks), pictures, arguments.minutes / 2)
    plain = open_run(trained(config))
    by_track = open_run(trained(replace(config, positives="track", run=arguments.out / "track")))
    print(f"{'':24}" + "".join(f"{title:>28}" for title in FIGURES.values()))
    yield "untrained", untrained(plain.manifest, pictures.train)
    yield "SimCLR, one picture", plain
    yield "SimCLR, one track", by_track
    for path in arguments.weights:
        # the frame of re-ID, all of the box: these projects' own cuts head and feet off
        yield path.stem, imported(path, arguments.out / f"weights {path.stem}", pictures.train)


def settings(run: Path, images: str, pictures: ImageSet, minutes: float) -> PretrainConfig:
    """Those of an earlier call, or what this machine trains in the time; a batch holds one picture of a track at most."""
    if earlier := former_config(run, images):
        return earlier
    config = fitting_config(images, pictures, run, minutes)
    return replace(config, batch_size=min(config.batch_size, int(track_numbers(pictures.train).max()) + 1))


def trained(config: PretrainConfig) -> Path:
    """The finished run: as it is, continued, or from the beginning."""
    if is_finished(config.run):
        return config.run
    return pretrain(replace(config, resume=(config.run / CHECKPOINT).exists()))


def imported(path: Path, run: Path, samples: Sequence[Sample]) -> TorchEncoder:
    replace(read_weights(path), preprocess=preprocess_for(samples, None)).save(run)
    return open_run(run)


def scored(name: str, encoder: Encoder, test: str) -> dict[str, Any]:
    """Its figures, printed with 95 % intervals over identities."""
    found = evaluate_pictures(encoder, test, Options()).figures()
    spans = found.get("interval", {})
    cells = (f"{found[key]:.1%}" + (" ({:.1%} to {:.1%})".format(*spans[key]) if key in spans else "") for key in FIGURES)
    print(f"{name:24}" + "".join(f"{cell:>28}" for cell in cells), flush=True)
    return found


if __name__ == "__main__":
    main()
