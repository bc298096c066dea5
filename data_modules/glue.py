"""GLUE as text-to-text: five tasks of the LoRA-One paper, from the Hub or from GLUE's own files.

Prompts and label words are those of the LoRA-One and LoRA-GA code: a prefix, the sentences joined
by a line break, "result:", and a word for each class in the integer order of the Hub's data set.
"""

import gzip
import json
import pathlib
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TextIO, cast

import datasets
from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from app.utils.errors import InputError
from app.utils.text import did_you_mean
from data_modules.encoding import TextRow
from data_modules.sampling import split_off
from data_modules.text import TextDataModule

HUB_ID = "nyu-mll/glue"
PROBE_TIMEOUT_S = 5.0
FILE_ENDINGS = (".tsv", ".tsv.gz", ".jsonl", ".jsonl.gz")
NO_GOLD_LABEL = "-"  # MultiNLI rows whose annotators did not agree

Record = tuple[str, list[str]]  # where it stands, for messages; its sentences, and last its label


@dataclass(frozen=True)
class GlueTask:
    """One task: its prompt, its label words, and what its columns are called where."""

    folder: str
    prefix: str
    label_words: tuple[str, ...]
    columns: tuple[str, ...]  # sentences and label on the Hub and in JSON lines
    tsv_columns: tuple[str, ...]  # the same in GLUE's own files
    tsv_header: tuple[str, ...] | None = None  # for labelled files without a header line
    matched: str = ""  # what tells MNLI's matched sets from its mismatched ones


MISSING_DEV_ROWS = 1043  # CoLA's, the set that some copies of GLUE lack

SIMILARITY = "classify the semantic similarity of the text: "
TASKS = {
    "mnli": GlueTask(
        "MNLI",
        SIMILARITY,
        ("entailment", "neutral", "contradiction"),
        ("premise", "hypothesis", "label"),
        ("sentence1", "sentence2", "gold_label"),
        matched="_matched",
    ),
    "sst2": GlueTask(
        "SST-2",
        "classify the sentiment of the text: ",
        ("negative", "positive"),
        ("sentence", "label"),
        ("sentence", "label"),
    ),
    "cola": GlueTask(
        "CoLA",
        "classify the grammaticality of the text: ",
        ("unacceptable", "acceptable"),
        ("sentence", "label"),
        ("sentence", "label"),
        tsv_header=("source", "label", "mark", "sentence"),
    ),
    "qnli": GlueTask(
        "QNLI",
        "classify the semantic similarity of the question and the sentence: ",
        ("entailment", "not_entailment"),
        ("question", "sentence", "label"),
        ("question", "sentence", "label"),
    ),
    "mrpc": GlueTask(
        "MRPC",
        SIMILARITY,
        ("different", "equivalent"),
        ("sentence1", "sentence2", "label"),
        ("#1 String", "#2 String", "Quality"),
    ),
}


class GlueDataModule(TextDataModule):
    """Read one GLUE task; the field reports GLUE on its validation set, so that is the test set.

    Args:
        task: mnli, sst2, cola, qnli or mrpc.
        path: A folder in GLUE's layout (PATH/SST-2/train.tsv) or the task's own folder, with files
            .tsv, .tsv.gz, .jsonl or .jsonl.gz, preferred in this order; null takes nyu-mll/glue
            from the Hub.
        train_file: Name of the training file in the task's folder; null looks for train.tsv (and
            the other endings).
        validation_size: Number of training rows set aside for validation in place of the published
            validation set, which then only the test meets; null validates on the published set.
            Where there is none (some copies of CoLA), the test reports the rows set aside.
        test_split: The published set that the test reports; "test" needs labels, which GLUE
            withholds.
        **options: See `TextDataModule`.
    """

    def __init__(
        self,
        task: str,
        path: str | None = None,
        train_file: str | None = None,
        validation_size: int | None = None,
        test_split: Literal["validation", "test"] = "validation",
        **options: Any,
    ) -> None:
        super().__init__(path=path, validation_size=validation_size, **options)
        if task not in TASKS:
            hint = did_you_mean(task.lower(), TASKS, cutoff=0.4)
            raise InputError(f"--data.task={task}: expected one of {', '.join(TASKS)}{hint}")
        if train_file is not None and path is None:
            raise InputError(
                f"--data.train_file={train_file}: expected a local folder; set --data.path"
            )
        self.task = TASKS[task]
        self.task_name = f"glue/{task}"
        self.label_words = self.task.label_words
        self.train_file = train_file
        self.test_split = test_split
        self.source = path or HUB_ID

    def load(self) -> dict[str, list[TextRow]]:
        """Read the published sets, and decide which one validates and which one is reported.

        Raises:
            InputError: A set is missing, unlabelled or not in the expected form, or the Hub is out
                of reach.
        """
        published = self._open_hub() if self.path is None else self._open_files()
        self.dropped_rows = {}
        rows = {split: self._rows_of(split, records) for split, records in published.items()}
        train, dev = rows["train"], rows.get("validation")
        if self.validation_size is not None:
            train, validation = split_off(train, self.validation_size, "data.validation_size")
        elif dev is not None:
            validation = dev
        else:
            size = min(MISSING_DEV_ROWS, len(train) // 10)
            rank_zero_warn(
                f"{self.source} has no dev{self.task.matched}.tsv: {size} training rows are set aside "
                "to validate on, which are not the published ones; --data.validation_size sets how many"
            )
            train, validation = split_off(train, size, "data.validation_size")
        test = rows.get("test", dev or validation)
        return {"train": train, "validation": validation, "test": test}

    def _rows_of(self, split: str, records: Iterator[Record]) -> list[TextRow]:
        """Make prompts of a set's records; rows without a gold label are dropped and counted."""
        targets = {word: target for target, word in enumerate(self.label_words)}
        targets |= {str(target): target for target in range(len(self.label_words))}
        rows: list[TextRow] = []
        num_dropped = 0
        for where, (*sentences, label) in records:
            if label == NO_GOLD_LABEL:
                num_dropped += 1
                continue
            if split == "test" and label in ("-1", ""):
                raise InputError(_no_test_labels(where))
            if label not in targets:
                raise InputError(
                    f"{where} has the label {label!r}: expected one of {', '.join(targets)}; "
                    "correct it, or change --data.task or --data.path"
                )
            prompt = self.task.prefix + "\n".join(sentences) + "\nresult: "
            rows.append(TextRow(prompt, self.label_words[targets[label]], targets[label]))
        if not rows:
            raise InputError(
                f"{self.source} has no {split} rows: expected some; change --data.path"
            )
        self.dropped_rows[split] = num_dropped
        return rows

    def _splits(self) -> dict[str, str]:
        """Return the sets to read and what the Hub calls them."""
        splits = {"train": "train", "validation": f"validation{self.task.matched}"}
        return splits | ({"test": f"test{self.task.matched}"} if self.test_split == "test" else {})

    def _open_hub(self) -> dict[str, Iterator[Record]]:
        """Return the Hub's sets; without a network they come from its cache."""
        name = self.task_name.removeprefix("glue/")
        offline = datasets.config.HF_HUB_OFFLINE
        try:
            HfApi().dataset_info(HUB_ID, timeout=PROBE_TIMEOUT_S)
        except (OSError, HTTPError):
            datasets.config.HF_HUB_OFFLINE = True  # else the library retries for half a minute
        try:
            data = datasets.load_dataset(HUB_ID, name)
        except (OSError, ValueError, HTTPError, datasets.exceptions.DatasetsError) as error:
            raise InputError(
                f"cannot load {HUB_ID} ({name}): {error}. Expected a network or a filled cache; or "
                f"set --data.path to a GLUE folder, which holds {self.task.folder}/train.tsv"
            ) from error
        finally:
            datasets.config.HF_HUB_OFFLINE = offline
        return {split: self._hub_records(data, name) for split, name in self._splits().items()}

    def _hub_records(self, data: Any, hub_split: str) -> Iterator[Record]:
        name = f"{HUB_ID} {hub_split}"
        for number, row in enumerate(data[hub_split]):
            yield f"row {number} of {name}", _cells(row, self.task.columns, name)

    def _open_files(self) -> dict[str, Iterator[Record]]:
        """Return the sets whose files exist; only the validation set may lack."""
        root = pathlib.Path(cast(str, self.path))
        folder = root / self.task.folder if (root / self.task.folder).is_dir() else root
        if not folder.is_dir():
            raise InputError(f"--data.path={root}: expected a GLUE folder; change --data.path")
        files: dict[str, pathlib.Path] = {}
        for split, hub_split in self._splits().items():
            stem = hub_split.replace("validation", "dev")
            names = [stem + ending for ending in FILE_ENDINGS]
            if split == "train" and self.train_file is not None:
                names = [self.train_file]
            present = [folder / name for name in names if (folder / name).is_file()]
            if present:
                files[split] = present[0]
            elif split != "validation":
                found = ", ".join(sorted(entry.name for entry in folder.iterdir())) or "nothing"
                settings = {"train": "path or --data.train_file", "test": "test_split"}
                raise InputError(
                    f"{folder} has no {split} set of {self.task_name}: expected "
                    f"{' or '.join(names)}, found {found}; change --data.{settings[split]}"
                )
        self.source = f"{folder} ({', '.join(file.name for file in files.values())})"
        rank_zero_info(f"{self.task_name}: reading {self.source}")
        return {split: self._file_records(split, file) for split, file in files.items()}

    def _file_records(self, split: str, file: pathlib.Path) -> Iterator[Record]:
        """Read the sentences and the label of each row of a file."""
        is_tsv = ".tsv" in file.suffixes
        columns = self.task.tsv_columns if is_tsv else self.task.columns
        header = self.task.tsv_header if split != "test" else None
        try:
            with _open_text(file) as stream:
                rows = _read_tsv(stream, file, header) if is_tsv else _read_jsonl(stream, file)
                for number, row in rows:
                    if split == "test" and columns[-1] not in row:
                        raise InputError(_no_test_labels(str(file)))
                    yield f"line {number} of {file}", _cells(row, columns, str(file))
        except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
            message = f"cannot read {file} ({error}): expected UTF-8 text; change --data.path"
            raise InputError(message) from error


def _open_text(file: pathlib.Path) -> TextIO:
    """Open a plain or gzipped file; only a line feed ends a line, a byte order mark is no text."""
    opened = gzip.open if file.suffix == ".gz" else open
    return cast(TextIO, opened(file, "rt", encoding="utf-8-sig", newline="\n"))


def _read_tsv(
    stream: TextIO, file: pathlib.Path, header: tuple[str, ...] | None
) -> Iterator[tuple[int, dict[str, str]]]:
    """Split lines at tabs and nothing else: GLUE's quotes and number signs are text."""
    for number, line in enumerate(stream, 1):
        cells = line.rstrip("\r\n").split("\t")
        if header is None:
            header = tuple(cells)
        elif len(cells) == len(header):
            yield number, dict(zip(header, cells, strict=True))
        elif line.strip():
            raise InputError(
                f"line {number} of {file} has {len(cells)} columns: expected {len(header)} "
                f"({', '.join(header)}); correct it, or change --data.task or --data.path"
            )


def _read_jsonl(stream: TextIO, file: pathlib.Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Read one JSON object a line."""
    for number, line in enumerate(stream, 1):
        try:
            if line.strip():
                yield number, dict(json.loads(line))
        except (TypeError, ValueError) as error:
            raise InputError(
                f"line {number} of {file} ({error}): expected a JSON object; change --data.path"
            ) from error


def _cells(row: Mapping[str, Any], columns: tuple[str, ...], name: str) -> list[str]:
    """Return the wanted cells as text, without the spaces around them."""
    if not set(columns) <= set(row):
        raise InputError(
            f"{name} has the columns {', '.join(row)}: expected {', '.join(columns)}; "
            "change --data.task or --data.path"
        )
    return [str(row[column]).strip() for column in columns]


def _no_test_labels(name: str) -> str:
    return (
        f"{name} has no labels, which GLUE withholds for its test set: expected labels to score; "
        "set --data.test_split=validation"
    )
