"""What the authors of each data set counted, and what they and others measured on it."""

from __future__ import annotations

from dataclasses import dataclass

from serve.samples import JUNK_IDENTITY, ImageSet, Sample


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Pictures, of MARS tracklets, without junk. None: not published, or drawn anew by the protocol."""

    title: str
    train: int | None = None
    test: int | None = None
    query: int | None = None
    gallery: int | None = None
    test_identities: int | None = None
    """Of those that are asked for."""
    cameras: int | None = None


PUBLISHED = {
    "market": [
        Counts(title=title, train=12_936, query=3_368, gallery=gallery, test_identities=750, cameras=6)
        for title, gallery in (("Market-1501", 15_913), ("Market-1501 with 500,000 distractors", 515_913))
    ],
    "duke": [Counts(title="DukeMTMC-reID", train=16_522, query=2_228, gallery=17_661, test_identities=702, cameras=8)],
    "msmt17": [Counts(title="MSMT17", train=32_621, query=11_659, gallery=82_161, test_identities=3_060, cameras=15)],
    "cuhk03": [
        Counts(title="CUHK03 detected", train=7_365, query=1_400, gallery=5_332, test_identities=700, cameras=2),
        Counts(title="CUHK03 labeled", train=7_368, query=1_400, gallery=5_328, test_identities=700, cameras=2),
    ],
    "veri": [Counts(title="VeRi-776", train=37_778, query=1_678, gallery=11_579, test_identities=200, cameras=20)],
    "vehicleid": [
        Counts(title=f"VehicleID, {vehicles:,} vehicles", test=pictures, test_identities=vehicles)
        for vehicles, pictures in ((800, 6_493), (1_600, 13_377), (2_400, 19_777))
    ],
    "mars": [Counts(title="MARS", train=8_298, query=1_980, gallery=9_330, cameras=6)],
    "sysu30k": [Counts(title="SYSU-30k", query=1_000, gallery=479_730, test_identities=1_000)],
}
"""By protocol. Market-1501's gallery has 3,819 junk boxes more. MSMT17's training set is list_train and list_val together."""

RANK1_PERCENT = {
    "sysu30k": {
        "SimCLR": 10.9,
        "ResNet-50 trained on ImageNet's labels": 20.1,
        "self-supervised triplet loss": 14.8,
        "DGL, weakly supervised": 26.9,
    }
}
"""By protocol: what others report for rank 1."""


def difference(protocol: str, images: ImageSet) -> str | None:
    """How the counts differ from those published, in one line; None if they do not, or none are published.

    Roles that are not there are not compared: who evaluates needs no training set.
    """
    found = [(counts.title, _differences(protocol, counts, images)) for counts in PUBLISHED.get(protocol, [])]
    if not found or not all(faults for _, faults in found):
        return None
    title, faults = min(found, key=lambda pair: len(pair[1]))
    return f"not the published {title}: {', '.join(faults)}"


def _differences(protocol: str, counts: Counts, images: ImageSet) -> list[str]:
    asked = images.query or images.test
    train = images.train + images.test if protocol == "msmt17" else images.train
    got = {
        "train": _count(train),
        "test": _count(images.test),
        "query": _count(images.query),
        "gallery": _count(images.gallery),
        "test_identities": len({sample.identity for sample in asked}),
        "cameras": len({sample.camera for sample in asked + images.gallery}),
    }
    return [
        f"{name.replace('_', ' ')} {count:,} (published {wanted:,})"
        for name, count in got.items()
        if (wanted := getattr(counts, name)) is not None and count not in (0, wanted)
    ]


def _count(samples: tuple[Sample, ...]) -> int:
    counted = [sample for sample in samples if sample.identity != JUNK_IDENTITY]
    tracks = {(sample.identity, sample.camera, sample.track) for sample in counted if sample.track is not None}
    return len(tracks) or len(counted)
