"""What is known about imported vectors: columns of a list or of the vectors' own file -> samples, more facts, and ids."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import JsonValue

from serve.errors import SourceError, first_line
from serve.formats.parquet_list import as_text, check_kind
from serve.samples import FACTS, Sample, stated_sample
from serve.transfer.vector_file import Block

SOURCE_COLUMNS = ("source", "path", "image_path", "filepath", "url")
"""The first of these that is there names the pictures. A `path` counts from its list's folder, others are taken as they are."""
_PANDAS_INDEX = "__index_level_"


@dataclass(frozen=True)
class Items:
    """Rows as a gallery takes them: `extra` and `ids` go by source, and hold the first row of each."""

    samples: list[Sample] = field(default_factory=list)
    extra: dict[str, dict[str, JsonValue]] = field(default_factory=dict)
    ids: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class ItemList:
    """A table of facts from a file beside the vectors. All of it is in memory, as columns."""

    path: Path
    table: pa.Table
    is_text: bool
    """Whether its cells have no types, so that in `extra` what is JSON is taken as such."""

    @classmethod
    def read(cls, path: Path) -> ItemList:
        """A .csv or .parquet of facts, a .npy of whole numbers or text, a .txt of a source a line. Raises: SourceError."""
        try:
            match path.suffix.lower():
                case ".csv":
                    return cls(path, _read_csv(path), is_text=True)
                case ".parquet":
                    return cls(path, pq.read_table(path), is_text=False)
                case ".npy":
                    return cls(path, _read_npy(path), is_text=False)
                case ".txt":
                    lines = path.read_text(encoding="utf-8").splitlines()
                    return cls(path, pa.table({"source": pa.array(lines, pa.string())}), is_text=False)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise SourceError(f"{path}: cannot be read ({first_line(error)})") from error
        raise SourceError(f"{path}: --items wants .csv, .parquet, .npy or .txt")

    def of(self, block: Block, by_id: bool) -> pa.Table:
        """The rows that belong to a block's: of the same numbers or, if the list has a column id and `by_id`, of those ids."""
        places = block.ids
        if by_id and "id" in self.table.column_names and len(self.table):
            known = self._ids()
            order = np.argsort(known, kind="stable")
            places = order[np.searchsorted(known, block.ids, sorter=order).clip(max=len(known) - 1)]
            missing = block.ids[known[places] != block.ids]
        else:
            missing = block.ids[(places < 0) | (places >= len(self.table))]
        if len(missing):
            raise SourceError(f"{self.path}: says nothing of id {missing[0]}; wanted a row for each vector")
        return self.table.take(pa.array(places))

    def _ids(self) -> NDArray[np.int64]:
        try:
            return np.asarray(self.table["id"].cast(pa.int64()).combine_chunks().to_numpy(zero_copy_only=False), np.int64)
        except (ValueError, pa.ArrowException) as error:
            raise SourceError(f"{self.path}: its column id holds {self.table['id'].type}, wanted whole numbers") from error


def _read_csv(path: Path) -> pa.Table:
    with path.open(newline="", encoding="utf-8-sig") as file:
        names = next(csv.reader(file), [])
    return pa.csv.read_csv(
        path,
        parse_options=pa.csv.ParseOptions(newlines_in_values=True),
        convert_options=pa.csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string())),
    )


def _read_npy(path: Path) -> pa.Table:
    array = np.load(path, allow_pickle=False)
    if array.ndim != 1 or array.dtype.kind not in "iuU":
        raise SourceError(f"{path}: holds {array.dtype}{array.shape}, wanted whole numbers or text of shape (N,)")
    return pa.table({"source" if array.dtype.kind == "U" else "id": pa.array(array)})


def items_of(facts: pa.Table, origin: Path, name: str, numbers: NDArray[np.int64], *, is_text: bool, keep_ids: bool) -> Items:
    """What a table says of some rows. Where no column names them they are NAME#NUMBER, with their id or number.

    `keep_ids`: the column id is meant for the gallery; else it is a fact like others. Raises: SourceError.
    """
    source_column = next((column for column in SOURCE_COLUMNS if column in facts.column_names), None)
    for column in facts.schema:
        if column.name in FACTS or column.name == source_column:
            check_kind(origin, column)
    items = Items()
    for number, row in zip(numbers.tolist(), facts.to_pylist() if facts.num_columns else [{}] * len(numbers), strict=True):
        said = {column: value for column, value in row.items() if not _is_unknown(value, is_text)}
        item_id = said.pop("id", None) if keep_ids else said.get("id")
        if source_column is None:
            source = f"{name}#{number if item_id is None else item_id}"
        elif source_column in said:
            source = _source(source_column, as_text(said.pop(source_column)), origin)
        else:
            raise SourceError(f"{origin}: row {number} has no {source_column}, which names it")
        known = {column: as_text(said.pop(column)) for column in FACTS if column in said}
        items.samples.append(_sample(source, known, origin))
        items.extra.setdefault(source, _extra(said, is_text, source, origin))
        if keep_ids:
            items.ids.setdefault(source, _whole(item_id, source, origin))
    return items


def _whole(item_id: object, source: str, origin: Path) -> int:
    if not isinstance(item_id, int):
        raise SourceError(f"{origin}: {source} has the id {item_id}, wanted a whole number; or have new ids given (--new-ids)")
    return item_id


def _is_unknown(value: object, is_text: bool) -> bool:
    return value is None or value != value or (is_text and value == "")  # NaN is how pandas says it


def _source(column: str, text: str, origin: Path) -> str:
    return str(origin.absolute().parent / text) if column == "path" else text


def _sample(source: str, known: Mapping[str, str], origin: Path) -> Sample:
    try:
        return stated_sample(source, known)
    except ValueError as error:
        raise SourceError(f"{origin}: {source}: {error}") from error


def _extra(said: Mapping[str, Any], is_text: bool, source: str, origin: Path) -> dict[str, JsonValue]:
    more = {name: value for name, value in said.items() if name != "extra" and not name.startswith(_PANDAS_INDEX)}
    extra: dict[str, JsonValue] = {name: _as_json(value) if is_text else _plain(value) for name, value in more.items()}
    if "extra" in said:
        try:
            whole = json.loads(said["extra"]) if isinstance(said["extra"], str) else said["extra"]
            return extra | dict(whole)
        except (ValueError, TypeError) as error:
            raise SourceError(f"{origin}: {source}: extra is {said['extra']!r}, wanted a JSON object") from error
    return extra


def _as_json(text: str) -> JsonValue:
    """A cell that is JSON, such as 7 or true or [1, 2], as that; else the text itself, such as 007 or red."""
    try:
        value: JsonValue = json.loads(text, parse_constant=_finite, parse_float=_finite)
    except (ValueError, RecursionError):
        return text
    return value


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text} is no JSON")
    return value


def _plain(value: Any) -> JsonValue:  # noqa: ANN401
    """A time as text; whatever else JSON cannot hold is refused by the catalog."""
    plain: JsonValue = value.isoformat() if isinstance(value, date) else value
    return plain
