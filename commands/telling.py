"""What several commands write down and tell alike."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serve.errors import SourceError

if TYPE_CHECKING:
    from serve.gallery import AddReport
    from serve.samples import Unreadable


def write_json(path: Path | None, report: dict[str, Any]) -> None:
    """Write a report where `--json FILE` said so."""
    if path is not None:
        from serve.files import atomic_path

        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(report, indent=2) + "\n")


def quarantine_of(gallery: str) -> Path:
    """Where a gallery lists what was left out; for one in Milvus, the current folder."""
    return Path("" if "://" in gallery else gallery, "quarantine.jsonl")


def tell_unreadable(unreadable: Sequence[Unreadable], quarantine: Path) -> None:
    """On stderr, the first few, and where all are."""
    tell_left_out(unreadable)
    if unreadable:
        print(f"left out: {len(unreadable)} in all, listed in {quarantine}", file=sys.stderr)


def tell_left_out(unreadable: Sequence[Unreadable]) -> None:
    """On stderr, the first few."""
    for picture in unreadable[:10]:
        print(f"left out: {picture.reason}", file=sys.stderr)


def tell_added(report: AddReport, quarantine: Path, source: str) -> None:
    """What was left out of an addition. Raises: SourceError if that was everything."""
    tell_unreadable(report.unreadable, quarantine)
    if report.unreadable and not report.ids and not report.already_present:
        raise SourceError(f"{source}: none of {len(report.unreadable)} pictures can be read; nothing was added")
