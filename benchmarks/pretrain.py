"""Time to the same kNN accuracy as lightly's SimCLR example: same pictures, network, batch size and machine, in one run.

    python benchmarks/pretrain.py --images cifar10.zip --peer-python .venv-peers/bin/python

For every seed, lightly's loop (`examples/pytorch/simclr.py`: PIL transforms in worker processes, a forward pass per view,
float32, SGD at 0.06) trains for `--peer-seconds`; the best accuracy on the way is the aim. Ours trains for a share
of that time, with the recipe that `simclr demo` uses for short runs. Both clocks run from the first batch to the last step,
without start-up and without evaluation: the encoders are kept every few seconds and scored afterwards by the same kNN
(k = 200, temperature 0.1, 10,000 training pictures against 2,000 test pictures). Start-up is left out on both sides.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the peer's environment has our code, not our package

from benchmarks.sides import run_side
from benchmarks.throughput import NETWORKS, PilPictures

KEPT_PER_RUN = {"ours": 10, "lightly": 5}
BANK, QUERIES = 10_000, 2_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", default="../shared/data/cifar10.zip", help="labelled pictures of 32 px with a test split")
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter of the peers' environment (make bench)")
    parser.add_argument("--network", choices=tuple(NETWORKS), default="demo")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--peer-seconds", type=float, default=200, help="training time of lightly's loop")
    parser.add_argument("--share", type=float, default=1 / 3, help="of that time for ours")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write every accuracy there")
    parser.add_argument("--side", choices=("ours", "lightly"), help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        side = train_ours if arguments.side == "ours" else train_lightly
        side(np.load(arguments.folder / "pixels.npy"), arguments)
    else:
        compare(arguments)


def compare(arguments: argparse.Namespace) -> None:
    """Train both sides for every seed and print the table."""
    from serve.contract import Preprocess
    from serve.sources import open_source
    from train.data import load_pixels
    from train.probe import groups_of

    frame = Preprocess(height_px=32, width_px=32, resize="center_crop", crop=1.0, resample="bicubic", jpeg="full")
    images = open_source(arguments.images)
    pixels = load_pixels(images.train, frame, progress="reading images")
    test = load_pixels(images.test[:: max(1, len(images.test) // QUERIES)], frame)
    every = max(1, len(pixels) // BANK)
    scored = pixels.images[::every], groups_of(pixels.samples[::every]), test.images, groups_of(test.samples)
    report = []
    print("seed   lightly: accuracy after s      ours: accuracy after s   reached after s   ratio")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.save(folder / "pixels.npy", pixels.images.numpy())
        for seed in range(arguments.seeds):
            peer = train_apart("lightly", seed, arguments.peer_seconds, folder, arguments, scored)
            ours = train_apart("ours", seed, arguments.peer_seconds * arguments.share, folder, arguments, scored)
            aim = max(accuracy for _, accuracy in peer)
            reached = next((seconds for seconds, accuracy in ours if accuracy >= aim), None)
            report.append({"seed": seed, "lightly": peer, "ours": ours, "aim": aim, "reached_s": reached})
            verdict = f"{reached:8.0f}          {peer[-1][0] / reached:8.1f}" if reached else "   not reached"
            print(f"{seed:4}   {aim:10.1%} {peer[-1][0]:12.0f}  {ours[-1][1]:18.1%} {ours[-1][0]:8.0f} {verdict}", flush=True)
    ratios = [entry["lightly"][-1][0] / entry["reached_s"] for entry in report if entry["reached_s"]]
    if len(ratios) == arguments.seeds:
        print(f"median ratio {statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})")
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


def train_apart(
    side: str, seed: int, seconds: float, folder: Path, arguments: argparse.Namespace, scored: tuple
) -> list[tuple[float, float]]:
    """(training seconds, kNN accuracy) of the encoders that a child process kept."""
    from train.encoder import Encoder
    from train.probe import embed_pixels, knn_accuracy

    python = sys.executable if side == "ours" else arguments.peer_python
    options = ["--seed", seed, "--seconds", seconds, "--folder", folder]
    options += ["--network", arguments.network, "--batch-size", arguments.batch_size]
    for left in folder.glob("encoder_*.pt"):
        left.unlink()
    run_side(python, __file__, side, *options)
    bank, bank_groups, queries, query_groups = scored
    curve = []
    encoder = Encoder(*NETWORKS[arguments.network])
    for path in sorted(folder.glob("encoder_*.pt")):
        encoder.load_state_dict(torch.load(path, weights_only=True))
        vectors = [embed_pixels(encoder, part, torch.device("cpu")) for part in (bank, queries)]
        curve.append((float(path.stem.split("_")[1]), knn_accuracy(vectors[0], bank_groups, vectors[1], query_groups)))
    return curve


class Keeper:
    """Keeps the encoder every so often; its own time does not count."""

    def __init__(self, encoder: nn.Module, folder: Path, seconds: float, most: int) -> None:
        self.encoder, self.folder, self.seconds, self.most = encoder, folder, seconds, most
        self.kept, self.away, self.started = 0, 0.0, time.perf_counter()

    def keep(self) -> bool:
        """Whether the time is up."""
        now = time.perf_counter()
        clock = now - self.started - self.away
        if clock >= self.seconds * (self.kept + 1) / self.most:
            self.kept += 1
            torch.save(self.encoder.state_dict(), self.folder / f"encoder_{clock:07.1f}.pt")
            self.away += time.perf_counter() - now
        return clock >= self.seconds


def train_ours(pixels: np.ndarray, arguments: argparse.Namespace) -> None:
    """Our own loop, the learning rate's schedule ending with the time."""
    from serve.samples import ImageSet, Sample
    from train.config import PretrainConfig
    from train.data import Pixels
    from train.pretrain import ready_trainer, samples_per_second_of

    arch, width, stem = NETWORKS[arguments.network]
    samples = tuple(Sample(str(number)) for number in range(len(pixels)))
    feed = Pixels(torch.from_numpy(pixels), samples, ())

    def trainer_for(epochs: float):  # noqa: ANN202
        config = PretrainConfig(
            images="benchmark",
            run=Path("unused"),
            arch=arch,
            width=width,
            stem=stem,
            image_size="32",
            batch_size=arguments.batch_size,
            epochs=epochs,
            crop_area=0.2,
            learning_rate=0.15 * math.sqrt(arguments.batch_size),
            seed=arguments.seed,
        )
        return ready_trainer(config, ImageSet(train=samples), feed)

    rate = samples_per_second_of(trainer_for(1), seconds=8)
    trainer = trainer_for(0.97 * rate * arguments.seconds / len(pixels))
    batches = trainer.feed.batches(trainer._rows_left())
    keeper = Keeper(trainer.model.encoder, arguments.folder, arguments.seconds, KEPT_PER_RUN["ours"])
    while trainer.step < trainer.plan.total_steps and not keeper.keep():
        trainer._one_step(batches)
    keeper.seconds = 0
    keeper.keep()  # the last one


def train_lightly(pixels: np.ndarray, arguments: argparse.Namespace) -> None:
    """lightly's transform, head and loss, in the loop of its example."""
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead

    from train.encoder import Encoder

    torch.manual_seed(arguments.seed)
    encoder = Encoder(*NETWORKS[arguments.network])
    model = nn.Sequential(encoder, SimCLRProjectionHead(encoder.feature_dim, encoder.feature_dim, 128))
    loader = torch.utils.data.DataLoader(
        PilPictures(pixels), batch_size=arguments.batch_size, shuffle=True, drop_last=True, num_workers=os.cpu_count() or 1
    )
    criterion, optimizer = NTXentLoss(), torch.optim.SGD(model.parameters(), lr=0.06)

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        while True:
            yield from loader

    endless = batches()
    batch = next(endless)  # workers have started
    keeper = Keeper(encoder, arguments.folder, arguments.seconds, KEPT_PER_RUN["lightly"])
    while not keeper.keep():
        loss = criterion(model(batch[0]), model(batch[1]))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        batch = next(endless)


if __name__ == "__main__":
    main()
