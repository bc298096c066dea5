"""What a method's run would be, resolved by the command line's own parser and checked before anything runs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from app.cli import LoraCLI, run_cli
from app.compare.cells import Cell
from app.compare.options import RunOptions, has_setting
from app.compare.settings import Settings, differences, method_settings, task_settings, told
from app.errors import InputError
from app.run_folder import CONFIG_FILE
from app.stopping import StopSignals

MOST_ASIDE = 1000
"""Training rows that choose the learning rate, where the configuration says nothing."""


class ParsedRun(LoraCLI):
    """A `fit` that is parsed and not run.

    Attributes:
        resolved: The configuration, as a run would write it.
    """

    resolved: dict[str, Any]

    def instantiate_classes(self) -> None:
        """Make nothing."""
        self.resolved = yaml.safe_load(self._settings())

    def _run_subcommand(self, subcommand: str) -> None:
        """Run nothing."""

    def make_data(self) -> Any:
        """Make the data module."""
        return self._get(self.parser.instantiate(self.config), "data")


def parsed_run(options: Sequence[str]) -> ParsedRun:
    """Parse the options of a `fit`.

    Raises:
        InputError: A setting is unknown or wrong, or a file is missing.
    """
    return run_cli(ParsedRun, ["fit", *options], StopSignals())


def parsed_runs(
    methods: Sequence[str], known: Sequence[str], options: RunOptions
) -> dict[str, ParsedRun]:
    """Parse the runs of all methods, and print which options do not go to all of them.

    Args:
        methods: Those of the comparison.
        known: All that there are: an option that only another one has is no mistake, since a part of a
            comparison may be started with the options of the whole.
        options: The options, which learn what the methods have.

    Raises:
        InputError: A setting is unknown or wrong; names the method.
    """
    runs = {method: _parsed(method, options) for method in methods}
    for method, run in runs.items():
        options.learn(method, run.resolved)
    for key in options.partial:
        takers = options.takers(key)
        if not takers:
            _check_known(key, [*methods, *(name for name in known if name not in methods)], options)
        if len(takers) < len(methods):
            others = [method for method in methods if method not in takers]
            goes = f"{key} goes to {', '.join(takers)}; " if takers else f"{key}: "
            print(f"{goes}{', '.join(others)}: no such setting")
    return {
        method: _parsed(method, options) if options.partial else run for method, run in runs.items()
    }


def _check_known(key: str, methods: Sequence[str], options: RunOptions) -> None:
    """Let the parser refuse a setting that no method has, where the section that it should be in is."""
    nearest = methods[0]
    for method in methods:
        config = _parsed(method, RunOptions(options.configs, [])).resolved
        if has_setting(config, key):
            return
        if has_setting(config, f"{key.rpartition('.')[0]}.class_path"):
            nearest = method
    options.force(nearest, key)
    _parsed(nearest, options)


def _parsed(method: str, options: RunOptions) -> ParsedRun:
    try:
        return parsed_run(options.of(method))
    except InputError as error:
        raise InputError(f"method {method}: {error}") from error


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


def rows_to_set_aside(run: ParsedRun) -> int | None:
    """Return how many training rows to set aside where a run would validate on the rows that it reports.

    Returns:
        A fifth of the training rows, at most 1,000; None where the configuration has set some aside, or the
        data has no classes: then the test asks benchmarks, and the loss of rows chooses.
    """
    data = run.make_data()
    if not data.label_words or data.validation_size is not None:
        return None
    return min(MOST_ASIDE, len(data.rows("train")) // 5)


def check_validation(run: ParsedRun) -> None:
    """Raise InputError if the validation rows are those that the test reports: rates are chosen on them."""
    data = run.make_data()
    if data.label_words and data.rows("validation") == data.rows("test"):
        raise InputError(
            f"the validation rows of {data.task_name} are the rows that the test reports, so that the best "
            "learning rate would be chosen on them: give data with a published set in data.path, beside the "
            "rows set aside"
        )


def check_cell(cell: Cell, run: Path, wanted: Mapping[str, Any]) -> None:
    """Refuse to take a run for a cell if it was trained with other settings of the method.

    Args:
        cell: The cell.
        run: Its run folder.
        wanted: The configuration that the cell would be trained with now.

    Raises:
        InputError: The settings differ.
    """
    theirs = yaml.safe_load((run / CONFIG_FILE).read_text(encoding="utf-8"))
    found = differences(method_settings(theirs), method_settings(wanted))
    if found:
        raise InputError(
            f"{run} was trained with other settings of the method {cell.method}: {told(found)} (then, now). "
            "Give the comparison another --name, or remove that cell's folder"
        )
