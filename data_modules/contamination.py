"""Find training rows that are questions of a benchmark, whose scores measure what was memorized."""

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

# Where the question stands in the prompts of this project; the last one, behind worked examples.
_FORMS = (
    re.compile(r"(?:.*\n)?Q(?:uestion)?: (.*)\nA(?:nswer)?:\s*", re.DOTALL),
    re.compile(r".*### Instruction:\n(.*)\n\n### Response:\s*(?:```python\s*)?", re.DOTALL),
    re.compile(r"(?:.*\n\n)?(.*)\nAnswer:\s*", re.DOTALL),
)


def question_text(prompt: str) -> str:
    """Return the words of a prompt's question, so that only other words make another question.

    They are in one case, with one space between, without the prompt's form, worked examples before it, and
    punctuation.
    """
    question = next((match for form in _FORMS if (match := form.fullmatch(prompt))), None)
    text = unicodedata.normalize("NFKC", question[1] if question else prompt)
    return " ".join(re.findall(r"\w+", text.casefold()))


def shared_questions(train_prompts: Iterable[str], eval_questions: Iterable[str]) -> int:
    """Count the training rows whose question is one of a benchmark's, word for word.

    A question in other words, or inside a longer text, is not found; one that is trained on twice counts twice.
    """
    asked = {text for question in eval_questions if (text := question_text(question))}
    return sum(question_text(prompt) in asked for prompt in train_prompts)


def count_shared(
    train_prompts: Sequence[str], benchmarks: Mapping[str, Sequence[str]], task_name: str
) -> dict[str, int]:
    """Count the training rows that are questions of each benchmark, with a warning where there are any."""
    counts = {name: shared_questions(train_prompts, asked) for name, asked in benchmarks.items()}
    for name, count in counts.items():
        if count:
            rank_zero_warn(
                f"{count:,} of {len(train_prompts):,} training rows of {task_name} are questions of {name}, "
                "word for word: its score measures what was memorized, too"
            )
    return counts
