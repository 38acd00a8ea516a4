"""One item of a gallery: what is known about it, how that is changed, and what of it can be stored."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

from pydantic import JsonValue

from serve.errors import GalleryError, NoSuchItem
from serve.samples import Sample
from serve.sources import printable


@dataclass(frozen=True)
class Item:
    """One picture of a gallery. `id` is the gallery's own and never used again; `time` is in seconds."""

    id: int
    source: str
    label: str | None
    identity: str | None
    camera: str | None
    time: float | None
    extra: dict[str, JsonValue]


class Known(TypedDict, total=False):
    """What may be said anew about items. None: unknown. `extra` is laid over what is there, and None takes a fact out of it."""

    label: str | None
    identity: str | None
    camera: str | None
    time: float | None
    extra: Mapping[str, JsonValue]


def new_item(item_id: int, sample: Sample, extra: Mapping[str, JsonValue]) -> Item:
    """A sample as an item. A track is an extra fact: few pictures have one."""
    facts = vars(sample)
    track = {} if sample.track is None else {"track": sample.track}
    return Item(item_id, **{name: facts[name] for name in facts if name != "track"}, extra={**track, **extra})


def sample_of(item: Item) -> Sample:
    """The item as a sample, without its other extra facts."""
    track = item.extra.get("track")
    return Sample(item.source, item.label, item.identity, item.camera, item.time, track if isinstance(track, str) else None)


def columns_of(item: Item) -> tuple[object, ...]:
    """What is stored of an item, `extra` as JSON. Raises: GalleryError if it cannot be."""
    try:
        time = None if item.time is None else float(item.time)
        if time is not None and not math.isfinite(time):
            raise ValueError(f"time is {time}")
        extra = json.dumps(item.extra, allow_nan=False)
        for text in (item.source, item.label, item.identity, item.camera):
            if text is not None:
                text.encode()
        return item.id, item.source, item.label, item.identity, item.camera, time, extra
    except (ValueError, TypeError) as error:
        wanted = "wanted text in UTF-8, a number of seconds as time, JSON as extra; nothing was changed"
        raise GalleryError(f"{printable(item.source)}: cannot be stored ({error}); {wanted}") from error


def relabelled(item: Item, known: Known) -> Item:
    """The item with this said anew about it."""
    said = known.get("extra", {})
    extra = {**item.extra, **said}
    kept = {key: value for key, value in extra.items() if value is not None or key not in said}
    return Item(**{**vars(item), **known, "extra": kept})


def require_known(ids: Iterable[int], known: Collection[int], gallery: str, otherwise: str) -> None:
    """Raises: NoSuchItem naming the ids that are not among the `known`."""
    if unknown := sorted(set(ids) - set(known)):
        listed = ", ".join(map(str, unknown[:5])) + (f" and {len(unknown) - 5} more" if len(unknown) > 5 else "")
        raise NoSuchItem(f"{gallery}: no item with id {listed}; {otherwise}")


def require_unused(ids: Sequence[int], used: Sequence[int], gallery: str) -> None:
    """Raises: GalleryError unless new items can have these ids, of which those `used` had an item before."""
    if used or len(set(ids)) < len(ids) or min(ids, default=1) < 1:
        what = f"id {used[0]} has been used" if used else f"got ids from {min(ids)} on, or one twice"
        raise GalleryError(f"{gallery}: {what}; wanted unused ones from 1 on; nothing was added; try --new-ids")


def natural_key(text: str) -> tuple[list[tuple[int, int, str]], str]:
    """Sort key that orders runs of digits by their value."""
    parts = [part.lstrip("0") if part.isdecimal() else part for part in re.split(r"(\d+)", text)]
    # re.split puts the digits at the odd places: a longer run of digits is a greater number
    return [(0, len(part), part) if place % 2 else (1, 0, part) for place, part in enumerate(parts)], text
