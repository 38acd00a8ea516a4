"""The files below a folder. Large trees are remembered: walking a million files on a network disk takes minutes.

A folder's change time moves when an entry is added, removed or renamed, so one that has not moved need not be listed again;
only its sub-folders are looked at. What is remembered lies in the user's cache folder and may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from serve.files import atomic_path

WORTH_REMEMBERING = 10_000
"""Files. Smaller trees are listed in a moment."""
RACY_NS = 2_000_000_000
"""A folder listed this soon after its last change may have changed again within one tick of its file system's clock."""
_VERSION = 1
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Folder:
    """One folder: when it was as listed, and the names of its files and sub-folders."""

    stamp: str
    files: list[str]
    folders: list[str]


def list_files(root: Path) -> list[str]:
    """Paths of all files below `root`, relative to it, with forward slashes, sorted; hidden ones and __MACOSX are left out.

    Links to folders are followed, but never into a folder that is being walked. A sub-folder that cannot be listed is
    logged and left out. Raises: OSError if `root` cannot be listed.
    """
    cache = _cache_file(root)
    remembered = _recall(cache)
    walked: dict[str, _Folder] = {}
    files: list[str] = []
    with tqdm(desc=f"listing {root.name}", unit=" files", delay=1, leave=False, dynamic_ncols=True) as bar:
        ahead: list[tuple[str, frozenset[tuple[int, int]]]] = [("", frozenset())]
        while ahead:
            inner, above = ahead.pop()
            try:
                status = (root / inner).stat()
                if (identity := (status.st_dev, status.st_ino)) in above:
                    continue
                folder = _listed(root / inner, status, remembered.get(inner))
            except OSError as error:
                if not inner:
                    raise
                _log.warning("%s: left out, it cannot be listed (%s)", root / inner, error.strerror)
                continue
            walked[inner] = folder
            files += [f"{inner}{name}" for name in folder.files]
            ahead += [(f"{inner}{name}/", above | {identity}) for name in folder.folders]
            bar.update(len(folder.files))
    if len(files) >= WORTH_REMEMBERING:
        _remember(cache, {inner: folder for inner, folder in walked.items() if folder.stamp}, remembered)
    return sorted(files)


def _listed(path: Path, status: os.stat_result, remembered: _Folder | None) -> _Folder:
    """The folder as remembered if nothing has changed in it, else as it is; its stamp is empty if it is not to be trusted."""
    stamp = f"{status.st_mtime_ns}.{status.st_ctime_ns}.{status.st_ino}"  # ctime: a restored mtime does not hide a change
    if remembered is not None and remembered.stamp == stamp:
        return remembered
    racy = time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns) < RACY_NS
    files: list[str] = []
    folders: list[str] = []
    with os.scandir(path) as entries:
        for entry in entries:
            if not entry.name.startswith((".", "__MACOSX")):
                (folders if _is_folder(entry) else files).append(entry.name)
    return _Folder("" if racy else stamp, files, folders)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    with suppress(OSError):  # a link to itself, or into a folder that may not be entered
        return entry.is_dir()
    return False


def _cache_file(root: Path) -> Path | None:
    """None where this user has no cache folder."""
    with suppress(RuntimeError):  # no home
        base = Path(os.environ.get("XDG_CACHE_HOME", ""))
        base = base if base.is_absolute() else Path.home() / ".cache"  # a relative one is to be ignored, says XDG
        name = hashlib.sha256(os.fsencode(root.absolute())).hexdigest()
        return base / "simclr-serve" / "listings" / f"{name}.json"
    return None


def _recall(cache: Path | None) -> dict[str, _Folder]:
    """What is remembered; nothing if there is nothing, or anything is wrong with it."""
    try:
        content = json.loads(cache.read_bytes()) if cache else {}
        if content["version"] != _VERSION:
            return {}
        folders = {inner: _Folder(*fields) for inner, fields in content["folders"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {}
    return folders if all(_sound(folder) for folder in folders.values()) else {}


def _sound(folder: _Folder) -> bool:
    """Strings, and names that do not lead out of the folder."""
    names = [folder.files, folder.folders]
    return isinstance(folder.stamp, str) and all(
        isinstance(part, list) and all(isinstance(name, str) and "/" not in name and name[:1] not in ("", ".") for name in part)
        for part in names
    )


def _remember(cache: Path | None, folders: dict[str, _Folder], before: dict[str, _Folder]) -> None:
    if cache is None or folders == before:
        return
    content = {inner: [folder.stamp, folder.files, folder.folders] for inner, folder in folders.items()}
    with suppress(OSError):  # a full or read-only disk costs time, nothing else
        cache.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with atomic_path(cache) as temporary:
            temporary.write_text(json.dumps({"version": _VERSION, "folders": content}, separators=(",", ":")), "ascii")
