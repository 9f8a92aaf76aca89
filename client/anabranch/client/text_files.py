"""An institution's own texts: JSONL or CSV files that lie in the node's data folder."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from anabranch.client.task import Split
from anabranch.client.text import Examples, TextClassification, TextConfig

TASK = "files"


class TextFiles(BaseModel):
    """Files of labelled texts, named relative to the node's data folder.

    The federation's configuration comes from the coordinator, so it can name nothing outside
    that folder: the node's operator sets it in ``ANABRANCH_DATA`` (default: the current folder).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    labels: dict[str, str] = Field(min_length=2)
    """Label as the files have it, to the phrase a label-names head embeds."""
    train: str = "train.jsonl"
    """File to train on; ``{partition}`` stands for the partition's index, here and below."""
    validation: str = "validation.jsonl"
    """File to choose on."""
    test: str = "test.jsonl"
    """File to report on."""
    text_field: str = "text"
    """Key or column of the text."""
    label_field: str = "label"
    """Key or column of the label."""


class TextFilesConfig(TextConfig):
    """Parameters of ``TextFilesTask``."""

    data: TextFiles
    """Where the texts lie."""


class TextFilesTask(TextClassification):
    """Text classification over files: ``anabranch.client.text_files:TextFilesTask``."""

    def __init__(self, **params: Any) -> None:
        config = TextFilesConfig(**params)
        super().__init__(config, TextFilesSource(config.data))


class TextFilesSource:
    """A ``TextSource`` over files."""

    def __init__(self, files: TextFiles) -> None:
        self._files = files
        self._index = {label: index for index, label in enumerate(files.labels)}

    @property
    def tasks(self) -> Mapping[str, tuple[str, ...]]:
        """One task, labels in the order the configuration gives them."""
        return {TASK: tuple(self._files.labels.values())}

    def examples(self, partition: int, split: Split) -> Examples:
        """Read one file.

        Raises:
            ValueError: No such file, a path outside the data folder, or a line that does not fit.
        """
        name: str = getattr(self._files, split)
        path = _inside_data_folder(name.replace("{partition}", str(partition)))
        texts, labels = [], []
        for line, row in _rows(path):
            text, label = row.get(self._files.text_field), row.get(self._files.label_field)
            # What the file holds stays here: messages travel, so they name fields and lines only.
            if not isinstance(text, str) or label is None:
                wanted = f"{self._files.text_field!r} and {self._files.label_field!r}"
                raise ValueError(f"{path.name} line {line}: wants the fields {wanted}")
            if str(label) not in self._index:
                known = ", ".join(self._index)
                raise ValueError(f"{path.name} line {line}: the label is none of {known}")
            texts.append(text)
            labels.append(self._index[str(label)])
        return Examples(TASK, texts, labels)


def _inside_data_folder(name: str) -> Path:
    relative = PurePath(name)
    if relative.is_absolute() or ".." in relative.parts:
        raise ValueError(f"data file {name!r} must lie inside the data folder; name it from there")
    path = Path(os.environ.get("ANABRANCH_DATA") or ".") / relative
    if not path.is_file():
        raise ValueError(f"no data file {name!r} in the data folder; set ANABRANCH_DATA to it")
    return path


def _rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Line numbers and records of a JSONL or CSV file."""
    # Spreadsheets begin a UTF-8 file with a byte order mark; it is no part of the first key.
    with path.open(encoding="utf-8-sig", newline="") as file:
        try:
            if path.suffix == ".csv":
                reader = csv.DictReader(file)
                for row in reader:
                    yield reader.line_num, row
            elif path.suffix == ".jsonl":
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        yield number, _record(path, number, line)
            else:
                raise ValueError(f"data file {path.name!r} is neither .jsonl nor .csv; convert it")
        except UnicodeDecodeError:
            raise ValueError(f"data file {path.name!r} is not UTF-8 text; convert it") from None


def _record(path: Path, number: int, line: str) -> Mapping[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path.name} line {number}: not JSON ({error.msg})") from None
    if not isinstance(record, dict):
        raise ValueError(f"{path.name} line {number}: not a JSON object")
    return record
