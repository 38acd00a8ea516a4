"""The rows of a list of pictures in Parquet (serve/formats/picture_list.py)."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import date
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from serve.errors import SourceError, first_line
from serve.formats.picture_list import check_columns


def listed_rows(path: Path) -> Iterator[dict[str, str]]:
    """What each row says, as text; nothing for a null. Only a block of rows is in memory. Raises: SourceError."""
    try:
        with pq.ParquetFile(path) as file:
            check_columns(path, file.schema_arrow.names)
            for field in file.schema_arrow:
                check_kind(path, field)
            for block in file.iter_batches():
                for row in block.to_pylist():
                    yield {name: as_text(value) for name, value in row.items() if value is not None}
    except (OSError, ValueError, pa.ArrowException) as error:
        raise SourceError(f"{path}: not a readable Parquet file ({first_line(error)})") from error


def check_kind(path: Path, field: pa.Field) -> None:
    """Raises: SourceError if a column's values are neither names nor, if it is called so, a time."""
    if not _is_accepted(field):
        raise SourceError(
            f"{path}: {field.name} is {field.type}, wanted text or whole numbers{', or a time' * (field.name == 'time')}"
        )


def _is_accepted(field: pa.Field) -> bool:
    """Floats are refused as names: one missing value, and pandas makes identity 7 a 7.0."""
    kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
    tests = [pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_integer, pa.types.is_null]
    if field.name == "time":
        tests += [pa.types.is_floating, pa.types.is_timestamp, pa.types.is_date]
    return any(test(kind) for test in tests)


def as_text(value: object) -> str:
    """A value as a CSV file would have it."""
    return value.isoformat() if isinstance(value, date) else str(value)
