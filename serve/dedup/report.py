"""What was found, for people and for programs, and the list of what may go."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from serve.dedup.files import Kind
from serve.dedup.groups import COMPARED, Copy, Group
from serve.duplicates import Duplicates
from serve.errors import GalleryError
from serve.files import atomic_path

_SHOWN_GROUPS, _SHOWN_COPIES = 10, 5
_KINDS: dict[Kind, str] = {"file": "the same file", "pixels": "the same pixels", "near": "near"}


def as_json(found: Duplicates) -> dict[str, Any]:
    """Everything: totals, and each group as `keep` and `members`."""
    return {
        "encoder_id": found.encoder_id,
        "threshold": found.threshold,
        "threshold_chosen": found.chosen,
        "searched": found.searched,
        "recall": found.recall,
        "totals": {
            "items": found.items,
            "groups": len(found.groups),
            "duplicates": found.count(),
            **{kind: found.count(kind) for kind in _KINDS},
            "groups_with_different_labels": _differing(found, "label"),
        },
        "groups": [
            {
                "keep": _facts(group.keep),
                "members": [_facts(copy) | {"similarity": copy.similarity, "kind": copy.kind} for copy in group.others],
                "differing": group.differing,
            }
            for group in found.groups
        ],
        "unreadable": [vars(picture) for picture in found.unreadable],
    }


def _facts(copy: Copy) -> dict[str, Any]:
    return asdict(copy.item) | {"pixels": copy.pixels or None, "bytes": copy.bytes or None}


def _differing(found: Duplicates, field: str) -> int:
    return sum(field in group.differing for group in found.groups)


def report_lines(found: Duplicates, gallery: str, removals: Path | None) -> list[str]:
    """The totals, the first groups, and how to remove all but the kept ones, which `removals` may list."""
    kinds = ", ".join(f"{found.count(kind):,} {words}" for kind, words in _KINDS.items())
    why = "; ten times nearer than the median item's nearest, --threshold sets another" if found.chosen else ""
    lines = [
        f"{gallery}: {found.count():,} of {found.items:,} items are duplicates of {len(found.groups):,} others: {kinds}",
        f"near: similarity {found.threshold:.4f} or more{why}",
        f"searched: {found.searched}" + ("; approximate, --exact misses none:" if found.recall else ""),
    ]
    table = found.recall.splitlines()
    lines += [table[0], table[-1]] if table else []
    if found.unreadable:
        first = found.unreadable[0].reason
        lines.append(f"unreadable: {len(found.unreadable):,} files, grouped by their vectors alone; the first: {first}")
    for field in COMPARED:
        if count := _differing(found, field):
            lines.append(f"{field} differs within {count:,} groups")
    for group in found.groups[:_SHOWN_GROUPS]:
        lines += _group_lines(group)
    if (more := len(found.groups) - _SHOWN_GROUPS) > 0:
        lines.append(f"and {more:,} more groups: --json FILE lists all, --sheet FILE.jpg shows the largest")
    if found.groups:
        listed = "" if removals else "list all but the kept ones with --to-remove FILE, look at it, then: "
        lines.append(f"nothing was removed; {listed}simclr gallery remove {gallery} --ids-from {removals or 'FILE'}")
    return lines


def _group_lines(group: Group) -> list[str]:
    differs = "".join(f"  {field} differs: {', '.join(values)}" for field, values in group.differing.items())
    lines = [f"keep            {_named(group.keep)}{differs}"]
    lines += [f"  {copy.similarity:.4f}  {copy.kind:6}  {_named(copy)}" for copy in group.others[:_SHOWN_COPIES]]
    more = len(group.others) - _SHOWN_COPIES
    return [*lines, f"  and {more:,} more"] if more > 0 else lines


def _named(copy: Copy) -> str:
    return f"#{copy.item.id}  {copy.item.source}"


def write_removals(path: Path, found: Duplicates) -> None:
    """One line for each item that may go: its id, then what it is a duplicate of. Raises: OSError."""
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write("# Delete the lines of what is to stay.\n")
        for group in found.groups:
            for copy in group.others:
                source = json.dumps(copy.item.source, ensure_ascii=False)  # in one line, whatever its name
                file.write(f"{copy.item.id}\t{copy.similarity:.4f}\t{copy.kind} of {group.keep.item.id}\t{source}\n")


def read_removals(path: Path) -> list[int]:
    """The first word of each line; what comes after it, empty lines and # lines do not count. Raises: GalleryError, OSError."""
    ids = []
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            word = "".join(line.split()[:1])
            if word and not word.startswith("#"):
                if not word.isdecimal():
                    raise GalleryError(f"{path}, line {number}: begins with {word!r}, wanted an id; nothing was removed")
                ids.append(int(word))
    return ids
