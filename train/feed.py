"""The pictures of one process: which they are, where they are kept, and what they make of the plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from serve.errors import TrainingError
from serve.samples import ImageSet, Sample
from train import distributed
from train.config import PretrainConfig
from train.data import Pixels, load_pixels, training_frame
from train.plan import Plan, choose_workers, count_steps
from train.positives import Tracks, share_of_tracks
from train.stream import Streamed


def open_feed(config: PretrainConfig, plan: Plan, images: ImageSet) -> Pixels | Streamed:
    """This process's share of the pictures: decoded into memory, or read by workers while training."""
    by_track = config.positives == "track"
    shard: Sequence[Sample] = images.train[distributed.rank() :: plan.world_size]
    if by_track:
        shard = share_of_tracks(images.train, distributed.rank(), plan.world_size)
    if plan.streamed:
        workers = choose_workers(config, len(images.train), plan.preprocess)
        tracks = Tracks(shard, seed=config.seed) if by_track else None
        return Streamed(shard, plan.preprocess, plan.crop_area, workers=workers, seed=config.seed, tracks=tracks)
    pixels = load_pixels(shard, training_frame(plan.preprocess), progress="reading images" if distributed.rank() == 0 else None)
    return replace(pixels, tracks=Tracks(pixels.samples, seed=config.seed)) if by_track else pixels


def fit_to(feed: Pixels | Streamed, config: PretrainConfig, plan: Plan) -> Plan:
    """What cannot be read shortens the epochs; the process with the fewest pictures sets their length."""
    fewest = distributed.smallest(len(feed)) * plan.world_size
    if fewest < config.batch_size:
        raise TrainingError(
            f"{fewest} pictures can be read, fewer than --batch-size {config.batch_size}"
            + (f"; first failure: {feed.unreadable[0].reason}" if feed.unreadable else "")
        )
    steps_per_epoch, total_steps = count_steps(config, fewest)
    if feed.tracks:
        steps_per_epoch = distributed.smallest(feed.tracks.batches(config.batch_size // plan.world_size))
        most = distributed.smallest(len(feed.tracks)) * plan.world_size
        if not steps_per_epoch:
            raise TrainingError(
                f"--batch-size is {config.batch_size}, but there are {most} tracks, a picture without one counting as one, "
                f"and a batch holds one picture of each; use --batch-size {most} or less"
            )
    return replace(plan, steps_per_epoch=steps_per_epoch, total_steps=total_steps)
