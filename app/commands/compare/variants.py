"""Put runs of one method with the same settings together, and name them."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from app.commands.compare.collect import Run
from app.commands.compare.settings import ALPHA, RANK, Settings, differences, rank_of


class MethodRuns(NamedTuple):
    """Runs of a method with the same settings.

    Attributes:
        family: The name that they share with those of other ranks.
        rank: The adapter's r; None without an adapter.
        runs: Themselves.
    """

    family: str
    rank: int | None
    runs: list[Run]


def variants_of(runs: Sequence[Run]) -> dict[str, MethodRuns]:
    """Put runs of one method with the same settings together, the finished ones first, by a label.

    The label is the method's name, with the settings that differ between those of the same name. A run whose
    settings are not known, which is an excluded one, counts for every variant of its method. Variants that
    differ in their rank alone, or in a lora_alpha that follows it too, are of one family.
    """
    variants: list[tuple[str | None, Settings, list[Run]]] = []
    for run in runs:
        namesakes = [variant for variant in variants if variant[0] == run.method]
        same = [v for v in namesakes if run.settings is None or not differences(v[1], run.settings)]
        if not same:
            same = [(run.method, run.settings or {}, [])]
            variants += same
        for _, _, members in same:
            members.append(run)
    labels: dict[str, MethodRuns] = {}
    for method, settings, members in variants:
        known = [other for name, other, _ in variants if name == method]
        differ = dict.fromkeys(name for other in known for name in differences(known[0], other))
        label = _label(method, settings, differ)
        pairs = {(other.get(RANK), other.get(ALPHA)) for other in known}
        follows = len(pairs) == len({rank for rank, _ in pairs})
        size = (RANK, ALPHA) if follows else (RANK,)
        family = _label(method, settings, [name for name in differ if name not in size])
        own = labels.setdefault(label, MethodRuns(family, rank_of(settings), []))
        own.runs.extend(members)
    return labels


def _label(method: str | None, settings: Settings, names: Iterable[str]) -> str:
    parts = [f"{name.rpartition('.')[2]}={settings.get(name)}" for name in names]
    return f"{method} ({', '.join(parts)})" if parts else str(method)
