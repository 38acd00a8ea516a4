"""Lists of pictures, .csv or .parquet: a column `path`, and any of label, identity, camera, time, track."""

from __future__ import annotations

import csv
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from serve.errors import SourceError
from serve.samples import FACTS, Sample, stated_sample


def listed_samples(path: Path) -> Iterator[Sample]:
    """The pictures of a list, whose paths count from its folder. Raises: SourceError."""
    if path.suffix.lower() == ".csv":
        for line, row in enumerate(_csv_rows(path), start=2):
            yield _sample(path, f"line {line}", row)
        return
    from serve.formats.parquet_list import listed_rows  # brings pyarrow, which those who only train do not need

    for number, row in enumerate(listed_rows(path)):
        yield _sample(path, f"row {number}", row)


def check_columns(path: Path, columns: Collection[str]) -> None:
    """Raises: SourceError unless they are those of a list."""
    if "path" not in columns or set(columns) - {"path", *FACTS}:
        raise SourceError(f"{path}: columns are {sorted(columns)}, wanted path and any of {sorted(FACTS)}")


def _csv_rows(path: Path) -> Iterator[Mapping[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            check_columns(path, set(reader.fieldnames or ()))
            yield from reader
    except (UnicodeDecodeError, csv.Error) as error:
        raise SourceError(f"{path}: not a CSV file in UTF-8 ({error}); save it as one") from error


def _sample(path: Path, place: str, row: Mapping[str, str]) -> Sample:
    """What one row says of a picture. Empty is not known."""
    try:
        filled = {key: value for key, value in row.items() if value}
        return stated_sample(str(path.parent / filled.pop("path")), filled)
    except (KeyError, ValueError, TypeError) as error:
        raise SourceError(f"{path}, {place}: {row} is not path[,label,identity,camera,time,track] ({error})") from error
