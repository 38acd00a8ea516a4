"""Members of .zip and .tar files, read in place. Files are opened per read, but for up to eight .zip: handles stay few."""

from __future__ import annotations

import os
import tarfile
import zipfile
from functools import lru_cache
from pathlib import Path

from serve.errors import SourceError


def member_names(path: Path) -> list[str]:
    """Names of the files in a .zip or .tar, folders left out. Raises: SourceError."""
    try:
        modified_ns = path.stat().st_mtime_ns
        if path.suffix.lower() == ".zip":
            return [name for name in _open_zip(str(path), modified_ns, os.getpid()).namelist() if not name.endswith("/")]
        return list(_tar_index(str(path), modified_ns))
    except (OSError, zipfile.BadZipFile, tarfile.TarError) as error:
        raise SourceError(f"{path}: not a readable archive ({error}); compressed .tar files must be unpacked") from error


def read_member(location: str, member: str) -> bytes:
    """The bytes of one member. Raises: KeyError if there is none of this name, and whatever zipfile and the disk raise."""
    if location.lower().endswith(".zip"):
        return _open_zip(location, Path(location).stat().st_mtime_ns, os.getpid()).read(member)
    offset, size = tar_place(location, member)
    return read_range(location, offset, size)


def tar_place(location: str, member: str) -> tuple[int, int]:
    """Where a member of a .tar begins, in bytes, and its size. Raises: KeyError, OSError."""
    return _tar_index(location, Path(location).stat().st_mtime_ns)[member]


def read_range(location: str, offset: int, size: int) -> bytes:
    """`size` bytes of a file from `offset` on, or fewer where it ends. Raises: OSError."""
    with Path(location).open("rb") as file:
        file.seek(offset)
        return file.read(size)


@lru_cache(maxsize=8)  # by process: forked workers that shared a handle would move each other's place in the file
def _open_zip(location: str, _modified_ns: int, _process: int) -> zipfile.ZipFile:
    return zipfile.ZipFile(location)


@lru_cache(maxsize=4096)  # pictures are read in random order: with fewer, each read of another shard would index it anew
def _tar_index(location: str, _modified_ns: int) -> dict[str, tuple[int, int]]:
    with tarfile.open(location, "r:") as archive:
        members = [member for member in archive if member.isfile()]
        end = archive.offset
    if read_range(location, end, tarfile.BLOCKSIZE).strip(b"\0"):  # tarfile takes a damaged header for the end
        raise tarfile.ReadError(f"damaged at byte {end:,}")
    return {member.name.removeprefix("./"): (member.offset_data, member.size) for member in members}  # ./: tar -C folder .
