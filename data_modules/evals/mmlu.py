"""MMLU: four options, answered by the likeliest letter after five solved examples.

Prompt, examples and comparison are those of lm-evaluation-harness's `mmlu` (task version 1.0), whose
prompt differs from the original's by one space before the subject.
"""

import pathlib
from collections.abc import Mapping, Sequence

from app.evaluation.benchmark import Benchmark, Question
from app.utils.errors import InputError
from app.utils.text import did_you_mean
from data_modules.readers import archive_content, csv_cells, file_content, hub_rows

HUB_ID = "cais/mmlu"
SETTING = "path of the benchmark mmlu"
LETTERS = "ABCD"
MAX_SHOTS = 5
# The groups of lm-evaluation-harness; the authors' code, as the original, counts anatomy as "other".
CATEGORIES = {
    "stem": "abstract_algebra anatomy astronomy college_biology college_chemistry "
    "college_computer_science college_mathematics college_physics computer_security "
    "conceptual_physics electrical_engineering elementary_mathematics high_school_biology "
    "high_school_chemistry high_school_computer_science high_school_mathematics "
    "high_school_physics high_school_statistics machine_learning",
    "humanities": "formal_logic high_school_european_history high_school_us_history "
    "high_school_world_history international_law jurisprudence logical_fallacies "
    "moral_disputes moral_scenarios philosophy prehistory professional_law world_religions",
    "social_sciences": "econometrics high_school_geography "
    "high_school_government_and_politics high_school_macroeconomics "
    "high_school_microeconomics high_school_psychology human_sexuality "
    "professional_psychology public_relations security_studies sociology us_foreign_policy",
    "other": "business_ethics clinical_knowledge college_medicine global_facts human_aging "
    "management marketing medical_genetics miscellaneous nutrition professional_accounting "
    "professional_medicine virology",
}
CATEGORY_OF = {subject: name for name, listed in CATEGORIES.items() for subject in listed.split()}

Rows = list[list[str]]  # question, four options, letter


class Mmlu(Benchmark):
    """Ask MMLU's test questions, subject by subject.

    Args:
        path: Folder with `dev/SUBJECT_dev.csv`, and `test/SUBJECT_test.csv` or `test.tar.gz`; null takes
            cais/mmlu from the Hub.
        subjects: Names such as anatomy; null takes all 57.
        shots: Solved examples in the prompt, the first of the subject's five.
        validation_size: Questions asked when training is validated; null asks all, 0 none.
        limit: Questions asked in a test; null asks all.
    """

    name = "mmlu"
    version = "1"
    choices = tuple(f" {letter}" for letter in LETTERS)

    def __init__(
        self,
        path: str | None = None,
        subjects: Sequence[str] | None = None,
        shots: int = MAX_SHOTS,
        validation_size: int | None = 0,
        limit: int | None = None,
    ) -> None:
        self.path = None if path is None else pathlib.Path(path)
        self.subjects = sorted(CATEGORY_OF) if subjects is None else list(subjects)
        self.shots = shots
        self.validation_size = validation_size
        self.limit = limit
        for subject in self.subjects:
            if subject not in CATEGORY_OF:
                hint = did_you_mean(subject, CATEGORY_OF, cutoff=0.6)
                raise InputError(f"subjects of mmlu has {subject!r}: expected names of MMLU{hint}")
        if not self.subjects or len(set(self.subjects)) < len(self.subjects):
            raise InputError(f"subjects={self.subjects} of mmlu: expected each subject once")
        if not 0 <= shots <= MAX_SHOTS:
            raise InputError(f"shots={shots} of mmlu: expected 0 to {MAX_SHOTS}")

    def load(self) -> list[Question]:
        """Read the subjects in the order of their list.

        The following are multiple choice questions (with answers) about SUBJECT.

        QUESTION
        A. OPTION                       and so on to D
        Answer: LETTER                  five solved examples, then the question without its letter
        """
        questions = []
        examples, tests = self._rows("dev"), self._rows("test")
        for subject in self.subjects:
            if len(examples[subject]) < self.shots:
                raise InputError(
                    f"{subject} has {len(examples[subject])} solved examples: expected "
                    f"{self.shots}; change shots or {SETTING}"
                )
            about = subject.replace("_", " ")
            head = f"The following are multiple choice questions (with answers) about {about}.\n\n"
            for cells in examples[subject][: self.shots]:
                head += f"{_ask(cells)} {cells[-1]}\n\n"
            for number, cells in enumerate(tests[subject]):
                reference = {"subject": subject, "choice": f" {cells[-1]}"}
                questions.append(Question(f"{subject}/{number}", head + _ask(cells), reference))
        return questions

    def score(self, question: Question, outputs: list[str]) -> dict[str, float]:
        """Compare the likeliest letter with the right one, over all, for category and subject."""
        subject = question.reference["subject"]
        right = float(outputs[0] == question.reference["choice"])
        names = ("accuracy", f"accuracy/{CATEGORY_OF[subject]}", f"accuracy/{subject}")
        return dict.fromkeys(names, right)

    def score_names(self, questions: Sequence[Question]) -> list[str]:
        """Return accuracy over all questions, then of the categories, then of the subjects."""
        subjects = list(dict.fromkeys(question.reference["subject"] for question in questions))
        asked = {CATEGORY_OF[subject] for subject in subjects}
        parts = [name for name in CATEGORIES if name in asked] + subjects
        return ["accuracy", *(f"accuracy/{part}" for part in parts)]

    def _rows(self, split: str) -> Mapping[str, Rows]:
        """Return the question, four options and letter of each row of a split, by subject."""
        if self.path is None:
            return self._hub_rows(split)
        if not self.path.is_dir():
            raise InputError(
                f"{SETTING} is {self.path}, which is no folder: expected one with dev/ and test/"
            )
        names = {subject: f"{subject}_{split}.csv" for subject in self.subjects}
        archive = self.path / f"{split}.tar.gz"
        if not (self.path / split).is_dir() and archive.is_file():
            content = archive_content(archive, list(names.values()), SETTING)
            sources = {subject: (content[name], name) for subject, name in names.items()}
        else:
            files = {subject: self.path / split / name for subject, name in names.items()}
            sources = {s: (file_content(file, SETTING), str(file)) for s, file in files.items()}
        return {
            subject: [_checked(cells, where) for where, cells in csv_cells(*source, SETTING)]
            for subject, source in sources.items()
        }

    def _hub_rows(self, split: str) -> Mapping[str, Rows]:
        rows: dict[str, Rows] = {subject: [] for subject in self.subjects}
        config = "all" if len(rows) > 1 else self.subjects[0]
        fields = ("question", "choices", "answer", "subject")
        for where, row in hub_rows(HUB_ID, config, split, fields, SETTING):
            if row["subject"] in rows:
                cells = [row["question"], *row["choices"], LETTERS[row["answer"]]]
                rows[row["subject"]].append(_checked(cells, where))
        return rows


def _checked(cells: list[str], where: str) -> list[str]:
    if len(cells) != len(LETTERS) + 2 or cells[-1] not in tuple(LETTERS):
        raise InputError(
            f"{where} has the {len(cells)} cells {' | '.join(cells)[:200]!r}: expected a question, "
            f"four options and the letter A, B, C or D, without a header; change {SETTING}"
        )
    return cells


def _ask(cells: Sequence[str]) -> str:
    """Return a question with its options, up to where the letter comes."""
    options = zip(LETTERS, cells[1:-1], strict=True)
    lines = [cells[0].strip(), *(f"{letter}. {option}" for letter, option in options)]
    return "\n".join([*lines, "Answer:"])
