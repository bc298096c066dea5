"""Resolve each method of a comparison at each rank, and check that its layers have room for it."""

from collections.abc import Mapping, Sequence

from app.commands.compare.cells import Variant
from app.commands.compare.resolve import ResolvedRun, RunOptions, named
from app.utils.errors import InputError


def resolve_ranks(
    runs: Mapping[str, ResolvedRun], ranks: Sequence[int], options: RunOptions
) -> dict[Variant, ResolvedRun]:
    """Return the run of each method at each rank; a method without an adapter has one for all of them.

    Settings that a configuration ties to `${model.adapter.r}` follow the rank, all others stay.

    Args:
        runs: Each method with its configuration's rank, from `resolve_methods`.
        ranks: Those of `--ranks`; where there is none, the configuration's stays.
        options: The options of the runs.

    Raises:
        InputError: The adapter is a saved one, a setting does not fit a rank, or a layer is too small for the
            largest; names the method and the rank.
    """
    variants: dict[Variant, ResolvedRun] = {}
    for method, run in runs.items():
        model = run.resolved["model"]
        if not ranks or model["adapter"] is None:
            variants[Variant(method)] = run
            continue
        if model["adapter_path"] is not None:
            raise InputError(
                f"--ranks is given, but model.adapter_path is {model['adapter_path']!r}, an adapter that has "
                "its rank: leave one of them out"
            )
        for rank in ranks:
            variants[Variant(method, rank)] = at_rank = options.resolve(method, rank)
            with named(method, rank):
                at_rank.check()
        with named(method, max(ranks)):
            variants[Variant(method, max(ranks))].check_rank()
    without = [method for method, rank in variants if ranks and rank is None]
    if without:
        print(f"--ranks: {', '.join(without)}: no adapter, so that one run stands for all ranks")
    return variants
