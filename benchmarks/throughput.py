"""Pretraining throughput beside lightly's SimCLR example: same pictures, network, batch size and machine, in one run.

    python benchmarks/throughput.py --images cifar10.zip --peer-python .venv-peers/bin/python

Both sides run in processes of their own, in turn, several times, each after a warm-up; the ratio is that of the medians.
The peer's side follows lightly's `examples/pytorch/simclr.py`: PIL transforms in worker processes (as many as there are
cores), one forward pass per view, float32, SGD. Networks: that example's own (ResNet-18 with the ImageNet stem at 32 px)
and the two that `simclr demo` trains on a CPU, by the minutes it is given. A sample is one picture, of two views.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the peer's environment has our code, not our package

from benchmarks.sides import run_side

NETWORKS = {
    "example": ("resnet18", 1.0, "imagenet"),
    "demo": ("resnet18", 0.25, "small-s2"),
    "long-demo": ("resnet18", 0.5, "small-s2"),
}
WARM_UP = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", default="../shared/data/cifar10.zip", help="pictures of 32 px: folder, .zip, .tar or .csv")
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter of the peers' environment (make bench)")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--networks", nargs="+", choices=tuple(NETWORKS), default=tuple(NETWORKS))
    parser.add_argument("--json", type=Path, help="also write every rate there")
    parser.add_argument("--side", choices=("ours", "lightly"), help=argparse.SUPPRESS)
    parser.add_argument("--network", choices=tuple(NETWORKS), default="example", help=argparse.SUPPRESS)
    parser.add_argument("--pixels", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        side = train_ours if arguments.side == "ours" else train_lightly
        print(json.dumps(side(np.load(arguments.pixels), arguments.network, arguments.batch_size, arguments.steps)))
    else:
        compare(arguments)


def compare(arguments: argparse.Namespace) -> None:
    """Run both sides in turn and print the table."""
    from serve.contract import Preprocess
    from serve.sources import open_source
    from train.data import load_pixels

    frame = Preprocess(height_px=32, width_px=32, resize="center_crop", crop=1.0, resample="bicubic", jpeg="full")
    samples = open_source(arguments.images).train[::5][:10_000]
    report = {}
    with tempfile.TemporaryDirectory() as folder:
        pixels = Path(folder) / "pixels.npy"
        np.save(pixels, load_pixels(samples, frame).images.numpy())
        for network in arguments.networks:
            options = ["--network", network, "--pixels", pixels]
            options += ["--batch-size", arguments.batch_size, "--steps", arguments.steps]
            rates: dict[str, list[float]] = {"ours": [], "lightly": []}
            for _ in range(arguments.repeats):
                for side, python in (("ours", sys.executable), ("lightly", arguments.peer_python)):
                    rates[side].append(float(json.loads(run_side(python, __file__, side, *options))))
            report[network] = rates
            show(network, rates)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


def show(network: str, rates: dict[str, list[float]]) -> None:
    arch, width, stem = NETWORKS[network]
    print(f"{arch} x{width:g}, {stem} stem")
    for side, found in rates.items():
        print(f"  {side:8} {statistics.median(found):7.0f} samples/s   ({min(found):.0f} to {max(found):.0f})")
    print(f"  ratio    {statistics.median(rates['ours']) / statistics.median(rates['lightly']):7.1f}", flush=True)


def train_ours(pixels: np.ndarray, network: str, batch_size: int, steps: int) -> float:
    """Our own loop: `Trainer._one_step`, everything it does included."""
    from serve.samples import ImageSet, Sample
    from train.config import PretrainConfig
    from train.data import Pixels
    from train.pretrain import ready_trainer

    arch, width, stem = NETWORKS[network]
    config = PretrainConfig(
        images="benchmark",
        run=Path("unused"),
        arch=arch,
        width=width,
        stem=stem,
        batch_size=batch_size,
        strength=1.0,
        image_size="32",
    )
    samples = tuple(Sample(str(number)) for number in range(len(pixels)))
    trainer = ready_trainer(config, ImageSet(train=samples), Pixels(torch.from_numpy(pixels), samples, ()))
    batches = trainer.feed.batches(trainer._rows_left())
    for _ in range(WARM_UP):
        trainer._one_step(batches)
    started = time.perf_counter()
    for _ in range(steps):
        trainer._one_step(batches)
    return steps * batch_size / (time.perf_counter() - started)


class PilPictures(torch.utils.data.Dataset):
    """What torchvision's CIFAR10 does for the example: an array in memory, a PIL picture per item, transformed."""

    def __init__(self, pixels: np.ndarray) -> None:
        from lightly.transforms import SimCLRTransform

        self.pictures = np.ascontiguousarray(pixels.transpose(0, 2, 3, 1))
        self.transform = SimCLRTransform(input_size=32, gaussian_blur=0.0)

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> list[torch.Tensor]:
        from PIL import Image

        return self.transform(Image.fromarray(self.pictures[index]))


def train_lightly(pixels: np.ndarray, network: str, batch_size: int, steps: int) -> float:
    """lightly's transform, head and loss, in the loop of its example."""
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead

    from train.encoder import Encoder

    encoder = Encoder(*NETWORKS[network])
    model = torch.nn.Sequential(encoder, SimCLRProjectionHead(encoder.feature_dim, encoder.feature_dim, 128))
    loader = torch.utils.data.DataLoader(
        PilPictures(pixels), batch_size=batch_size, shuffle=True, drop_last=True, num_workers=os.cpu_count() or 1
    )
    criterion, optimizer = NTXentLoss(), torch.optim.SGD(model.parameters(), lr=0.06)
    batches = (batch for _ in range(1000) for batch in loader)
    started = 0.0
    for step, (first, second) in enumerate(batches):
        if step == WARM_UP:
            started = time.perf_counter()
        if step == WARM_UP + steps:
            break
        loss = criterion(model(first), model(second))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return steps * batch_size / (time.perf_counter() - started)


if __name__ == "__main__":
    main()
