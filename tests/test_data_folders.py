"""Folders of data: files that tell of the data are none where others are, as in data sets of the hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from shardxform.calibration.documents import chosen, local_files
from shardxform.errors import PlanError

CARDS = ("README.md", "readme.txt", "README_zh.md", "LICENSE.txt", "LICENCE-APACHE.md", "NOTICE.txt", "CHANGELOG.md")
FACTS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "CITATION.md", "_x.json")


def found(folder: Path, paths: Sequence[str]) -> list[str]:
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text("{}")
    return [file.name for file in local_files(str(folder))]


@pytest.mark.parametrize("data", ["train.jsonl", "a.json", "0.parquet", "text.txt"])
def test_files_about_data_are_none(tmp_path: Path, data: str) -> None:
    assert found(tmp_path, [*CARDS, *FACTS, ".gitattributes", ".hidden.jsonl", data]) == [data]
    assert chosen("o/n", [*CARDS, *FACTS, ".gitattributes", data], "") == (data,)


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["README.md"], ["README.md"]),  # a folder of nothing else
        (["README.md", "LICENSE.txt"], ["LICENSE.txt", "README.md"]),
        (["readings.txt", "state_of_things.json", "README.md"], ["readings.txt", "state_of_things.json"]),
        (["a.md", "b.txt", "c.md"], ["a.md", "b.txt", "c.md"]),
        (["about.md", "b.jsonl"], ["b.jsonl"]),
        (["b.jsonl", "c.txt"], ["b.jsonl", "c.txt"]),
        (["b.jsonl", "data/c.jsonl"], ["b.jsonl"]),
    ],
)
def test_what_is_data_in_a_folder(tmp_path: Path, paths: list[str], expected: list[str]) -> None:
    assert found(tmp_path, paths) == expected


def test_a_clone_of_a_data_set_is_read_as_the_data_set_is(tmp_path: Path) -> None:
    shards = [f"data/train-0000{number}-of-00002.parquet" for number in range(2)]
    paths = ["README.md", *shards, "data/test-00000-of-00001.parquet", ".git/a.json", "data/README.md", "x/.h.json"]
    assert found(tmp_path, paths) == shards == list(chosen("o/n", paths, ""))
    with pytest.raises(PlanError, match=r"found 'data/train', 'en/train': name one by the path of its folder or file"):
        found(tmp_path, ["en/train-00000-of-00001.parquet"])


def test_a_folder_of_no_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"expected \.jsonl, .* files in it, found none"):
        found(tmp_path, ["a.csv", ".git/a.json"])
