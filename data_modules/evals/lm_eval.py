"""Any task of EleutherAI's lm-evaluation-harness, which runs the model in memory itself.

Prompts, examples, decoding, readings and metrics are the harness's, and so are the names of the scores.
"""

import inspect
import json
import re
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from app.evaluation.benchmark import Benchmark, Question
from app.models.protocols import ScoredModel
from app.utils.errors import InputError
from app.utils.files import digest
from app.utils.text import did_you_mean

ADDRESS = re.compile(r" at 0x[0-9a-f]+")  # of an object, another one in every process
SETTING = "tasks of the benchmark lm_eval"


class LmEval(Benchmark):
    """Ask the tasks of lm-evaluation-harness; needs the package `lm_eval`.

    Args:
        tasks: Names of tasks, groups or tags of the harness, such as [arc_easy, gsm8k].
        num_fewshot: Solved examples in the prompts; null leaves it to each task.
        include_path: Folder with task files (YAML) of your own, beside the harness's.
        batch_size: Requests of a batch.
        validation_size: First rows of each task asked when training is validated; null asks all, 0 none.
        limit: First rows of each task asked in a test; null asks all.
    """

    name = "lm_eval"
    version = "1"
    runs_model = True

    def __init__(
        self,
        tasks: list[str],
        num_fewshot: int | None = None,
        include_path: str | None = None,
        batch_size: int = 1,
        validation_size: int | None = 0,
        limit: int | None = None,
    ) -> None:
        if not tasks or len(set(tasks)) < len(tasks):
            raise InputError(f"{SETTING} is {tasks}: expected names of tasks, each once")
        sizes = {"batch_size": batch_size, "limit": limit, "num_fewshot": num_fewshot}
        for name, value in {**sizes, "validation_size": validation_size}.items():
            least = 0 if name in ("num_fewshot", "validation_size") else 1
            if value is not None and value < least:
                raise InputError(f"{name}={value} of lm_eval: expected at least {least}")
        self.num_fewshot = num_fewshot
        self.batch_size = batch_size
        self.validation_size = validation_size
        self.limit = limit
        self.lower_is_better: set[str] = set()
        self._tasks = tasks
        self._include_path = include_path
        self._manager: Any = None  # lm_eval's TaskManager

    def check(self) -> None:
        """Raise InputError if the harness is not installed, or there is no such folder."""
        if find_spec("lm_eval") is None:
            raise InputError(
                "LmEval in --data.evals needs lm-evaluation-harness, which is not installed: "
                "pip install -r requirements-lm-eval.txt"
            )
        if self._include_path is not None and not Path(self._include_path).is_dir():
            raise InputError(
                f"include_path of the benchmark lm_eval is {self._include_path!r}: expected a folder with task "
                "files (YAML)"
            )

    def load(self) -> list[Question]:
        """Load the tasks; a reference is a hash of all that the harness asks in one."""
        self._manager = self._manager or self._task_manager()
        questions = []
        for name in self._tasks:
            loaded = self._load(name)
            asked: list[Any] = [version("lm_eval")]
            asked += [
                [each.dump_config(), list(each.eval_docs)] for each in loaded["tasks"].values()
            ]
            reference = digest(ADDRESS.sub("", json.dumps(asked, default=_text, sort_keys=True)))
            questions.append(Question(name, "", reference))
            self.lower_is_better |= {name for name, lower in _scores_of(loaded) if lower}
        return questions

    def _task_manager(self) -> Any:
        from lm_eval.tasks import TaskManager  # of an optional package

        if self._include_path is not None:
            # The harness's own 14,000 files take seconds to list.
            own = TaskManager(include_path=self._include_path, include_defaults=False)
            if set(self._tasks) <= set(own.task_index) and not _lacks(own, self._tasks):
                return own
        manager = TaskManager(include_path=self._include_path)
        for name in self._tasks:
            if name not in manager.task_index:
                hint = did_you_mean(name, manager.all_tasks, cutoff=0.6)
                raise InputError(
                    f"{SETTING} has {name!r}: expected names of tasks, groups or tags of the harness, or of "
                    f"files in include_path{hint}"
                )
        return manager

    def _load(self, name: str) -> Any:
        """Return the harness's TaskDict of a name."""
        try:
            loaded = self._manager.load([name])
        # Of YAML files, of data sets, of the Hub: all in their own words.
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise InputError(
                f"lm-evaluation-harness cannot load the task {name!r} ({reason}): get its data, or "
                f"change {SETTING}"
            ) from error
        if any(map(_runs_code, loaded["tasks"].values())):
            raise InputError(
                f"{SETTING} has {name!r}, which runs code that the model writes without a sandbox: leave it "
                "out; the benchmark HumanEval has one (docs/sandbox.md)"
            )
        return loaded

    def run(
        self, model: ScoredModel, question: Question, size: int | None, chat_template: bool
    ) -> dict[str, Any]:
        """Let the harness evaluate a task; return its results, and what it read in each row's outputs."""
        from app.evaluation.lm_eval_model import evaluate_task  # of an optional package

        results = evaluate_task(
            model,
            question.key,
            self._manager,
            num_fewshot=self.num_fewshot,
            batch_size=self.batch_size,
            limit=size,
            apply_chat_template=chat_template,
        )
        return {
            "outputs": [json.dumps(results["results"], default=float)],
            "samples": results["samples"],
        }

    def score(self, question: Question, outputs: list[str]) -> dict[str, float]:
        """Return the harness's results that are numbers, such as {"arc_easy/acc,none": 0.5}."""
        results: dict[str, dict[str, Any]] = json.loads(outputs[0])
        return {
            f"{task}/{metric}": value
            for task, metrics in results.items()
            for metric, value in metrics.items()
            if "," in metric and isinstance(value, int | float)
        }

    def score_names(self, questions: Sequence[Question]) -> list[str]:
        """Return the names of the metrics and their standard errors."""
        loaded = (self._load(question.key) for question in questions)
        return [name for each in loaded for name, _ in _scores_of(each)]


def _scores_of(loaded: Any) -> Iterator[tuple[str, bool]]:
    """Yield the names of the scores of a TaskDict, and whether less is better."""
    of_group: set[str] = set()
    for task in loaded["tasks"].values():
        lower = {metric for metric, higher in task.higher_is_better().items() if higher is False}
        of_group |= lower
        for reading in task._filters:
            for metric in task.aggregation():
                yield f"{task.task_name}/{metric},{reading.name}", metric in lower
                yield f"{task.task_name}/{metric}_stderr,{reading.name}", False
    for group in loaded.get("groups", {}).values():
        for each in group.aggregate_metric_list or ():
            for reading in each.filter_list:
                yield f"{group.name}/{each.metric},{reading}", each.metric in of_group
                yield f"{group.name}/{each.metric}_stderr,{reading}", False


def _text(value: Any) -> str:
    """Return what tells a setting of a task apart that is no JSON data: of a function its source."""
    return inspect.getsource(value) if inspect.isfunction(value) else str(value)


def _runs_code(task: Any) -> bool:
    """Return whether a task runs what the model writes, by the harness's mark or by sympy's `parse_expr`."""
    return getattr(task, "UNSAFE_CODE", False) or "robustness_math" in task.task_name


def _lacks(manager: Any, names: Sequence[str]) -> bool:
    """Return whether a group of these has a task that the TaskManager does not know."""
    groups = [name for name in names if name in manager.all_groups]
    children = [
        each if isinstance(each, str) else each.get("task", each.get("group"))
        for name in groups
        for each in (manager.task_index[name].cfg or {}).get("task", ())
    ]
    return not set(children) <= set(manager.task_index)
