"""The cue-conflict pictures: CLASS/cat3-elephant1.png shows the shape of cat 3 with the texture of elephant 1."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from serve.errors import SourceError
from serve.samples import Sample
from serve.shape_bias.classes import MEMBERS
from serve.sources import open_source

PICTURES, CONFLICTS, PER_CLASS = 1_280, 1_200, 80
_NAME = re.compile(r"(?:.*[/!])?(?P<folder>[^/]+)/(?:[^/]*_)?(?P<shape>[a-z]+)\d*-(?P<texture>[a-z]+)\d*\.\w+")


@dataclass(frozen=True)
class Stimulus:
    """A picture with the shape of one class and the texture of another, or of the same."""

    sample: Sample
    shape: str
    texture: str

    @property
    def conflicts(self) -> bool:
        """Whether shape and texture disagree."""
        return self.shape != self.texture


def read_stimuli(source: str) -> list[Stimulus]:
    """All pictures of a cue-conflict folder or archive. Raises: SourceError if one is none."""
    stimuli = [_stimulus(sample) for sample in open_source(source).everything]
    if not any(stimulus.conflicts for stimulus in stimuli):
        raise SourceError(
            f"{source}: none of {len(stimuli)} pictures has the texture of another class; is it the whole data set?"
        )
    return stimuli


def _stimulus(sample: Sample) -> Stimulus:
    match = _NAME.fullmatch(sample.source)
    if match is None or match["folder"] != match["shape"] or not {match["shape"], match["texture"]} <= MEMBERS.keys():
        raise SourceError(
            f"{sample.source}: not a cue-conflict picture, wanted SHAPE/SHAPE1-TEXTURE2.png as in cat/cat3-elephant1.png, "
            f"of the classes {', '.join(MEMBERS)}"
        )
    return Stimulus(sample, match["shape"], match["texture"])


def differences(stimuli: Sequence[Stimulus]) -> list[str]:
    """What is not as published: 16 classes, 80 pictures of each shape and of each texture, of them 1,200 with a conflict."""
    conflicts = sum(stimulus.conflicts for stimulus in stimuli)
    counted = ((len(stimuli), PICTURES, "pictures"), (conflicts, CONFLICTS, "conflicts"))
    findings = [f"{got:,} {what}, not {wanted:,}" for got, wanted, what in counted if got != wanted]
    for what in ("shape", "texture"):
        counts = Counter(getattr(stimulus, what) for stimulus in stimuli)
        others = [name for name in MEMBERS if counts[name] != PER_CLASS]
        if others:
            findings.append(f"{len(others)} of 16 classes not with {PER_CLASS} pictures as {what}, such as {others[0]}")
    return findings
