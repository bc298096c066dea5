"""The runs of a method at several ranks, and the ranks that its layers have no room for."""

from unittest.mock import Mock

import pytest
import yaml

from app.cli.resolve import resolve_run
from app.commands.compare.cells import Variant
from app.commands.compare.ranks import resolve_ranks
from app.commands.compare.resolve import RunOptions, resolve_methods
from app.utils.errors import InputError
from tests.support.run_folders import summary, table

RATE = "--learning_rates=1e-2"


@pytest.fixture
def at_ranks(tiny_run):
    """Return `at_ranks(methods, ranks, *options)`: the run of each variant."""

    def resolve(methods, ranks, *given):
        options = RunOptions([str(tiny_run)], given, resolve_run)
        return resolve_ranks(resolve_methods(methods, methods, options), ranks, options)

    return resolve


def test_the_rank_changes_and_what_is_tied_to_it(at_ranks, capsys):
    runs = at_ranks(["lora", "full"], [2, 8], "--model.adapter.lora_alpha=${model.adapter.r}")
    assert list(runs) == [Variant("lora", 2), Variant("lora", 8), Variant("full")]
    for rank in (2, 8):
        adapter = runs["lora", rank].resolved["model"]["adapter"]
        assert (adapter["r"], adapter["lora_alpha"]) == (rank, rank)
    assert "--ranks: full: no adapter, so that one run stands for all" in capsys.readouterr().out
    [usual] = at_ranks(["lora_one"], [2]).values()
    assert usual.resolved["model"]["adapter"]["lora_alpha"] == 16
    [same] = at_ranks(["lora_one"], []).values()
    assert same.resolved["model"]["adapter"]["r"] == 4


@pytest.mark.parametrize(
    ("method", "rank", "message"),
    [
        (
            "lora",
            17,
            r"method lora at rank 17: model\.adapter\.r is 17, but .*: set model\.adapter\.r",
        ),
        ("lora_ga", 8, r"method lora_ga at rank 8: init is LoraGaInit, which needs 2 r singular"),
        ("adalora", 16, r"method adalora at rank 16: model\.adapter\.adalora\.init_r is 12, below"),
    ],
)
def test_a_rank_for_which_a_layer_is_too_small(method, rank, message, at_ranks):
    with pytest.raises(InputError, match=message):
        at_ranks([method], [2, rank, 4])


def test_the_rank_of_a_saved_adapter_stays():
    run = Mock(resolved={"model": {"adapter": {"r": 8}, "adapter_path": "runs/adapter"}})
    with pytest.raises(InputError, match=r"--ranks is given, but model\.adapter_path is 'runs"):
        resolve_ranks({"lora": run}, [2], Mock())


def test_what_is_no_rank(refused):
    for ranks, message in (
        ("0", "--ranks has '0': expected whole numbers from 1"),
        ("2.5", "--ranks has '2.5': expected whole numbers from 1"),
        ("2,2", "--ranks names 2 twice"),
        ("", "--ranks has '': expected"),
    ):
        assert message in refused("--methods=lora", RATE, f"--ranks={ranks}")
    message = refused("--methods=lora", RATE, "--ranks=2", "--model.adapter.r=2")
    assert "--model.adapter.r is set by compare for each run: give --ranks" in message


@pytest.mark.slow
def test_a_grid_with_ranks(compare, started, tmp_path):
    """It goes on where it stands, and another rank adds to it."""
    folder = tmp_path / "runs" / "compare_tiny"
    assert compare("--methods=lora,full", RATE, "--ranks=2") == 0
    started.clear()
    assert compare("--methods=lora,full", RATE, "--ranks=2,4") == 0
    assert [argv[0] for argv in started] == ["fit", "test"]
    rows = {row["method"]: row for row in table(folder, "runs.csv")}
    assert {label: row["rank"] for label, row in rows.items()} == {
        "lora (r=2)": "2",
        "lora (r=4)": "4",
        "full": "",
    }
    for rank in (2, 4):
        row = rows[f"lora (r={rank})"]
        run = folder / "cells" / f"lora-r{rank}-lr1e-2-seed0" / "version_0"
        adapter = yaml.safe_load((run / "config.yaml").read_text())["model"]["adapter"]
        assert adapter["r"] == rank
        assert float(row["reported_score"]) == summary(run)["metrics"]["test"]["accuracy"]
    report = (folder / "report.md").read_text()
    assert "3 finished runs of 2 methods at ranks 2, 4" in report
    assert "| method | rank 2 | rank 4 |" in report
