"""Differences to a reference: which methods, which rows, in which words; the table, the CSV and the plot."""

import io
import json
import shutil

import matplotlib.image
import numpy as np
import pytest

from app.commands.compare.bootstrap import Interval
from app.commands.compare.collect import collect
from app.commands.compare.difference_plot import differences_plot
from app.commands.compare.differences import (
    Difference,
    differences_csv,
    differences_notes,
    differences_table,
    differences_to,
)
from app.commands.compare.scores import Score
from app.commands.compare.selection import by_rank, comparisons
from tests.support.report_runs import write_rows, write_run
from tests.support.run_folders import table

ROWS = 60
RATES = {"lora": 1e-3, "lora_one": 1e-4, "pissa": 1e-3}
FAR = 1e-2
"""A rate that the validation rows do not choose, where every row is right."""


def correct(method, seed):
    """Make rows that are mostly the same for all methods; lora_one has 15 more right, pissa one less."""
    rows = np.arange(ROWS) % 3 > 0
    rows[seed] = not rows[seed]
    if method == "lora_one":
        rows[30:50] |= np.arange(20) < 15 + seed
    if method == "pissa":
        rows[58] = seed > 0
    return rows


@pytest.fixture
def runs(tmp_path):
    for method, rate in RATES.items():
        for seed in range(3):
            folder = tmp_path / f"{method}-{seed}"
            write_run(folder, method, rate, seed, 0.9)
            write_rows(folder, correct(method, seed))
            write_run(tmp_path / f"{method}-far-{seed}", method, FAR, seed, 0.5)
            write_rows(tmp_path / f"{method}-far-{seed}", np.ones(ROWS))
    return tmp_path


@pytest.fixture(autouse=True)
def no_other_pictures(monkeypatch):
    monkeypatch.setattr("app.commands.compare.report.comparison_plots", lambda _: [])


def found(folder, wanted=None, score=None):
    [comparison] = comparisons(collect([folder]), score)
    return differences_to(comparison, wanted)


def test_differences_at_the_chosen_rates(runs):
    differences = found(runs)
    assert (differences.reference, differences.of, differences.left_out) == ("lora", "test", {})
    assert differences.scores == ["accuracy", "task_loss"]
    assert [each.method for each in differences.found] == 2 * ["lora_one", "pissa"]
    by_name = {(each.method, each.score): each for each in differences.found}
    for method in ("lora_one", "pissa"):
        each = by_name[method, "accuracy"]
        wanted = np.mean([correct(method, s).mean() - correct("lora", s).mean() for s in range(3)])
        assert each.interval.difference == pytest.approx(wanted)
        assert each.interval.low <= wanted <= each.interval.high
        assert (each.seeds, each.rows) == (3, ROWS)
        # The losses are 1 - correct / 2.
        loss = by_name[method, "task_loss"].interval
        assert loss.difference == pytest.approx(-wanted / 2)
        halved = (-each.interval.high / 2, -each.interval.low / 2)
        assert (loss.low, loss.high) == pytest.approx(halved)
    verdicts = {name: each.verdict for name, each in by_name.items()}
    assert verdicts == {
        ("lora_one", "accuracy"): "better",
        ("lora_one", "task_loss"): "better",
        ("pissa", "accuracy"): "no difference shown",
        ("pissa", "task_loss"): "no difference shown",
    }
    # The same numbers the other way round.
    other = {
        each.method: each for each in found(runs, "lora_one").found if each.score == "accuracy"
    }
    mean, low, high = by_name["lora_one", "accuracy"].interval
    assert other["lora"].interval == pytest.approx((-mean, -high, -low))
    assert other["lora"].verdict == "worse"


def test_another_reported_score(runs):
    assert found(runs, score="task_loss").scores == ["task_loss"]
    both = found(runs, score="loss")
    assert both.scores == ["loss", "task_loss"]
    weights = np.arange(ROWS) % 3 + 1
    change = np.mean([correct("pissa", s) * 1.0 - correct("lora", s) for s in range(3)], axis=0)
    [pissa] = [each for each in both.found if each[:2] == ("pissa", "loss")]
    assert pissa.interval.difference == pytest.approx(np.average(-change / 2, weights=weights))


@pytest.mark.parametrize(
    ("interval", "accuracy", "loss"),
    [
        ((0.1, 0.05, 0.2), "better", "worse"),
        ((-0.1, -0.2, -0.05), "worse", "better"),
        ((0.1, 0.0, 0.2), *2 * ["no difference shown"]),
        ((0.0, 0.0, 0.0), *2 * ["no difference shown"]),
    ],
)
def test_verdicts(interval, accuracy, loss):
    for score, wanted in (("accuracy", accuracy), ("task_loss", loss)):
        each = Difference("lora_one", Score(score), Interval(*interval), 3, 10)
        assert each.verdict == wanted
        assert each.text.endswith(f"] {wanted}")
    assert Difference("m", Score("accuracy"), Interval(0.0125, -0.001, 0.03), 3, 10).text == (
        "+1.25 [-0.10, +3.00] no difference shown"
    )


def test_the_reference(runs, error_of, report):
    assert found(runs, "pissa").reference == "pissa"
    for path in runs.glob("lora-*"):
        shutil.rmtree(path)
    assert found(runs).reference == "lora_one"  # the best
    other = found(runs, "lora")
    assert other.reference == "lora_one"
    assert differences_notes(other)[0].startswith("**Not to lora**, as asked for")
    error = error_of("report", runs, "--reference=lora")
    assert (
        error
        == "--reference is 'lora', which is the method of no run: expected one of lora_one, pissa"
    )
    assert (
        "Difference to pissa"
        in report(runs, "--reference=pissa") + (runs / "out" / "report.md").read_text()
    )
    for path in runs.glob("pissa-*"):
        shutil.rmtree(path)
    assert found(runs) is None


def test_of_a_method_with_two_settings_the_better_one_is_the_reference(tmp_path):
    for name, method, size, right in (
        ("a", "lora", 8, 20),
        ("b", "lora", 4, 40),
        ("c", "pissa", 8, 30),
    ):
        write_run(tmp_path / name, method, r=size)
        write_rows(tmp_path / name, np.arange(ROWS) < right)
    [comparison] = comparisons(collect([tmp_path]))
    [best, *_] = comparison.choices
    assert best.startswith("lora")
    assert differences_to(comparison).reference == best


def test_seeds_are_paired(runs):
    shutil.rmtree(runs / "pissa-0")
    shutil.rmtree(runs / "lora-2")
    by_name = {each.method: each for each in found(runs).found if each.score == "accuracy"}
    assert {method: each.seeds for method, each in by_name.items()} == {"lora_one": 2, "pissa": 1}
    one = correct("pissa", 1).mean() - correct("lora", 1).mean()
    assert by_name["pissa"].interval.difference == pytest.approx(one)
    assert "2 seeds are few" in " ".join(differences_notes(found(runs)))
    shutil.rmtree(runs / "lora-1")
    differences = found(runs)
    assert "One seed" in " ".join(differences_notes(differences))
    assert differences.left_out == {"pissa": "it has no seed that lora has"}


def test_what_has_no_rows_is_left_out_and_said(runs, report):
    (runs / "pissa-1" / "row_scores" / "test.csv").unlink()
    write_rows(runs / "lora_one-0", np.ones(ROWS + 1))
    again = f"`python train.py test --run {runs / 'pissa-1'}`"
    differences = found(runs)
    assert differences.found == []
    assert differences.left_out == {
        "pissa": f"it has no row_scores/test.csv, as an earlier version scored it: {again}",
        "lora_one": "its rows are not those of lora",
    }
    assert differences_table(differences) is None
    assert differences_plot(differences) is None
    report(runs)
    text = (runs / "out" / "report.md").read_text()
    section = text.partition("### Difference to lora\n\n")[2].partition("\n\n#")[0]
    assert section == (
        f"Without a difference to lora: pissa: {differences.left_out['pissa']}; lora_one: its rows are not "
        "those of lora."
    )


def untest(folder):
    """Let a run have no test scores."""
    summary = json.loads((folder / "summary.json").read_text())
    del summary["metrics"]["test"]
    (folder / "summary.json").write_text(json.dumps(summary))


def test_an_untested_method_takes_no_score_from_the_others(runs):
    scores = {each.score for each in found(runs).found if each.method == "lora_one"}
    assert len(scores) > 1
    for seed in range(3):
        untest(runs / f"pissa-{seed}")
    differences = found(runs)
    assert {each.score for each in differences.found} == scores
    assert {each.method for each in differences.found} == {"lora_one"}
    assert differences.left_out["pissa"].startswith("it is not tested yet")
    for seed in range(3):
        untest(runs / f"lora-{seed}")
    [note] = differences_notes(found(runs))
    assert note.startswith("There is no difference to lora: it is not tested yet")


def test_the_report(runs, report, tmp_path):
    printed = report(runs)
    rows = table(tmp_path / "out", "differences.csv")
    for row, each in zip(rows, found(runs).found, strict=True):
        assert (row["method"], row["score"], row["reference"]) == (*each[:2], "lora")
        numbers = [float(row[name]) for name in ("difference", "low", "high")]
        assert numbers == pytest.approx(each.interval)
        assert (row["seeds"], row["rows"], row["rank"], row["rows_of"]) == ("3", "60", "", "test")
        assert row["verdict"] == each.verdict
        assert each.text in printed
        assert each.text in (tmp_path / "out" / "report.md").read_text()
    assert "3 seeds are few" in printed
    content = (tmp_path / "out" / "differences.png").read_bytes()
    assert matplotlib.image.imread(io.BytesIO(content))[..., :3].std() > 0.02
    assert (
        "![Difference to lora, with its 95 % interval](differences.png)"
        in (tmp_path / "out" / "report.md").read_text()
    )


def test_each_rank_has_a_reference_of_its_own(tmp_path):
    for method in ("lora", "lora_one"):
        for r in (4, 16):
            folder = tmp_path / f"{method}-{r}"
            write_run(folder, method, 1e-3, 0, r=r)
            write_rows(folder, np.arange(ROWS) >= (r if method == "lora" else 2))
    [comparison] = comparisons(collect([tmp_path]))
    both = [differences_to(part) for part in by_rank(comparison)]
    assert [(each.rank, each.reference) for each in both] == [(4, "lora"), (16, "lora")]
    means = [each.found[0].interval.difference for each in both]
    assert means == pytest.approx([2 / ROWS, 14 / ROWS])
    assert differences_csv(both).count("lora_one,lora,4,") == 2
    assert differences_table(both[1]).frame.index.name == "method at rank 16"
    assert differences_plot(both[1]).name == "differences_r16"


def test_without_a_test_the_validation_rows_are_compared(tmp_path):
    for method in ("lora", "lora_one"):
        write_run(tmp_path / method, method, 1e-3, 0, test=None)
        write_rows(
            tmp_path / method, np.arange(ROWS) > (9 if method == "lora" else 4), moment="final"
        )
        run = tmp_path / method / "summary.json"
        run.write_text(run.read_text().replace('"test": 20', '"test": 0'))
    differences = found(tmp_path)
    assert differences.of == "validation"
    assert differences.found[0].interval.difference == pytest.approx(5 / ROWS)
