"""WebDataset shards: .tar files whose members belong together by name, `0001.jpg` with `0001.cls` or `0001.json`.

A member's key is its path up to the first dot of its last part, as in github.com/webdataset/webdataset.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from serve.errors import SourceError
from serve.formats.archives import member_names, read_range, tar_place
from serve.samples import FACTS

_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")
_MOST_SHARDS = 100_000


def expand_braces(pattern: str) -> list[Path]:
    """`train-{000..127}.tar` -> its 128 paths, as a shell counts; nothing where there are no such braces.

    Raises: SourceError if one of the shards is missing.
    """
    match = _BRACES.search(pattern)
    if match is None or Path(pattern).exists():
        return []
    first, last = (int(text) for text in match.groups())
    if not 0 <= last - first < _MOST_SHARDS:
        raise SourceError(f"{pattern}: {match[0]} counts {last - first + 1:,} shards, wanted 1 to {_MOST_SHARDS:,}")
    before, after = pattern[: match.start()], pattern[match.end() :]
    paths = [Path(f"{before}{number:0{len(match[1])}}{after}").absolute() for number in range(first, last + 1)]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise SourceError(f"{pattern}: {len(missing):,} of {len(paths):,} shards are missing, such as {missing[0]}")
    return paths


def pictures_with_facts(path: Path, pictures: Sequence[str]) -> dict[str, dict[str, str]]:
    """The pictures of one shard and what their sidecars say of them: label, identity, camera, time, track, as text.

    Nothing if no sidecar says any of these. Of a key with several pictures those of one-part endings stay: `7.jpg` and not its
    mask `7.seg.png`. Raises: SourceError.
    """
    endings: dict[str, dict[str, str]] = {}
    for member in member_names(path):
        key, ending = _key_and_ending(member)
        endings.setdefault(key, {})[ending] = member
    keys = dict.fromkeys(_key_and_ending(picture)[0] for picture in pictures)
    facts = {key: _facts(path, endings[key]) for key in keys if endings[key].keys() & {"cls", "json"}}
    if not any(facts.values()):
        return {}
    plain = {_key_and_ending(picture)[0] for picture in pictures if "." not in _key_and_ending(picture)[1]}
    found = {}
    for picture in pictures:
        key, ending = _key_and_ending(picture)
        if "." not in ending or key not in plain:
            found[picture] = facts.get(key, {})
    return found


def _key_and_ending(member: str) -> tuple[str, str]:
    folder, slash, name = member.rpartition("/")
    stem, _, ending = name.partition(".")
    return f"{folder}{slash}{stem}", ending.lower()


def _facts(path: Path, members: Mapping[str, str]) -> dict[str, str]:
    """What `.cls` (a class number) and `.json` (an object) say; where both name a label, the JSON's stands."""
    facts = {}
    if "cls" in members:
        text = _text(path, members["cls"]).strip()
        if not re.fullmatch(r"\d{1,18}", text, re.ASCII):
            raise SourceError(f"{path}!/{members['cls']}: holds {text[:40]!r}, wanted a class number")
        facts["label"] = str(int(text))
    return facts | (_json_facts(path, members["json"]) if "json" in members else {})


def _json_facts(path: Path, member: str) -> dict[str, str]:
    try:
        content = json.loads(_text(path, member))
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path}!/{member}: not readable JSON ({error})") from error
    if not isinstance(content, dict):
        raise SourceError(f"{path}!/{member}: holds a {type(content).__name__}, wanted an object with any of {FACTS}")
    facts = {}
    for field in FACTS:
        value = content.get(field)
        if isinstance(value, bool) or not isinstance(value, str | int | float | None):
            raise SourceError(f"{path}!/{member}: {field} is a {type(value).__name__}, wanted text or a number")
        if value is not None and value != "":
            facts[field] = str(value)
    return facts


def _text(path: Path, member: str) -> str:
    try:
        return read_range(str(path), *tar_place(str(path), member)).decode()
    except UnicodeDecodeError as error:
        raise SourceError(f"{path}!/{member}: not text in UTF-8") from error
