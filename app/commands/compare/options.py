"""Which of the options given to `compare` go to which method's runs."""

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from app.commands.compare.settings import METHOD


class RunOptions:
    """The options of `fit` behind those of `compare`.

    An option below a section that makes the method, such as `--init.gamma 64`, goes to the methods that have
    such a setting; every other option goes to all.

    Args:
        configs: Names of configuration files.
        rest: Options and their values.
    """

    def __init__(self, configs: Sequence[str], rest: Sequence[str]) -> None:
        self.configs = list(configs)
        self.groups = _grouped(rest)
        keys = {_key(group) for group in self.groups}
        self.partial = sorted(k for k in keys if any(k.startswith(f"{part}.") for part in METHOD))
        self._takes: dict[str, set[str]] = {}

    def everything(self) -> list[str]:
        """Return all options, as they were given."""
        return [*self._files(), *chain.from_iterable(self.groups)]

    def of(self, method: str) -> list[str]:
        """Return the options of a method's runs; of the partial ones those that are known to be its own."""
        left_out = set(self.partial) - self._takes.get(method, set())
        groups = [group for group in self.groups if _key(group) not in left_out]
        return [*self._files(), f"--config=methods/{method}.yaml", *chain.from_iterable(groups)]

    def _files(self) -> list[str]:
        return [f"--config={name}" for name in self.configs]

    def learn(self, method: str, resolved: Mapping[str, Any]) -> None:
        """Note which of the partial options a method has, from its configuration without them."""
        self._takes[method] = {key for key in self.partial if has_setting(resolved, key)}

    def takers(self, key: str) -> list[str]:
        """Return the methods that get a partial option."""
        return [method for method, keys in self._takes.items() if key in keys]

    def force(self, method: str, key: str) -> None:
        """Give a method a partial option that it does not have."""
        self._takes.setdefault(method, set()).add(key)


def has_setting(config: Mapping[str, Any], key: str) -> bool:
    """Return whether a resolved configuration has a setting; below a null section it has none."""
    found: Any = config
    for part in key.split("."):
        if not isinstance(found, Mapping):
            return False
        found = {**found, **(found.get("init_args") or {})}
        if part not in found:
            return False
        found = found[part]
    return True


def _grouped(options: Sequence[str]) -> list[list[str]]:
    """Put each option and the values that follow it together."""
    groups: list[list[str]] = []
    for option in options:
        if option.startswith("--") or not groups:
            groups.append([])
        groups[-1].append(option)
    return groups


def _key(group: Sequence[str]) -> str:
    """Return the setting that an option names: `init.gamma` of `--init.init_args.gamma=64`."""
    name = group[0].removeprefix("--").partition("=")[0]
    return ".".join(part for part in name.split(".") if part != "init_args")
