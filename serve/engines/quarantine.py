"""quarantine.jsonl: which pictures were left out and why, a JSON object with `source` and `reason` on each line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from serve.errors import SourceError
from serve.files import atomic_path
from serve.samples import Unreadable


def write_quarantine(path: Path, unreadable: Sequence[Unreadable]) -> None:
    """Write the list; where nothing was left out there is no file. Raises: OSError."""
    if not unreadable:
        path.unlink(missing_ok=True)
        return
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(vars(picture)) + "\n" for picture in unreadable)


def read_quarantine(path: Path) -> list[Unreadable]:
    """What was left out before; nothing where there is no file. Raises: SourceError if it is another kind of file."""
    try:
        with path.open(encoding="utf-8") as file:
            return [Unreadable(**json.loads(line)) for line in file]
    except FileNotFoundError:
        return []
    except (ValueError, TypeError) as error:
        raise SourceError(f"{path}: no list of pictures left out ({error}); give another name or remove it") from error
