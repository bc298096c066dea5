"""GLUE as text-to-text: five tasks of the LoRA-One paper, from the Hub or from GLUE's own files.

Prompts and label words are those of the LoRA-One and LoRA-GA code: a prefix, the sentences joined
by a line break, "result:", and a word for each class in the integer order of the Hub's data set.
"""

import pathlib
from dataclasses import dataclass
from typing import Any, Literal

from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from app.utils.errors import InputError
from app.utils.text import did_you_mean
from data_modules.readers import file_rows, hub_rows
from data_modules.rows import TextRow
from data_modules.sampling import split_off
from data_modules.text import TextDataModule

HUB_ID = "nyu-mll/glue"
FILE_ENDINGS = (".tsv", ".tsv.gz", ".jsonl", ".jsonl.gz")
NO_GOLD_LABEL = "-"  # MultiNLI rows whose annotators did not agree
SETTINGS = "--data.task or --data.path"


@dataclass(frozen=True)
class GlueTask:
    """One task: its prompt, its label words, and the names of its columns."""

    folder: str
    prefix: str
    label_words: tuple[str, ...]
    columns: tuple[str, ...]  # sentences and label on the Hub and in JSON lines
    tsv_columns: tuple[str, ...] = ()  # what GLUE's own files call them, where that differs
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
    ),
    "cola": GlueTask(
        "CoLA",
        "classify the grammaticality of the text: ",
        ("unacceptable", "acceptable"),
        ("sentence", "label"),
        tsv_header=("source", "label", "mark", "sentence"),
    ),
    "qnli": GlueTask(
        "QNLI",
        "classify the semantic similarity of the question and the sentence: ",
        ("entailment", "not_entailment"),
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
        self.config = task
        self.task_name = f"glue/{task}"
        self.label_words = self.task.label_words
        self.train_file = train_file
        self.test_split = test_split
        self.source = path or HUB_ID

    def load(self) -> dict[str, list[TextRow]]:
        """Read the published sets, and decide which one validates and which one is reported."""
        self.dropped_rows = {}
        rows = {split: self._rows_of(split, file) for split, file in self._files().items()}
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
        if dev is None and "test" not in rows:
            rank_zero_warn(
                f"{self.source} has no test rows of its own: those that validate are tested"
            )
        test = rows.get("test", dev or validation)
        return {"train": train, "validation": validation, "test": test}

    def _files(self) -> dict[str, pathlib.Path | None]:
        """Return the file of each published set, None for one of the Hub; only the validation set may lack."""
        splits = ("train", "validation", *(("test",) if self.test_split == "test" else ()))
        if self.path is None:
            return dict.fromkeys(splits)
        root = pathlib.Path(self.path)
        folder = root / self.task.folder if (root / self.task.folder).is_dir() else root
        if not folder.is_dir():
            raise InputError(f"--data.path={root}: expected a GLUE folder; change --data.path")
        files: dict[str, pathlib.Path | None] = {}
        for split in splits:
            names = [f"{self._name_of(split, 'dev')}{ending}" for ending in FILE_ENDINGS]
            if split == "train" and self.train_file is not None:
                names = [self.train_file]
            present = [folder / name for name in names if (folder / name).is_file()]
            if present:
                files[split] = present[0]
            elif split != "validation":
                entries = ", ".join(sorted(entry.name for entry in folder.iterdir())) or "nothing"
                settings = {"train": "path or --data.train_file", "test": "test_split"}
                raise InputError(
                    f"{folder} has no {split} set of {self.task_name}: expected "
                    f"{' or '.join(names)}, found {entries}; change --data.{settings[split]}"
                )
        self.source = f"{folder} ({', '.join(file.name for file in files.values() if file)})"
        rank_zero_info(f"{self.task_name}: reading {self.source}")
        return files

    def _name_of(self, split: str, validation: str) -> str:
        """Return what a set is called, where the validation set is `validation`."""
        if split == "train":
            return split
        return f"{validation if split == 'validation' else split}{self.task.matched}"

    def _rows_of(self, split: str, file: pathlib.Path | None) -> list[TextRow]:
        """Make prompts of a set's rows; those without a gold label are dropped and counted."""
        is_tsv = file is not None and ".tsv" in file.suffixes
        *columns, label_column = (is_tsv and self.task.tsv_columns) or self.task.columns
        fields = columns if split == "test" else [*columns, label_column]
        if file is None:
            where_else = f"--data.path (a GLUE folder, which holds {self.task.folder}/train.tsv)"
            set_name = self._name_of(split, "validation")
            records = hub_rows(HUB_ID, self.config, set_name, fields, where_else)
        else:
            header = self.task.tsv_header if split != "test" else None
            records = file_rows(file, fields, SETTINGS, (str, int), header)
        targets = {word: target for target, word in enumerate(self.label_words)}
        targets |= {str(target): target for target in range(len(self.label_words))}
        rows: list[TextRow] = []
        self.dropped_rows[split] = 0
        for where, cells in records:
            sentences = [str(cells[column]).strip() for column in columns]
            label = str(cells.get(label_column, "")).strip()
            if label == NO_GOLD_LABEL:
                self.dropped_rows[split] += 1
                continue
            if split == "test" and label in ("-1", ""):
                raise InputError(
                    f"{where} has no labels, which GLUE withholds for its test set: expected labels to score; "
                    "set --data.test_split=validation"
                )
            if label not in targets:
                raise InputError(
                    f"{where} has the label {label!r}: expected one of {', '.join(targets)}; "
                    f"correct it, or change {SETTINGS}"
                )
            prompt = self.task.prefix + "\n".join(sentences) + "\nresult: "
            rows.append(TextRow(prompt, self.label_words[targets[label]], targets[label]))
        if not rows:
            raise InputError(
                f"{self.source} has no {split} rows: expected some; change --data.path"
            )
        return rows
