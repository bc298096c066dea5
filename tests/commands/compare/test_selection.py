"""Which learning rate is chosen, and which runs share a table."""

import json

import pytest
import yaml

from app.commands.compare.cells import Cell
from app.commands.compare.collect import collect
from app.commands.compare.selection import by_rank, comparisons
from app.commands.compare.settings import method_settings
from app.utils.errors import InputError
from tests.support.report_runs import change, fail, grid_run, main_rows, manifest, write_run

OTHER_DATA = {"validation_size": 100, "max_length": 64, "batch_size": 8}


def rate_of(row):
    return row["learning rate"]


def ask_benchmark(folder, loss, score):
    """Let a run have the loss on rows and the score of a benchmark."""
    file = folder / "summary.json"
    metrics = {"final": {"loss": loss, "gsm8k/strict": score}, "test": {"gsm8k/strict": score}}
    file.write_text(json.dumps({**json.loads(file.read_text()), "metrics": metrics}))


def test_a_benchmark_is_reported_and_chosen_by_the_loss(tmp_path):
    """Questions of a benchmark are those of the reported set, so that the rows' loss chooses."""
    for rate, loss, score in ((1e-3, 0.4, 0.2), (1e-2, 0.5, 0.9)):
        write_run(tmp_path / f"{rate}", rate=rate)
        ask_benchmark(tmp_path / f"{rate}", loss, score)
    [comparison] = comparisons(collect([tmp_path]))
    assert (comparison.score, comparison.selected_by) == ("gsm8k/strict", "loss")
    [row] = comparison.chosen.to_dict("records")
    assert (row["learning_rate"], row["selection_score"], row["reported_score"]) == (1e-3, 0.4, 0.2)


def test_another_score(runs, tmp_path):
    [comparison] = comparisons(collect([runs]), "loss")
    assert list(comparison.choices) == ["lora_one", "lora"]
    assert comparison.choices["lora_one"].rate == "1e-3"
    with pytest.raises(
        InputError, match="'bleu', which no run has: expected one of accuracy, loss"
    ):
        comparisons(collect([runs]), "bleu")
    # It may be that of one of two tasks.
    write_run(tmp_path / "other", data=OTHER_DATA)
    ask_benchmark(tmp_path / "other", 0.4, 0.2)
    found = comparisons(collect([runs, tmp_path / "other"]), "gsm8k/strict")
    assert [comparison.score for comparison in found] == ["accuracy", "gsm8k/strict"]


def test_of_a_perplexity_less_is_better(tmp_path):
    name = "lm_eval/wikitext/word_perplexity,none"
    for method, value in (("lora", 12.0), ("lora_one", 15.0)):
        write_run(tmp_path / method, method)
        change(tmp_path / method, metrics={"test": {name: value}})
    rows, _ = main_rows(tmp_path, score=name)
    values = {label: row[f"test {name}"] for label, row in rows.items()}
    assert list(values.items()) == [("lora", "12.0000"), ("lora_one", "15.0000")]


@pytest.mark.parametrize("less", [False, True])
def test_scores_of_lm_eval_stand_as_the_harness_gives_them(less, tmp_path, report):
    name = "lm_eval/translation/bleu,none"
    for method, value in (("lora", 21.5), ("lora_one", 23.25)):
        write_run(tmp_path / method, method)
        change(tmp_path / method, metrics={"test": {name: value}})
        summary = json.loads((tmp_path / method / "summary.json").read_text())
        summary["lower_is_better"] = [name] if less else []
        (tmp_path / method / "summary.json").write_text(json.dumps(summary))
    rows, _ = main_rows(tmp_path, score=name)
    values = {label: row[f"test {name}"] for label, row in rows.items()}
    wanted = [("lora_one", "23.2500"), ("lora", "21.5000")]
    assert list(values.items()) == (wanted[::-1] if less else wanted)
    assert "2325" not in report(tmp_path, "--score", name)


def test_of_rates_with_equal_scores_the_one_of_less_loss(tmp_path):
    """Few rows tie often; a float32 mean of the same hits differs in its last digits."""
    for rate, accuracy, loss in ((1e-4, 0.9, 0.5), (1e-3, 0.9 - 1e-8, 0.3), (1e-2, 0.9, 0.4)):
        write_run(tmp_path / f"{rate}", rate=rate)
        change(tmp_path / f"{rate}", metrics={"final": {"accuracy": accuracy, "loss": loss}})
    assert rate_of(main_rows(tmp_path)[0]["lora"]) == "1e-3"


def test_a_rate_is_passed_over_where_a_run_failed(runs, tmp_path):
    fail(runs, "lora_one", 1e-3, 3, diverged=True)
    fail(runs, "pissa", 1e-3, 0)
    cells = [["lora_one", 1e-3, 3], ["pissa", 1e-3, 0], ["pissa", 1e-2, 0]]
    manifest(runs, cells, task={})
    rows, notes = main_rows(runs)
    assert rate_of(rows["lora_one"]) == "1e-2 †"
    assert rate_of(rows["pissa"]) == "none without a lost run"
    passed_over = (
        "not chosen, since a run failed or diverged there: lora_one at 1e-3 (91.00 ± 1.00)."
    )
    assert any(note.endswith(passed_over) for note in notes)
    assert "**Preliminary**: 18 of 21 runs are finished, 1 are not." in notes
    # Of losses the lower one is better; a worse rate that was lost is not named.
    grid = tmp_path / "grid"
    for rate, loss in ((1e-4, 0.4), (1e-3, 0.2), (1e-2, 0.6)):
        grid_run(grid, "lora", rate, 0, 1 - loss, 0.5)
    for rate in (1e-3, 1e-2):
        fail(grid, "lora", rate, 1)
    manifest(grid, [["lora", rate, seed] for rate in (1e-4, 1e-3, 1e-2) for seed in (0, 1)])
    rows, notes = main_rows(grid, score="loss")
    assert rate_of(rows["lora"]).startswith("1e-4")
    passed_over = "not chosen, since a run failed or diverged there: lora at 1e-3 (0.2000)."
    assert any(note.endswith(passed_over) for note in notes)


def test_rates_are_chosen_on_the_seeds_that_they_share(tmp_path):
    """Runs that are still to come exclude no rate, and those of one rate alone choose nothing."""
    for seed, validation in ((0, 0.9), (1, 0.99), (2, 0.99)):
        grid_run(tmp_path, "lora", 1e-3, seed, validation, 0.5)
    grid_run(tmp_path, "lora", 1e-2, 0, 0.95, 0.6)
    grid_run(tmp_path, "pissa", 1e-2, 0, 0.8, 0.4)
    for seed in (1, 2):
        grid_run(tmp_path, "pissa", 1e-3, seed, 0.9, 0.4)
    cells = [
        [m, rate, seed] for m in ("lora", "pissa") for rate in (1e-3, 1e-2) for seed in (0, 1, 2)
    ]
    manifest(tmp_path, cells)
    rows, notes = main_rows(tmp_path)
    assert rate_of(rows["lora"]) == "1e-2 †"  # better on seed 0, which both have
    assert rows["lora"]["test accuracy, %"] == "60.00"
    assert rate_of(rows["pissa"]) == "1e-3 †"  # no seed in common: that with more
    assert "**Preliminary**: 7 of 12 runs are finished, 5 are not." in notes
    assert "Rates were chosen on the seeds that they share: lora (0), pissa (1, 2)." in notes
    assert "The means are not over the same seeds: lora (0), pissa (1, 2)." in notes
    assert not any("run failed" in note for note in notes)


def test_rates_with_fewer_seeds_choose_no_more_once_they_are_worse(tmp_path):
    """A grid that is refined around the best rate of one seed."""
    grid = {1e-4: [0.1], 3e-4: [0.5, 0.4, 0.4], 1e-3: [0.49, 0.6, 0.6], 3e-3: [0.3, 0.2, 0.2]}
    for rate, scores in grid.items():
        for seed, validation in enumerate(scores):
            grid_run(tmp_path, "lora", rate, seed, validation, 0.5)
    rows, notes = main_rows(tmp_path)
    assert rate_of(rows["lora"]) == "1e-3"  # not 3e-4, the best on seed 0
    assert not any("on the seeds that they share" in note for note in notes)


def test_untested_methods_stand_in_the_order_of_what_chose(tmp_path):
    for method, loss in (("dora", 0.7), ("lora_one", 0.9), ("pissa", 0.5)):
        write_run(tmp_path / method, method)
        ask_benchmark(tmp_path / method, loss, 0.5 + loss / 10)
        metrics = {"final": {"loss": loss, "gsm8k/strict": 0.5}}
        summary = json.loads((tmp_path / method / "summary.json").read_text())
        (tmp_path / method / "summary.json").write_text(json.dumps(summary | {"metrics": metrics}))
    [comparison] = comparisons(collect([tmp_path]))
    assert list(comparison.choices) == ["pissa", "dora", "lora_one"]


def test_lost_runs_of_others_change_no_choice(tmp_path):
    """An unfinished run of another task, and a failed one of another variant, at the best rate."""
    first, second = tmp_path / "first", tmp_path / "second"
    for rate, validation in ((1e-4, 0.8), (1e-3, 0.9), (1e-2, 0.7)):
        grid_run(first, "lora", rate, 0, validation, 0.7)
        config = grid_run(second, "lora", rate, 0, validation, 0.7, r=64) / "config.yaml"
    unfinished = grid_run(first / "other", "lora", 1e-3, 0, data=OTHER_DATA)
    (unfinished / "summary.json").unlink()
    settings = method_settings(yaml.safe_load(config.read_text()))
    cells = [["lora", rate, 0] for rate in (1e-4, 1e-3, 1e-2)]
    manifest(second, [*cells, ["lora", 1e-3, 7]], methods={"lora": settings})
    fail(second, "lora", 1e-3, 7)
    rows, notes = main_rows(first, second)
    assert rate_of(rows["lora (r=8)"]) == "1e-3"
    assert rate_of(rows["lora (r=64)"]) == "1e-4 †"
    assert any("run failed or diverged there: lora (r=64) at 1e-3" in note for note in notes)


def test_variants_of_a_method(tmp_path):
    for r, test in ((8, 0.7), (64, 0.9)):
        write_run(tmp_path / f"{r}", r=r, test=test)
    rows, notes = main_rows(tmp_path)
    scores = [(label, row["test accuracy, %"]) for label, row in rows.items()]
    assert scores == [("lora (r=64)", "90.00"), ("lora (r=8)", "70.00")]
    assert "‡ No other learning rate was tried: lora (r=64), lora (r=8)." in notes
    assert "One seed says nothing about the spread between seeds." in notes


def test_ranks_apart(ranks):
    """Each has the methods that it was run for, by their names alone, and full fine-tuning."""
    [comparison] = comparisons(collect([ranks]))
    assert len(comparison.choices) == 5
    parts = by_rank(comparison)
    assert [part.rank for part in parts] == [8, 64]
    for part, rates in zip(parts, ({"1e-4"}, {"1e-3"}), strict=True):
        assert set(part.choices) == {"lora", "lora_one", "full"}
        assert {part.choices[label].rate for label in ("lora", "lora_one")} == rates
        assert set(part.rows["rank"].dropna()) == {part.rank}
        assert part.chosen.method.value_counts().to_dict() == {"lora": 1, "lora_one": 1, "full": 2}
    [alone] = by_rank(comparisons(collect([ranks / "full-0", ranks / "lora-8-0.0001"]))[0])
    assert (alone.rank, set(alone.choices)) == (None, {"full", "lora"})


@pytest.mark.parametrize(
    ("alphas", "families"),
    [
        ((16, 16), {"lora"}),
        ((8, 64), {"lora"}),  # tied to the rank
        ((8, 64, 16), {f"lora (lora_alpha={alpha})" for alpha in (8, 64, 16)}),
    ],
)
def test_what_only_the_rank_sets_apart(alphas, families, tmp_path):
    for i, (r, alpha) in enumerate(zip((8, 64, 64), alphas, strict=False)):
        write_run(tmp_path / f"{i}", r=r)
        config = yaml.safe_load((tmp_path / f"{i}" / "config.yaml").read_text())
        config["model"]["adapter"]["lora_alpha"] = alpha
        (tmp_path / f"{i}" / "config.yaml").write_text(yaml.safe_dump(config))
    [comparison] = comparisons(collect([tmp_path]))
    assert set(comparison.rows.family) == families


def test_a_failed_cell_counts_for_its_rank(tmp_path):
    settings = {}
    for r in (8, 64):
        for rate, validation in ((1e-4, 0.7), (1e-3, 0.8)):
            cell = Cell("lora", rate, 0, r)
            folder = tmp_path / "cells" / cell.name / "version_0"
            write_run(folder, "lora", rate, 0, validation, r=r)
        config = yaml.safe_load((folder / "config.yaml").read_text())
        settings[cell.variant.name] = method_settings(config)
    lost = Cell("lora", 1e-3, 1, 64)
    (tmp_path / "cells" / lost.name).mkdir()
    failure = json.dumps({"message": "no memory", "diverged": False})
    (tmp_path / "cells" / lost.name / "failure.json").write_text(failure)
    cells = [Cell("lora", rate, 0, r) for r in (8, 64) for rate in (1e-4, 1e-3)]
    manifest(tmp_path, [*cells, lost], methods=settings)
    rows, _ = main_rows(tmp_path)
    assert rate_of(rows["lora (r=8)"]) == "1e-3 †"
    assert rate_of(rows["lora (r=64)"]) == "1e-4 †"


def test_measuring_alignment_makes_no_other_method(tmp_path):
    watcher = {"class_path": "callbacks.alignment_monitor.AlignmentMonitor", "init_args": {}}
    older = {"class_path": "callbacks.inside_training.InsideTraining", "init_args": {}}
    actor = {"class_path": "my.Callback"}
    callbacks = (None, [watcher], [older], [actor], [actor, watcher], [older, actor])
    for seed, listed in enumerate(callbacks):
        file = grid_run(tmp_path, "lora", 1e-3, seed) / "config.yaml"
        config = yaml.safe_load(file.read_text())
        config["trainer"]["callbacks"] = listed
        file.write_text(yaml.safe_dump(config))
    assert [row["seeds"] for row in main_rows(tmp_path)[0].values()] == ["3", "3"]
