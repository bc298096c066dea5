"""Resolve the run of each method with the command line's own parser, and check it before anything runs."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, Protocol

from app.commands.compare.settings import (
    METHOD,
    RANK,
    Settings,
    differences,
    differences_text,
    flat,
    method_settings,
    task_settings,
)
from app.tracking.config_files import find_config
from app.utils.errors import InputError, causes
from app.utils.files import read_yaml
from app.utils.text import nearest

MOST_ASIDE = 1000
"""Training rows that choose the learning rate, where the configuration says nothing."""


class Named(Protocol):
    """A benchmark."""

    name: str


class ComparedData(Protocol):
    """What is asked of a data module, whose settings its attributes are."""

    label_words: Sequence[str]
    validation_size: int | None
    task_name: str
    evals: Sequence[Named]

    def rows(self, split: str) -> Sequence[Any]:
        """Return the rows of a split."""


class ResolvedRun(Protocol):
    """A `fit` that is parsed and not run; `resolved` is the configuration, as a run would write it."""

    resolved: dict[str, Any]

    @property
    def data(self) -> ComparedData:
        """The data module."""

    def class_named(self, path: str) -> type[Named]:
        """Return the class that a `class_path` names."""

    def check(self) -> None:
        """Raise an error if a part cannot be made, or training is too short for the adapter."""

    def check_rank(self) -> None:
        """Raise an error if a layer is too small for the adapter's rank."""


Resolver = Callable[[Sequence[str]], ResolvedRun]
"""Resolves the options of a `fit`; the command line hands it over, which knows the parser."""


class RunOptions:
    """The options of `fit` among those of `compare`, and which method's runs each one goes to.

    An option below a section that makes the method, such as `--init.gamma 64`, goes to the methods that have
    such a setting; every other option goes to all.

    Attributes:
        method_keys: The settings that are given and only some methods may have.
        takers: The methods that have such a setting, by its name.
    """

    def __init__(self, configs: Sequence[str], rest: Sequence[str], resolve: Resolver) -> None:
        self._files = [f"--config={name}" for name in configs]
        self._groups: list[list[str]] = []  # each option with the values that follow it
        for option in rest:
            if option.startswith("--") or not self._groups:
                self._groups.append([])
            self._groups[-1].append(option)
        keys = {_key(group) for group in self._groups}
        self.method_keys = sorted(k for k in keys if k.startswith(tuple(f"{s}." for s in METHOD)))
        self.takers: dict[str, list[str]] = {key: [] for key in self.method_keys}
        self._resolve = resolve

    def everything(self) -> list[str]:
        """Return all options, as they were given."""
        return [*self._files, *chain.from_iterable(self._groups)]

    def of(self, method: str, rank: int | None = None) -> list[str]:
        """Return the options of a method's runs, at a rank or at that of its configuration."""
        groups = [g for g in self._groups if method in self.takers.get(_key(g), [method])]
        own = [] if rank is None else [f"--{RANK}={rank}"]
        return [*self._files, f"--config=methods/{method}.yaml", *chain.from_iterable(groups), *own]

    def add(self, option: str) -> None:
        """Add an option of all methods."""
        self._groups.append([option])

    def resolve(self, method: str, rank: int | None = None) -> ResolvedRun:
        """Parse a method's run, at a rank or at that of its configuration.

        Raises:
            InputError: A setting is unknown or wrong; names the method.
        """
        with named(method, rank):
            return self._resolve(self.of(method, rank))

    def distribute(self, methods: Sequence[str], known: Sequence[str]) -> None:
        """Find out which methods have the settings that are given, and print what does not go to all of them.

        An option that only another known method has is no mistake, since a part of a comparison may be started
        with the options of the whole.

        Raises:
            InputError: No method has such a setting.
        """
        configs = {method: self.resolve(method).resolved for method in methods}
        for key in self.method_keys:
            takers = [method for method in methods if _settings(configs[method], key)]
            if not takers:
                self._check_known(key, [*methods, *(m for m in known if m not in methods)])
            others = [method for method in methods if method not in takers]
            if others:
                goes = f"{key} goes to {', '.join(takers)}; " if takers else f"{key}: "
                print(f"{goes}{', '.join(others)}: no such setting")
            self.takers[key] = takers

    def _check_known(self, key: str, methods: Sequence[str]) -> None:
        """Let the parser refuse a setting that no method has, where the section that it should be in is."""
        section = key.rpartition(".")[0]
        settings: dict[str, str] = {}  # of the section, each with a method that has it
        for method in methods:
            config = self.resolve(method).resolved
            if _settings(config, key):
                return
            settings |= dict.fromkeys(_settings(config, section), method)
        close = nearest(key, settings)
        method = settings[close] if close else next(iter(settings.values()), methods[0])
        self.takers[key] = [method]
        self.resolve(method)


def _key(group: Sequence[str]) -> str:
    """Return the setting that an option names: `init.gamma` of `--init.init_args.gamma=64`."""
    name = group[0].removeprefix("--").partition("=")[0]
    return ".".join(part for part in name.split(".") if part != "init_args")


def _settings(config: Mapping[str, Any], key: str) -> list[str]:
    """Return a setting of a resolved configuration, or those of a section; a null section has none."""
    names = (name.replace("init_args.", "") for name in flat(config))
    return [name for name in names if name == key or name.startswith(f"{key}.")]


@contextmanager
def named(method: str, rank: int | None = None) -> Iterator[None]:
    """Put the method's name, and its rank where one is given, before what is wrong with its run."""
    try:
        yield
    except ValueError as error:
        # The parser wraps what a class says of its arguments.
        message = next((e for e in causes(error) if isinstance(e, InputError)), None)
        if message is None:
            raise
        at = "" if rank is None else f" at rank {rank}"
        raise InputError(f"method {method}{at}: {message}") from error


def resolve_methods(
    methods: Sequence[str], known: Sequence[str], options: RunOptions
) -> dict[str, ResolvedRun]:
    """Parse and check the runs of the methods of a comparison, of all that are known.

    Where they would validate on the rows that they report, an option sets training rows aside.

    Raises:
        InputError: A setting is unknown or wrong; names the method.
    """
    if options.method_keys:
        options.distribute(methods, known)
    first = options.resolve(methods[0])
    with named(methods[0]):
        size = rows_to_set_aside(first)
    runs = {methods[0]: first}
    if size is not None:
        aside = f"{size:,} training rows are set aside"
        print(f"{aside} to choose learning rates on (data.validation_size)")
        options.add(f"--data.validation_size={size}")
        runs = {}
    for method in methods:
        runs[method] = runs.get(method) or options.resolve(method)
        with named(method):
            runs[method].check()
        if "lr" not in (runs[method].resolved["model"]["optimizer"].get("init_args") or {}):
            raise InputError(
                f"method {method}: its optimizer lacks the setting lr, which compare varies"
            )
    return runs


def rows_to_set_aside(run: ResolvedRun) -> int | None:
    """Return how many training rows to set aside where a run would validate on the rows that it reports.

    A fifth, at most 1,000; None where the configuration has set some aside, or the data has no classes: then
    the loss of the validation rows chooses, and others or benchmarks are tested.
    """
    data = run.data
    if not data.label_words or data.validation_size is not None:
        return None
    return min(MOST_ASIDE, len(data.rows("train")) // 5)


def check_methods(configs: Mapping[str, Mapping[str, Any]]) -> Settings:
    """Return the settings that the resolved configurations of all methods share.

    Raises:
        InputError: Methods differ in more than what makes a method, or two are the same.
    """
    names = list(configs)
    shared = task_settings(configs[names[0]])
    for i, name in enumerate(names):
        differ = differences(shared, task_settings(configs[name]))
        if differ:
            raise InputError(
                f"the methods {names[0]} and {name} differ in {differences_text(differ)}: a comparison needs "
                "the same data and budget. Take these settings out of the overlays in configs/methods/, which "
                "may change model.method, model.adapter, model.optimizer and init"
            )
        own = method_settings(configs[name])
        for other in names[:i]:
            if differences(method_settings(configs[other]), own).keys() <= {"model.method"}:
                raise InputError(
                    f"the methods {other} and {name} come to the same settings with this configuration: "
                    "compare one of them"
                )
    return shared


def check_validation(run: ResolvedRun) -> None:
    """Raise InputError unless there are validation rows, apart from those of the test, to choose rates on."""
    data = run.data
    if data.validation_size == 0 or (data.label_words and not data.rows("validation")):
        raise InputError(
            f"{data.task_name} has no validation rows, by which compare chooses the learning rates: set some "
            "aside with --data.validation_size"
        )
    if data.label_words and data.rows("validation") == data.rows("test"):
        others = (
            "set training rows aside for the test with --data.test_size, or name others in --data.test_file"
            if hasattr(data, "test_size")
            else "give data with a published set in data.path, beside the rows set aside"
        )
        raise InputError(
            f"the validation rows of {data.task_name} are the rows that the test reports, so that the best "
            f"learning rate would be chosen on them: {others}"
        )


def asked_benchmarks(test_configs: Sequence[str], run: ResolvedRun) -> dict[str, Settings]:
    """Return the settings of the benchmarks that overlays of a test ask, by the names in their scores.

    Raises:
        InputError: An overlay is missing or names no class.
    """
    benchmarks: dict[str, Settings] = {}
    for path in map(find_config, test_configs):
        content = read_yaml(path, "--test_config")
        for given in flat(content).get("data.init_args.evals") or []:
            try:
                name = run.class_named(given["class_path"]).name
            except (ImportError, AttributeError, ValueError, TypeError, KeyError) as error:
                raise InputError(
                    f"--test_config {path} lists {given!r} under data.evals, which is no benchmark: {error}"
                ) from error
            benchmarks[name] = flat(given.get("init_args") or {})
    return benchmarks


def check_score(score: str | None, run: ResolvedRun, benchmarks: Collection[str]) -> None:
    """Raise InputError if no run of the comparison will have a score."""
    if score is None or score == "loss":
        return
    data = run.data
    asked = sorted({*benchmarks, *(benchmark.name for benchmark in data.evals)})
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
