"""Keys: who may do what. The file holds a line `NAME SCOPE SHA256` for each; the key itself is told once and never stored.

A key is 256 random bits, so that its plain hash cannot be turned back, and needs neither salt nor slowness.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias, get_args

from serve.ann.lock import exclusive
from serve.errors import ContractError
from serve.files import atomic_path

log = logging.getLogger(__name__)

Scope: TypeAlias = Literal["read", "write", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
"""Each may do what those before it may."""
_NAME = re.compile(r"[A-Za-z0-9_.@-]{1,64}")
_HASH = re.compile(r"[0-9a-f]{64}")
_PREFIX = "simclr_"


@dataclass(frozen=True)
class Key:
    """A line of the file."""

    name: str
    scope: Scope
    sha256: str

    def allows(self, scope: Scope) -> bool:
        """Whether it may do what `scope` is needed for."""
        return SCOPES.index(self.scope) >= SCOPES.index(scope)


class Keyring:
    """The keys of a file, read again whenever it has changed. From what cannot be read, nobody is let in."""

    def __init__(self, path: Path) -> None:
        """Raises: ContractError."""
        self._path, self._seen = path, _state(path)
        self._keys, self._fault = read_keys(path), ""

    def find(self, secret: str) -> Key | None:
        """Whose key this is, None if nobody's; takes as long for any. Raises: ContractError if the file cannot be read."""
        self._refresh()
        digest = _digest(secret)
        found = [key for key in self._keys if hmac.compare_digest(key.sha256, digest)]
        return found[0] if found else None

    def _refresh(self) -> None:
        state = _state(self._path)  # of before reading: what is written meanwhile is read the next time
        if state != self._seen:
            self._seen = state
            try:
                self._keys, self._fault = read_keys(self._path), ""
            except ContractError as error:
                log.warning("%s", error)
                self._fault = str(error)
        if self._fault:
            raise ContractError(self._fault)


def read_keys(path: Path) -> list[Key]:
    """The keys of a file; empty lines and those that begin with # are skipped. Raises: ContractError naming the line."""
    keys: dict[str, Key] = {}
    for number, line in enumerate(_text(path).splitlines(), start=1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        key = _key(words)
        if key is None or key.name in keys:
            wanted = f"wanted `NAME {'|'.join(SCOPES)} SHA256`, each name once; `simclr key` writes such lines"
            raise ContractError(f"{path}, line {number}: not a key; {wanted}")
        keys[key.name] = key
    return list(keys.values())


def add_key(path: Path, name: str, scope: Scope) -> str:
    """Make a key and note its hash in the file, which is made if it is missing. Returns: the key. Raises: ContractError."""
    if not _NAME.fullmatch(name):
        raise ContractError(f"key name {name!r}: wanted 1 to 64 letters, digits and . _ @ -")
    with exclusive(path.with_name(f".{path.name}.lock"), lambda: None):
        if any(key.name == name for key in (read_keys(path) if path.exists() else [])):
            raise ContractError(f"{path}: has a key named {name}; take its line out first, or give another name")
        former = _text(path) if path.exists() else ""
        secret = _PREFIX + secrets.token_urlsafe(32)
        with atomic_path(path) as temporary:
            line_end = "" if former.endswith("\n") or not former else "\n"
            temporary.write_text(f"{former}{line_end}{name} {scope} {_digest(secret)}\n", encoding="utf-8")
    return secret


def _state(path: Path) -> tuple[int, int, int] | None:
    """What is another one after every change; None: there is no file."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_ctime_ns


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not text in UTF-8"
        raise ContractError(f"{path}: cannot be read ({reason}); make one: simclr key NAME --keys {path}") from error


def _key(words: list[str]) -> Key | None:
    for scope in SCOPES:
        if len(words) == 3 and words[1] == scope and _NAME.fullmatch(words[0]) and _HASH.fullmatch(words[2]):
            return Key(words[0], scope, words[2])
    return None


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()
