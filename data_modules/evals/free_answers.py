"""The data module's own held-out rows: what the model writes to them, beside the answers of the data.

ROUGE, BLEU and exact match are torchmetrics', whose ROUGE reads a-z and 0-9 alone. Its ROUGE-Lsum and its
stemmer are not used: they would download a package's data when a run is scored.
"""

import math
from collections.abc import Sequence
from typing import Any

from torchmetrics.functional.text import rouge_score, squad
from torchmetrics.text import SacreBLEUScore

from app.evaluation.benchmark import Benchmark, Question
from app.models.decoding import Decoding
from app.utils.errors import InputError
from data_modules.rows import TextRow

ROUGE = ("rouge1", "rouge2", "rougeL")
N_GRAM = 4
LENGTHS = ("_bleu_written", "_bleu_wanted")  # in tokens
COUNTS = tuple(f"_bleu_{kind}_{n}" for kind in ("matches", "ngrams") for n in range(1, N_GRAM + 1))


class FreeAnswers(Benchmark):
    """Generate answers to the data module's test rows, or, where it has none, to its validation rows.

        bleu = min(1, exp(1 - wanted / written)) (p_1 p_2 p_3 p_4)^(1/4),    p_n = matches_n / ngrams_n

    of the sums over all rows, as sacreBLEU (13a tokens); rouge1, rouge2, rougeL (F-measures) and SQuAD's
    exact_match and f1, which leave out case, punctuation and articles, are means over rows.

    Args:
        max_new_tokens: Most tokens of an output.
        temperature: 0 is greedy.
        top_p: Probability of the tokens that are sampled from.
        validation_size: Most rows asked when training is validated; null asks all, 0 none.
        limit: Most rows asked in a test; null asks all.
    """

    name = "free_answers"
    version = "1"
    asks_rows = True

    def __init__(
        self,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        validation_size: int | None = 100,
        limit: int | None = None,
    ) -> None:
        self.decoding = Decoding(max_new_tokens, temperature=temperature, top_p=top_p)
        self.validation_size = validation_size
        self.limit = limit
        self._rows: Sequence[TextRow] = ()

    def take_rows(self, rows: Sequence[TextRow]) -> None:
        """Set the rows that `load` makes questions of."""
        self._rows = rows

    def load(self) -> list[Question]:
        """Return the rows' prompts; a reference is the answer of the data."""
        if not self._rows:
            raise InputError(
                "FreeAnswers in --data.evals asks the rows of the data module, which has none to validate or "
                "to test on: set data.validation_size, or name a data module that has rows"
            )
        questions = []
        for number, row in enumerate(self._rows):
            prompt, answer = row.prompt, row.answer
            if row.turns:  # of a conversation the last answer is asked for
                *earlier, last = row.turns
                prompt, answer = "\n".join(f"{t.role}: {t.content}" for t in earlier), last.content
            key = f"free_answers/{number}"
            questions.append(Question(key, prompt, answer.strip(), row.turns))
        return questions

    def score(self, question: Question, outputs: list[str]) -> dict[str, float]:
        """Compare the output with the answer of the data; BLEU's counts are summed up over rows."""
        written, wanted = outputs[0].strip(), question.reference
        rouge = rouge_score(written, wanted, rouge_keys=ROUGE)
        answers: dict[str, Any] = {"answers": {"answer_start": [0], "text": [wanted]}, "id": "0"}
        words = squad({"prediction_text": written, "id": "0"}, answers)
        bleu = SacreBLEUScore(N_GRAM)
        bleu.update([written], [[wanted]])
        lengths = (bleu.preds_len.item(), bleu.target_len.item())
        counts = [*bleu.numerator.tolist(), *bleu.denominator.tolist()]
        return {
            "exact_match": words["exact_match"].item() / 100,
            "f1": words["f1"].item() / 100,
            **{name: rouge[f"{name}_fmeasure"].item() for name in ROUGE},
            **dict(zip(LENGTHS, lengths, strict=True)),
            **dict(zip(COUNTS, counts, strict=True)),
        }

    def score_names(self, questions: Sequence[Question]) -> list[str]:
        """Return the names of what `score` returns, of which `combine` makes BLEU."""
        return ["exact_match", "f1", *ROUGE, *LENGTHS, *COUNTS]

    def combine(self, scores: dict[str, float]) -> dict[str, float]:
        """Return BLEU over all rows beside the other means."""
        means = {name: scores[name] for name in ("exact_match", "f1", *ROUGE)}
        return {**means, "bleu": _bleu(scores)}


def _bleu(sums: dict[str, float]) -> float:
    """Return BLEU of the counts of all rows, or of their means: it is the same."""
    matches, ngrams = ([sums[name] for name in COUNTS[i : i + N_GRAM]] for i in (0, N_GRAM))
    if not all(matches):
        return 0.0
    precision = math.prod(m / n for m, n in zip(matches, ngrams, strict=True)) ** (1 / N_GRAM)
    written, wanted = (sums[name] for name in LENGTHS)
    return min(1.0, math.exp(1 - wanted / written)) * precision
