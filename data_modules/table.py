"""Labelled texts of one's own: a row a text, or a pair of texts, and its label."""

import re
import string
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from app.utils.errors import InputError
from app.utils.text import did_you_mean
from data_modules.row_checks import warn_of_repeated
from data_modules.rows import TextRow
from data_modules.sampling import split_off, tenth_for_validation
from data_modules.tables import Table, is_published, read_table, read_tables
from data_modules.text import TextDataModule

PROMPT = "classify the text: {text}\nresult: "
PROMPT_OF_PAIR = "classify the texts: {text}\n{text_pair}\nresult: "
NO_CLASS = -1  # of a row without a label, where `datasets` knows the classes by names
MOST_CLASSES = 256

Labelled = tuple[str, str]
"""The prompt of a row, and its label."""


class TableDataModule(TextDataModule):
    """Classify the texts of a table: CSV, TSV, JSON, Parquet, a folder of `save_to_disk`, or a set of the Hub.

    Rows without a text or a label are left out and counted; rows that are there twice are counted. Without
    test rows, those that validate are tested.

    Args:
        path: File .csv, .tsv, .json, .jsonl or .parquet (also gzipped, .gz), a folder that `save_to_disk` of
            `datasets` wrote, or the name of a set of the Hub. Its splits `validation` and `test` are used, too,
            where it has them. Quotes are text in .tsv.
        text: Column of the text.
        text_pair: Column of the second text, of a pair.
        label: Column of the label: a word, a whole number, or a class of `datasets`.
        prompt: What the model reads, with {text} and, of a pair, {text_pair}; null is "classify the text:
            {text}", a line break, and "result: ".
        label_words: The word that the model answers for each label, in the order of the classes; null takes the
            labels themselves, sorted. No two may begin with the same token.
        validation_file: File with the rows that validate.
        test_file: File with the rows that are tested.
        validation_size: Training rows set aside to validate on, in place of others, which are then tested where
            there are no test rows; null sets a tenth aside, at most 1,000, where there are no others.
        test_size: Training rows set aside to test, in place of others; null sets none aside.
        config_name: Which of the sets that the Hub has under the name `path`.
        **options: See `TextDataModule`.
    """

    task_name = "table"

    def __init__(
        self,
        path: str,
        text: str = "text",
        text_pair: str | None = None,
        label: str = "label",
        prompt: str | None = None,
        label_words: dict[str, str] | None = None,
        validation_file: str | None = None,
        test_file: str | None = None,
        validation_size: int | None = None,
        test_size: int | None = None,
        config_name: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(path=path, validation_size=validation_size, **options)
        self.columns = (
            {"text": text} if text_pair is None else {"text": text, "text_pair": text_pair}
        )
        self.label = label
        self.prompt = prompt or (PROMPT if text_pair is None else PROMPT_OF_PAIR)
        _check_prompt(self.prompt, self.columns)
        self.words = _checked_words(label_words)
        self._label_words: tuple[str, ...] | None = None
        self.files = {"validation": validation_file, "test": test_file}
        self.test_size = test_size
        self.config_name = config_name

    @property
    def label_words(self) -> tuple[str, ...]:  # type: ignore[override]
        """The words of the labels, in the order of the classes; reads the rows."""
        if self._label_words is None:
            self.read()
        assert self._label_words is not None
        return self._label_words

    def prepare_data(self) -> None:
        """Download a set of the Hub, once for all processes of a node."""
        if is_published(str(self.path)):
            self.read()

    def load(self) -> dict[str, list[TextRow]]:
        """Read the tables, find the labels, and set rows aside where there are none to validate on."""
        self.dropped_rows = {"without_text": 0, "without_label": 0}
        tables = read_tables(str(self.path), self.config_name, "--data.path")
        for split, file in self.files.items():
            if file is not None:
                tables[split] = read_table(file, f"--data.{split}_file")
        labelled = {split: list(self._labelled(table)) for split, table in tables.items()}
        for split, part in list(labelled.items()):
            if not part and self.files.get(split) is None and split != "train":
                del labelled[split]  # a published test set without labels
            elif not part:
                self._refuse_empty(tables[split])
        names = tables["train"].class_names(self.label)
        words = self._words([label for _, _, label in labelled["train"]], names)
        self._label_words = tuple(words.values())
        targets = {label: target for target, label in enumerate(words)}
        rows = {
            split: [self._row(*each, targets, tables[split].setting) for each in part]
            for split, part in labelled.items()
        }
        self._say_left_out()
        warn_of_repeated(rows, str(self.path))
        return self._split(rows)

    def _labelled(self, table: Table) -> Iterator[tuple[str, str, str]]:
        """Yield where each row with a text and a label stands, its prompt, and its label."""
        columns = [*self.columns.values(), self.label]
        names = table.class_names(self.label)
        for where, row in table:
            self._check_columns(columns, row, table)
            texts = {
                name: _text(row[column], where, column, table.setting)
                for name, column in self.columns.items()
            }
            label = _label(row[self.label], where, self.label, names, table.setting)
            if not texts["text"]:
                self.dropped_rows["without_text"] += 1
            elif not label:
                self.dropped_rows["without_label"] += 1
            else:
                yield where, self.prompt.format(**texts), label

    def _check_columns(self, columns: Sequence[str], row: Mapping[str, Any], table: Table) -> None:
        missing = [column for column in columns if column not in row]
        if missing:
            settings = {column: f"--data.{name}" for name, column in self.columns.items()}
            hint = did_you_mean(missing[0], map(str, row))
            if len(row) == 1:
                hint = "; between the columns of .csv are commas, of .tsv tabs"
            raise InputError(
                f"{table.name} has the columns {', '.join(map(repr, row))}: expected {missing[0]!r}; name the "
                f"column in {settings.get(missing[0], '--data.label')}, or change {table.setting}{hint}"
            )

    def _refuse_empty(self, table: Table) -> NoReturn:
        raise InputError(
            f"{table.name} has no row with both a {self.columns['text']} and a {self.label}: expected some; "
            f"change {table.setting}, --data.text or --data.label"
        )

    def _words(self, labels: list[str], names: Sequence[str] | None) -> dict[str, str]:
        """Return the word of each label, in the order of the classes."""
        found = set(labels)
        if len(found) == 1:
            raise InputError(
                f"all rows of {self.path} have the {self.label} {labels[0]!r}: expected two classes or more; "
                "change --data.path, or name another column in --data.label"
            )
        if self.words:
            return self.words
        if len(found) > MOST_CLASSES:
            raise InputError(
                f"the column {self.label!r} of {self.path} has {len(found)} different values: expected at most "
                f"{MOST_CLASSES} classes; name another column in --data.label"
            )
        alike = Counter(label.casefold() for label in found)
        if twice := sorted(label for label in found if alike[label.casefold()] > 1):
            rank_zero_warn(
                f"classes of {self.path} differ in capitals alone: {', '.join(twice)}; write those that mean "
                "the same alike"
            )
        order = list(names or sorted(found))  # equal numbers, 1 and 01, have an order, too
        if names is None and all(re.fullmatch(r"-?\d+", label) for label in found):
            order.sort(key=int)
        return dict(zip(order, order, strict=True))

    def _row(
        self, where: str, prompt: str, label: str, targets: Mapping[str, int], setting: str
    ) -> TextRow:
        if label not in targets:
            labels = f"a key of --data.label_words: {', '.join(targets)}"
            raise InputError(
                f"{where} has the {self.label} {label!r}: expected "
                f"{labels if self.words else 'one of ' + ', '.join(targets)}{did_you_mean(label, targets)}; "
                f"correct it, or change {setting}"
            )
        target = targets[label]
        return TextRow(prompt, self.label_words[target], target)

    def _split(self, rows: dict[str, list[TextRow]]) -> dict[str, list[TextRow]]:
        """Set training rows aside for the test, where asked, and for validation, where there are none."""
        if self.test_size is not None:
            rows["train"], rows["test"] = split_off(rows["train"], self.test_size, "data.test_size")
        if "validation" not in rows or self.validation_size is not None:
            size = self.validation_size
            if size is None:
                size = tenth_for_validation(len(rows["train"]), str(self.path))
            published = rows.get("validation")
            rows["train"], rows["validation"] = split_off(
                rows["train"], size, "data.validation_size"
            )
            if published is not None:
                rows.setdefault("test", published)
        if "test" not in rows:
            rows["test"] = rows["validation"]
            if rows["test"]:
                rank_zero_warn(
                    f"{self.path} has no test rows: those that validate are tested; give a --data.test_file, "
                    "or set --data.test_size"
                )
        return rows

    def _say_left_out(self) -> None:
        left_out = [f"{count:,} {why}" for why, count in self.dropped_rows.items() if count]
        if left_out:
            rank_zero_warn(f"rows of {self.path} that are left out: {', '.join(left_out)}")


def _checked_words(label_words: Mapping[str, str] | None) -> dict[str, str]:
    """Return the word of each label, if any are given; raise InputError for one class or an empty word."""
    words = {str(label): word.strip() for label, word in (label_words or {}).items()}
    if words and (len(words) == 1 or not all(words.values())):
        raise InputError(
            f"--data.label_words={label_words}: expected a word for each of two labels or more"
        )
    return words


def _check_prompt(prompt: str, columns: Mapping[str, str]) -> None:
    """Raise InputError unless a prompt has exactly the fields of the texts."""
    wanted = " and ".join(f"{{{name}}}" for name in columns)
    try:
        parts = [part[1:] for part in string.Formatter().parse(prompt) if part[1] is not None]
        if any(form or conversion for _, form, conversion in parts):
            raise ValueError("a field has more than a name")
    except ValueError as error:
        raise InputError(
            f"--data.prompt={prompt!r} ({error}): expected {wanted}, other braces doubled"
        ) from error
    fields = dict.fromkeys(str(name) for name, _, _ in parts)
    if set(fields) != set(columns):
        raise InputError(
            f"--data.prompt={prompt!r} has the fields {', '.join(fields) or 'none'}: expected {wanted}"
            + (
                ""
                if "text_pair" in columns
                else "; --data.text_pair names the column of a second text"
            )
        )


def _text(value: Any, where: str, column: str, setting: str) -> str:
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise InputError(
            f"{where} has {str(value)[:40]!r} ({type(value).__name__}) as {column}: expected text; correct it, "
            f"or change {setting}"
        )
    return str(value).strip()


def _label(value: Any, where: str, column: str, names: Sequence[str] | None, setting: str) -> str:
    """Return a label as text, the name of the class where classes have names; "" for none."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if value is None or (names is not None and value == NO_CLASS):
        return ""
    if names is not None and isinstance(value, int) and 0 <= value < len(names):
        return names[value]
    if isinstance(value, (bool, int, str)):
        return str(value).strip()
    raise InputError(
        f"{where} has {str(value)[:40]!r} ({type(value).__name__}) as {column}: expected a word or a whole "
        f"number; correct it, or change {setting}"
    )
