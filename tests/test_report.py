"""Result tables."""

from __future__ import annotations

import numpy as np
import pytest

from common_jax.report import format_markdown_table, format_table, write_markdown_table

ROWS = [
    {"head": "gw", "accuracy": np.float32(0.91234), "images": 12},
    {"head": "untrained", "accuracy": float("nan"), "images": np.int64(1000), "note": "a|b\nc"},
]
COLUMNS = ["head", ("accuracy", ".3f"), "images", "note"]


def test_text_tables_are_aligned():
    assert format_table(ROWS, COLUMNS, title="Scenes").split("\n") == [
        "Scenes",
        "head       accuracy  images  note",
        "---------  --------  ------  -----",
        "gw            0.912      12  -",
        "untrained         -    1000  a|b c",
    ]


def test_markdown_tables_keep_bars_inside_cells():
    assert format_markdown_table(ROWS, COLUMNS).split("\n") == [
        "| head      | accuracy | images | note   |",
        "| --------- | -------: | -----: | ------ |",
        "| gw        |    0.912 |     12 | -      |",
        "| untrained |        - |   1000 | a\\|b c |",
    ]


def test_markdown_files_hold_the_table_and_end_in_a_newline(tmp_path):
    path = write_markdown_table(ROWS, ["head"], tmp_path / "new" / "t.md", title="Heads")
    expected = "**Heads**\n\n| head      |\n| --------- |\n| gw        |\n| untrained |\n"
    assert path.read_text() == expected


def test_arrays_of_one_number_count_as_numbers():
    assert format_table([{"x": np.array(0.5)}, {"x": np.array(12)}], ["x"]).split("\n")[2:] == [
        "0.5",
        " 12",
    ]


def test_columns_no_row_has_are_refused_and_empty_tables_keep_their_header():
    with pytest.raises(ValueError, match="'accurcy'.*accuracy"):
        format_table(ROWS, ["accurcy"])
    with pytest.raises(ValueError, match="list of keys"):
        format_table(ROWS, "head")
    assert format_table([], ["head", "n"]) == "head  n\n----  -"
