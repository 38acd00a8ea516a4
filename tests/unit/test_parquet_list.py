"""Lists of pictures in Parquet say the same as a CSV of the same rows."""

import csv
from datetime import UTC, date, datetime

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from serve.samples import Sample
from serve.sources import open_source
from tests.drawn_sources import refusal


def test_it_says_what_a_csv_says(tmp_path):
    rows = [("a.png", "cat", "7", "1", "2.5"), ("b/ü.png", "", "", "", ""), ("c.zip!/d.png", "dog", "", "02", "2024-01-01")]
    names = ("path", "label", "identity", "camera", "time")
    with (tmp_path / "list.csv").open("w", newline="") as file:
        csv.writer(file).writerows([names, *rows])
    columns = {name: [row[place] or None for row in rows] for place, name in enumerate(names)}
    pq.write_table(pa.table(columns), tmp_path / "list.parquet")
    wanted = open_source(tmp_path / "list.csv")
    assert len(wanted.train) == 3
    assert open_source(tmp_path / "list.parquet") == wanted


def test_rows_of_several_blocks_stay_in_order(tmp_path):
    names = [f"{i:06}.png" for i in range(70_000)]
    pq.write_table(pa.table({"path": names}), tmp_path / "list.parquet", row_group_size=10_000)
    samples = open_source(tmp_path / "list.parquet").train
    assert [sample.source for sample in samples] == [str(tmp_path / name) for name in names]


def test_whole_numbers_categories_and_times_of_pandas(tmp_path):
    moment = datetime(2024, 3, 1, 12, 30, tzinfo=UTC)
    frame = {
        "path": pd.Series(["a.png", "b.png"], dtype="string"),
        "label": pd.Categorical(["cat", None]),
        "identity": pd.Series([7, None], dtype="Int64"),
        "camera": [1, 2],
        "time": [pd.Timestamp("2024-03-01 12:30"), pd.NaT],
    }
    pd.DataFrame(frame).to_parquet(tmp_path / "list.parquet", index=False)
    assert open_source(tmp_path / "list.parquet").train == (
        Sample(str(tmp_path / "a.png"), "cat", "7", "1", moment.timestamp()),
        Sample(str(tmp_path / "b.png"), None, None, "2", None),
    )


@pytest.mark.parametrize(
    ("value", "seconds"),
    [(2.5, 2.5), (3, 3.0), ("1e3", 1000.0), (date(2024, 3, 1), datetime(2024, 3, 1, tzinfo=UTC).timestamp())],
)
def test_times(tmp_path, value, seconds):
    pq.write_table(pa.table({"path": ["a.png"], "time": [value]}), tmp_path / "list.parquet")
    assert open_source(tmp_path / "list.parquet").train[0].time == seconds


@pytest.mark.parametrize(
    ("columns", "complaint"),
    [
        ({"file": ["a.png"]}, "columns are ['file'], wanted path and any of ['camera', 'identity', 'label', 'time', 'track']"),
        ({"path": ["a.png"], "colour": ["red"]}, "columns are ['colour', 'path'], wanted path"),
        ({"path": ["a.png"], "identity": [7.0]}, "identity is double, wanted text or whole numbers"),
        ({"path": ["a.png"], "label": [True]}, "label is bool, wanted text or whole numbers"),
        ({"path": ["a.png"], "time": [[1.0]]}, "time is list<element: double>, wanted text or whole numbers, or a time"),
        ({"path": ["a.png", None]}, "row 1: {} is not path[,label,identity,camera,time,track]"),
        ({"path": ["a.png"], "time": ["yesterday"]}, "row 0: {'path': 'a.png', 'time': 'yesterday'}"),
        ({"path": ["a.png"], "time": [float("nan")]}, "time is 'nan'"),
        ({"path": pa.array([], pa.string())}, "holds no pictures"),
    ],
)
def test_a_list_that_cannot_be_used(tmp_path, columns, complaint):
    pq.write_table(pa.table(columns), tmp_path / "list.parquet")
    message = refusal(tmp_path / "list.parquet")
    assert message.startswith(str(tmp_path / "list.parquet"))
    assert complaint in message


@pytest.mark.parametrize("content", [b"", b"path\na.png\n", b"PAR1" + bytes(100) + b"PAR1"])
def test_what_is_no_parquet_file(tmp_path, content):
    (tmp_path / "list.parquet").write_bytes(content)
    assert "list.parquet: not a readable Parquet file (" in refusal(tmp_path / "list.parquet")
