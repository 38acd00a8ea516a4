"""The files of a root folder or an archive, as the readers of data sets look at them."""

from __future__ import annotations

import logging
import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile

from serve.errors import SourceError
from serve.samples import Sample

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"})
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tree:
    """Files by their paths in the root, sorted; what they are called outside of it; and how to read one."""

    members: Sequence[str]
    source: Callable[[str], str]
    read: Callable[[str], bytes]
    """Raises: SourceError."""
    choice: str = ""
    """Which of several lists is meant, where a data set has several: its path in the root."""

    @cached_property
    def pictures(self) -> list[str]:
        """The members that are pictures."""
        return list(filter(is_picture, self.members))

    @property
    def wrapping(self) -> str:
        """The path that all pictures share, with a slash at its end, or nothing: archives often wrap everything in a folder."""
        if not self.pictures:
            return ""
        first, last = (member.split("/")[:-1] for member in (self.pictures[0], self.pictures[-1]))  # sorted: so do all between
        return "".join(f"{one}/" for one, _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False)))

    def find(self, *names: str) -> str | None:
        """The outermost of the wrapping folders that holds any of these files or folders, with a slash at its end."""
        parts = self.wrapping.split("/")
        roots = ["".join(f"{part}/" for part in parts[:depth]) for depth in range(len(parts))]
        return next((root for root in roots if any(self.has(f"{root}{name}") for name in names)), None)

    def has(self, path: str) -> bool:
        """Whether there is a file or a folder of this path."""
        place = bisect_left(self.members, path)
        return self.members[place : place + 1] == [path] or bool(_slice(self.members, path))

    def below(self, folder: str) -> list[str]:
        """The pictures in a folder and its sub-folders; all of them where `folder` is empty."""
        return _slice(self.pictures, folder)

    def named(self, folder: str, grammar: re.Pattern[str]) -> tuple[Sample, ...]:
        """The pictures in a folder, by what their names say: `grammar`'s groups are fields of Sample.

        It is matched from the beginning of the file's name, never on a folder's. Names that do not fit are logged and left out.
        """
        matches = {member: grammar.match(member.rpartition("/")[2]) for member in self.below(folder)}
        strange = [member for member, match in matches.items() if match is None]
        if strange:
            _log.warning("%s: left out %s of other names, such as %s", folder, f"{len(strange):,}", strange[0])
        return tuple(sample_named(self.source(member), match) for member, match in matches.items() if match is not None)

    def rows(self, member: str, columns: int) -> list[list[str]]:
        """The lines of a list, split at blanks; empty ones are skipped. Raises: SourceError."""
        try:
            lines = self.read(member).decode("utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise SourceError(f"{self.source(member)}: not text in UTF-8; download it again") from error
        rows = [(number, line.split()) for number, line in enumerate(lines, start=1) if line.strip()]
        for number, row in rows:
            if len(row) != columns:
                raise SourceError(
                    f"{self.source(member)}, line {number}: {' '.join(row)[:60]!r} has {len(row)} columns, wanted {columns}"
                )
        return [row for _, row in rows]

    def present(self, names: Sequence[str], listed_in: str) -> frozenset[str]:
        """Those of these pictures that are there; how many are not is logged."""
        missing = [name for name in names if not self.has(name)]
        if missing:
            _log.warning(
                "%s: %s of its %s pictures are not there, such as %s",
                self.source(listed_in),
                f"{len(missing):,}",
                f"{len(names):,}",
                missing[0],
            )
        return frozenset(names) - frozenset(missing)


def sample_named(source: str, match: re.Match[str]) -> Sample:
    """A sample from a match whose groups are called after its fields."""
    known = {field: text for field, text in match.groupdict().items() if text is not None}
    time = known.pop("time", None)
    if "camera" in known:
        known["camera"] = str(int(known["camera"]))
    return Sample(source, time=float(time) if time is not None else None, **known)


def is_picture(member: str) -> bool:
    """By its ending, and not hidden. No pathlib: this is asked of every file of a large tree."""
    *folders, name = member.split("/")
    return name[name.rfind(".") :].lower() in IMAGE_SUFFIXES and not any(
        part.startswith((".", "__MACOSX")) and part != "." for part in (*folders, name)
    )


def _slice(members: Sequence[str], folder: str) -> list[str]:
    if not folder:
        return list(members)
    return list(members[bisect_left(members, f"{folder}/") : bisect_left(members, f"{folder}0")])  # 0 comes after the slash
