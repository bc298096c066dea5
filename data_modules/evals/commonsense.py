"""Eight commonsense sets in the form of LLM-Adapters: the model writes the name of an option.

Prompt and reading are those of the authors' eval_commonsense.py. It generates with four beams and
samples (temperature 0.1, top-p 0.75, top-k 40); here the default is greedy, which gives the same
outputs in every run.
"""

import pathlib
import re
from collections.abc import Sequence

from app.evaluation.benchmark import Benchmark, Question
from app.models.decoding import Decoding
from app.utils.errors import InputError
from data_modules.readers import file_rows

SETTING = "path of the benchmark commonsense, or its task"
PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)
_ANSWER = "answer[1-5]"
OPTIONS = {
    "boolq": "true|false",
    "piqa": "solution[12]",
    "social_i_qa": _ANSWER,
    "hellaswag": "ending[1-4]",
    "winogrande": "option[12]",
    "ARC-Easy": _ANSWER,
    "ARC-Challenge": _ANSWER,
    "openbookqa": _ANSWER,
}


class Commonsense(Benchmark):
    """Ask the test questions of one or more commonsense sets.

    Args:
        path: Folder with SET/test.json, the `dataset` folder of AGI-Edgerunners/LLM-Adapters.
        task: Name or names of the sets; null takes all eight.
        max_new_tokens: Most tokens of an output.
        temperature: 0 is greedy.
        top_p: Probability of the tokens that are sampled from.
        validation_size: Questions asked when training is validated; null asks all, 0 none.
        limit: Questions of all sets together asked in a test; null asks all.
    """

    name = "commonsense"
    version = "2"

    def __init__(
        self,
        path: str,
        task: list[str] | str | None = None,
        max_new_tokens: int = 32,
        temperature: float = 0.0,
        top_p: float = 1.0,
        validation_size: int | None = 0,
        limit: int | None = None,
    ) -> None:
        self.path = pathlib.Path(path)
        names = list(OPTIONS) if task is None else [task] if isinstance(task, str) else list(task)
        unknown = next((name for name in names if name not in OPTIONS), None)
        if unknown is not None or not names or len(set(names)) < len(names):
            raise InputError(
                f"task={task!r} of commonsense: expected one of {', '.join(OPTIONS)}, or a list of "
                "them, each once"
            )
        self.tasks = names
        self.decoding = Decoding(max_new_tokens, temperature=temperature, top_p=top_p)
        self.validation_size = validation_size
        self.limit = limit

    def load(self) -> list[Question]:
        """Read the sets in the order of their list; a reference is the set and its answer's name."""
        questions = []
        for name in self.tasks:
            file = self.path / name / "test.json"
            rows = file_rows(file, ("instruction", "answer"), SETTING)
            for number, (where, row) in enumerate(rows):
                if not re.fullmatch(OPTIONS[name], row["answer"]) or row.get("input"):
                    raise InputError(
                        f"{where} has the answer {row['answer']!r} and the input {row.get('input')!r}: "
                        f"expected {OPTIONS[name]} and none; correct it, or change {SETTING}"
                    )
                prompt = PROMPT.format(instruction=row["instruction"])
                questions.append(Question(f"{name}/{number}", prompt, (name, row["answer"])))
        return questions

    def score(self, question: Question, outputs: list[str]) -> dict[str, float]:
        """Compare the first option that an output names with the right one, over all and for its set."""
        name, answer = question.reference
        right = [first_option(name, text) == answer for text in outputs]
        return dict.fromkeys(("accuracy", f"accuracy/{name}"), sum(right) / len(right))

    def score_names(self, questions: Sequence[Question]) -> list[str]:
        """Return accuracy over all questions, then of each set."""
        names = dict.fromkeys(question.reference[0] for question in questions)
        return ["accuracy", *(f"accuracy/{name}" for name in names)]

    def combine(self, scores: dict[str, float]) -> dict[str, float]:
        """Add the mean of the sets, which the field reports: each set counts once, whatever its size."""
        parts = [value for name, value in scores.items() if name.startswith("accuracy/")]
        return {"mean_of_sets": sum(parts) / len(parts), **scores}


def first_option(name: str, output: str) -> str | None:
    """Return the first option of the set that the output names, case as in the training answers."""
    match = re.search(OPTIONS[name], output)
    return match[0] if match else None
