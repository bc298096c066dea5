"""GSM8K after eight worked examples: `gsm8k_cot` of lm-evaluation-harness, task version 3.0.

The paper's GSM8K-CoT. `strict` takes the number behind "The answer is", with which the examples end;
`flexible` takes the last number.
"""

from collections.abc import Sequence

from app.evaluation.benchmark import Benchmark, Question
from app.models.decoding import Decoding
from data_modules.evals.gsm8k import STOP, gsm8k_rows
from data_modules.evals.number_answers import number_scores

MARKER = "The answer is"

# Question and solution, word for word: Wei et al., "Chain-of-Thought Prompting Elicits Reasoning in Large
# Language Models" (NeurIPS 2022), as quoted in lm-evaluation-harness (MIT License).
EXAMPLES = (
    (
        "There are 15 trees in the grove. Grove workers will plant trees in the grove today. After they "
        "are done, there will be 21 trees. How many trees did the grove workers plant today?",
        "There are 15 trees originally. Then there were 21 trees after some more were planted. So there "
        "must have been 21 - 15 = 6. The answer is 6.",
    ),
    (
        "If there are 3 cars in the parking lot and 2 more cars arrive, how many cars are in the parking "
        "lot?",
        "There are originally 3 cars. 2 more cars arrive. 3 + 2 = 5. The answer is 5.",
    ),
    (
        "Leah had 32 chocolates and her sister had 42. If they ate 35, how many pieces do they have left "
        "in total?",
        "Originally, Leah had 32 chocolates. Her sister had 42. So in total they had 32 + 42 = 74. After "
        "eating 35, they had 74 - 35 = 39. The answer is 39.",
    ),
    (
        "Jason had 20 lollipops. He gave Denny some lollipops. Now Jason has 12 lollipops. How many "
        "lollipops did Jason give to Denny?",
        "Jason started with 20 lollipops. Then he had 12 after giving some to Denny. So he gave Denny "
        "20 - 12 = 8. The answer is 8.",
    ),
    (
        "Shawn has five toys. For Christmas, he got two toys each from his mom and dad. How many toys "
        "does he have now?",
        "Shawn started with 5 toys. If he got 2 toys each from his mom and dad, then that is 4 more "
        "toys. 5 + 4 = 9. The answer is 9.",
    ),
    (
        "There were nine computers in the server room. Five more computers were installed each day, from "
        "monday to thursday. How many computers are now in the server room?",
        "There were originally 9 computers. For each of 4 days, 5 more computers were added. So 5 * 4 = "
        "20 computers were added. 9 + 20 is 29. The answer is 29.",
    ),
    (
        "Michael had 58 golf balls. On tuesday, he lost 23 golf balls. On wednesday, he lost 2 more. How "
        "many golf balls did he have at the end of wednesday?",
        "Michael started with 58 golf balls. After losing 23 on tuesday, he had 58 - 23 = 35. After "
        "losing 2 more, he had 35 - 2 = 33 golf balls. The answer is 33.",
    ),
    (
        "Olivia has $23. She bought five bagels for $3 each. How much money does she have left?",
        "Olivia had 23 dollars. 5 bagels for 3 dollars each will be 5 x 3 = 15 dollars. So she has 23 - "
        "15 dollars left. 23 - 15 is 8. The answer is 8.",
    ),
)
HEAD = "".join(f"Q: {question}\nA: {solution}\n\n" for question, solution in EXAMPLES)


class Gsm8kCot(Benchmark):
    """Ask the test questions of GSM8K after eight worked examples, greedily.

    Args:
        path: test.jsonl or test.jsonl.gz of GSM8K; null takes openai/gsm8k from the Hub.
        max_new_tokens: Most tokens of an output; 256 is lm-evaluation-harness's.
        validation_size: Questions asked when training is validated; null asks all, 0 none.
        limit: Questions asked in a test; null asks all.
    """

    name = "gsm8k_cot"
    version = "1"

    def __init__(
        self,
        path: str | None = None,
        max_new_tokens: int = 256,
        validation_size: int | None = 0,
        limit: int | None = None,
    ) -> None:
        self.path = path
        self.decoding = Decoding(max_new_tokens, STOP)
        self.validation_size = validation_size
        self.limit = limit

    def load(self) -> list[Question]:
        """Read the questions; a reference is the right number."""
        return [
            Question(key, f"{HEAD}Q: {row['question']}\nA:", gold)
            for key, row, gold in gsm8k_rows(self.path, self.name)
        ]

    def score(self, question: Question, outputs: list[str]) -> dict[str, float]:
        """Read every output in two ways; of several outputs, return the share that is right."""
        return number_scores(outputs, MARKER, question.reference)

    def score_names(self, questions: Sequence[Question]) -> list[str]:
        """Return the names of the two readings."""
        return ["strict", "flexible"]
