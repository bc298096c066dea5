"""Resolve the run of each method with the command line's own parser, and check it before anything runs."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import yaml

from app.commands.compare.options import RunOptions, has_setting
from app.commands.compare.settings import (
    Settings,
    differences,
    flat,
    method_settings,
    task_settings,
    told,
)
from app.tracking.config_files import find_config
from app.utils.errors import InputError, causes


class ResolvedRun(Protocol):
    """A `fit` that is parsed and not run.

    Attributes:
        resolved: The configuration, as a run would write it.
    """

    resolved: dict[str, Any]

    @property
    def data(self) -> Any:
        """The data module."""

    def class_named(self, path: str) -> Any:
        """Return the class that a `class_path` names."""

    def check(self) -> None:
        """Raise an error if a part cannot be made, or training is too short for the adapter."""


Resolver = Callable[[Sequence[str]], ResolvedRun]
"""Resolves the options of a `fit`; the command line hands it over, which knows the parser."""

MOST_ASIDE = 1000
"""Training rows that choose the learning rate, where the configuration says nothing."""


def resolve_methods(
    methods: Sequence[str], known: Sequence[str], options: RunOptions, resolve: Resolver
) -> dict[str, ResolvedRun]:
    """Parse the runs of all methods, and print which options do not go to all of them.

    Args:
        methods: Those of the comparison.
        known: All that there are: an option that only another one has is no mistake, since a part of a
            comparison may be started with the options of the whole.
        options: The options, which learn what the methods have.
        resolve: Resolves one run.

    Raises:
        InputError: A setting is unknown or wrong; names the method.
    """
    runs = {method: _parsed(method, options, resolve) for method in methods}
    for method, run in runs.items():
        options.learn(method, run.resolved)
    for key in options.partial:
        takers = options.takers(key)
        if not takers:
            _check_known(
                key, [*methods, *(name for name in known if name not in methods)], options, resolve
            )
        if len(takers) < len(methods):
            others = [method for method in methods if method not in takers]
            goes = f"{key} goes to {', '.join(takers)}; " if takers else f"{key}: "
            print(f"{goes}{', '.join(others)}: no such setting")
    if options.partial:
        runs = {method: _parsed(method, options, resolve) for method in runs}
    for method, run in runs.items():
        with _told_of(method):
            run.check()
    return runs


def _check_known(key: str, methods: Sequence[str], options: RunOptions, resolve: Resolver) -> None:
    """Let the parser refuse a setting that no method has, where the section that it should be in is."""
    nearest = methods[0]
    for method in methods:
        config = _parsed(method, RunOptions(options.configs, []), resolve).resolved
        if has_setting(config, key):
            return
        if has_setting(config, f"{key.rpartition('.')[0]}.class_path"):
            nearest = method
    options.force(nearest, key)
    _parsed(nearest, options, resolve)


def _parsed(method: str, options: RunOptions, resolve: Resolver) -> ResolvedRun:
    with _told_of(method):
        return resolve(options.of(method))


@contextmanager
def _told_of(method: str) -> Iterator[None]:
    """Put the method's name before what is wrong with its run."""
    try:
        yield
    except ValueError as error:
        # The parser wraps what a class says of its arguments.
        told = next((e for e in causes(error) if isinstance(e, InputError)), None)
        if told is None:
            raise
        raise InputError(f"method {method}: {told}") from error


def check_methods(runs: Mapping[str, Mapping[str, Any]]) -> Settings:
    """Return the settings that all methods share.

    Args:
        runs: The resolved configuration of each method.

    Raises:
        InputError: Methods differ in more than what makes a method, or two are the same.
    """
    names = list(runs)
    first = task_settings(runs[names[0]])
    for name in names[1:]:
        found = differences(first, task_settings(runs[name]))
        if found:
            raise InputError(
                f"the methods {names[0]} and {name} differ in {told(found)}: a comparison needs the same data "
                "and budget. Take these settings out of the overlays in configs/methods/, which may change "
                "model.method, model.adapter, model.optimizer and init"
            )
    for i, name in enumerate(names):
        for other in names[:i]:
            found = differences(method_settings(runs[other]), method_settings(runs[name]))
            found.pop("model.method", None)
            if not found:
                raise InputError(
                    f"the methods {other} and {name} come to the same settings with this configuration: "
                    "compare one of them"
                )
    return first


def rows_to_set_aside(run: ResolvedRun) -> int | None:
    """Return how many training rows to set aside where a run would validate on the rows that it reports.

    Returns:
        A fifth of the training rows, at most 1,000; None where the configuration has set some aside, or the
        data has no classes: then the test asks benchmarks, and the loss of rows chooses.
    """
    data = run.data
    if not data.label_words or data.validation_size is not None:
        return None
    return min(MOST_ASIDE, len(data.rows("train")) // 5)


def check_validation(run: ResolvedRun) -> None:
    """Raise InputError if the validation rows are those that the test reports: rates are chosen on them."""
    data = run.data
    if data.label_words and data.rows("validation") == data.rows("test"):
        raise InputError(
            f"the validation rows of {data.task_name} are the rows that the test reports, so that the best "
            "learning rate would be chosen on them: give data with a published set in data.path, beside the "
            "rows set aside"
        )


def asked_benchmarks(test_configs: Sequence[str], run: ResolvedRun) -> dict[str, Settings]:
    """Return the settings of the benchmarks that overlays of a test ask, by the names in their scores.

    Raises:
        InputError: An overlay is missing or names no class.
    """
    found: dict[str, Settings] = {}
    for name in test_configs:
        path = find_config(name)
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        evals = flat(content).get("data.init_args.evals") or []
        for given in evals:
            try:
                kind = run.class_named(given["class_path"])
            except (ImportError, AttributeError, ValueError, TypeError, KeyError) as error:
                raise InputError(
                    f"--test_config {path} lists {given!r} under data.evals, which is no benchmark: {error}"
                ) from error
            found[kind.name] = flat(given.get("init_args") or {})
    return found


def check_score(score: str | None, run: ResolvedRun, benchmarks: Collection[str]) -> None:
    """Raise InputError if no run of the comparison will have a score."""
    if score is None or score == "loss":
        return
    data = run.data
    asked = sorted({*benchmarks, *(evaluation.name for evaluation in data.evals)})
    if "/" in score and score.partition("/")[0] not in asked:
        raise InputError(
            f"--score is {score!r}, but the runs are asked {', '.join(asked) or 'no benchmark'}: name its "
            "overlay with --test_config, such as eval/gsm8k.yaml"
        )
    if "/" not in score and not data.label_words:
        raise InputError(
            f"--score is {score!r}, but the rows of {data.task_name} have no classes: expected loss, or a "
            "benchmark's such as gsm8k/strict"
        )
