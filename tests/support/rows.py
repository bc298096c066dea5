"""Rows, files and a Hub for the tests of data modules and benchmarks."""

import json
from pathlib import Path
from typing import Any

import datasets

from data_modules import readers

LOAD_DATASET = datasets.load_dataset


def write_jsonl(path: Path, *rows: Any) -> str:
    """Write JSON lines and return the path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def attached(kind: type, tokenizer: Any, **options: Any) -> Any:
    """Return a data module that drops no row of a tiny tokenizer for its length, with that tokenizer."""
    data = kind(**{"max_length": 100_000, "validation_size": 1, **options})
    data.attach(tokenizer, is_encoder_decoder=False, context_length=None)
    return data


def from_file(kind: type, tokenizer: Any, folder: Path, rows: list[Any], **options: Any) -> Any:
    """Return an attached data module that reads these rows from a file in a folder."""
    path = write_jsonl(folder / "rows.jsonl", *rows)
    return attached(kind, tokenizer, path=path, **options)


def texts(data: Any, *splits: str) -> list[tuple[str, str]]:
    """Return prompt and answer of the rows of some splits, of the training rows if none is named."""
    return [(row.prompt, row.answer) for split in splits or ("train",) for row in data.rows(split)]


class Hub:
    """Stands for the Hub, with one set for each split.

    Args:
        monkeypatch: pytest's, which puts the Hub's functions back.
        rows: Rows of each set, by its name.
    """

    def __init__(self, monkeypatch: Any, **rows: list[dict[str, Any]]) -> None:
        self.rows = rows
        self.asked: list[tuple[str, ...]] = []
        self.probed: list[str] = []
        readers._reachable.cache_clear()
        monkeypatch.setattr("data_modules.readers.HfApi", lambda: self)
        monkeypatch.setattr("datasets.load_dataset", self.load_dataset)

    def dataset_info(self, name: str, timeout: float) -> None:
        """Answer, if asked not to take long, and remember the name."""
        assert timeout < 10
        self.probed.append(name)

    def load_dataset(self, *name: str, split: str | None) -> Any:
        """Return a set, or all of them by their names, and remember what is asked for."""
        self.asked.append((*name, split))
        if split is None:
            return {each: datasets.Dataset.from_list(rows) for each, rows in self.rows.items()}
        return datasets.Dataset.from_list(self.rows[split])


def unplug_hub(monkeypatch: Any, cache: Path) -> None:
    """Let the Hub be out of reach, and nothing of it be in the cache."""

    class Unreachable:
        def dataset_info(self, *_: Any, **__: Any) -> None:
            raise ConnectionError("no network")

    readers._reachable.cache_clear()
    monkeypatch.setattr("data_modules.readers.HfApi", Unreachable)
    monkeypatch.setattr("datasets.load_dataset", LOAD_DATASET)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
