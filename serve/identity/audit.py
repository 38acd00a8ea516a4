"""GALLERY/audit.jsonl: what was done to identities, and when, without saying who they are.

Whoever erases on request must be able to show it later (GDPR, article 5(2)), and must not keep the name for that. So a line
holds a digest of the name: who knows the name finds its lines, who does not cannot read it. The salt is the gallery's own and
the digest is slow (scrypt, RFC 7914): to try a telephone book takes hours for each gallery. A digest is still personal data as
long as somebody may know the name, so lines say no more than they must, and the file may be deleted at any time.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TypeAlias

from serve.errors import GalleryError

AUDIT_NAME = "audit.jsonl"
_FORMAT = "simclr-audit-1"
_SCRYPT = {"n": 1 << 14, "r": 8, "p": 1, "dklen": 16}  # 16 MiB and some 50 ms

Action: TypeAlias = Literal["rename", "merge", "split", "forget begun", "forgotten"]


def note(folder: Path, action: Action, identities: Sequence[str], items: int) -> None:
    """Append a line: the identities concerned, of a relabel the new one last, and how many items. It is on disk on return.

    Raises: GalleryError if the file is damaged, OSError; no line was added then.
    """
    path = folder / AUDIT_NAME
    found = _read(path)
    salt = found[0] if found else secrets.token_hex(16)
    head = [] if found else [{"format": _FORMAT, "salt": salt}]
    line = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "action": action,
        "identities": [_digest(identity, salt) for identity in identities],
        "items": items,
    }
    _append(path, "".join(json.dumps(row) + "\n" for row in (*head, line)).encode())


def _append(path: Path, data: bytes) -> None:
    """All of it or, on a full disk, nothing. Raises: OSError."""
    with path.open("ab", buffering=0) as file:
        end = file.tell()
        try:
            if file.write(data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            os.fsync(file.fileno())
        except OSError:
            file.truncate(end)
            raise


def lines_about(folder: Path, identity: str) -> list[dict[str, Any]]:
    """What was done to an identity, the oldest first. Raises: GalleryError if the file is damaged."""
    found = _read(folder / AUDIT_NAME)
    if found is None:
        return []
    salt, lines = found
    wanted = _digest(identity, salt)
    return [line for line in lines if wanted in line["identities"]]


def _digest(identity: str, salt: str) -> str:
    return hashlib.scrypt(identity.encode(), salt=bytes.fromhex(salt), **_SCRYPT).hex()


def _read(path: Path) -> tuple[str, list[dict[str, Any]]] | None:
    """The salt and the lines; None if there are none yet."""
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if not rows:
            return None
        head, *lines = rows
        if head["format"] != _FORMAT:
            raise ValueError(f"format {head['format']!r}")
        return str(head["salt"]), lines
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise GalleryError(f"{path}: no audit log of this version ({error}); move it away, a new one is begun") from error
