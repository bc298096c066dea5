"""`python train.py compare`: the grid, what is resumed, what is refused."""

import pytest
import yaml

from app.commands.compare.cells import Cell
from app.commands.compare.collect import read_run
from app.commands.compare.row_scores import read_row_scores
from tests.support.compare_runs import OPTIONS
from tests.support.run_folders import summary, table
from tests.support.toy_benchmarks import Writing


@pytest.mark.slow
def test_a_grid_from_end_to_end_and_again(compare, started, tmp_path, capsys):
    folder = tmp_path / "runs" / "compare_tiny"
    wanted = ("--methods=lora,lora_one", "--learning_rates=0.01,1e-1", "--seeds=0")
    assert compare(*wanted) == 0
    assert [argv[0] for argv in started] == ["fit", "test"] * 4
    assert "[4/4 finished]" in capsys.readouterr().out

    # Every number of the report is that of the runs.
    for row in table(folder, "runs.csv"):
        record = summary(tmp_path / row["folder"])
        cell = Cell(row["method"], float(row["learning_rate"]), int(row["seed"]))
        assert cell.name in row["folder"]
        scores, train = record["metrics"], record["train"]
        assert float(row["reported_score"]) == scores["test"]["accuracy"]
        assert float(row["selection_score"]) == scores["final"]["accuracy"]
        assert int(row["peak_bytes"]) >= train["peak_bytes"] > 2**20
        assert float(row["step_seconds"]) == pytest.approx(train["seconds"] / 2)
    assert [row["seeds"] for row in table(folder, "table.csv")] == ["1", "1"]
    chosen = {row["method"]: row["learning rate"].split()[0] for row in table(folder, "table.csv")}
    ours, lora = (
        summary(folder / "cells" / f"{method}-lr{chosen[method]}-seed0" / "version_0")["metrics"]
        for method in ("lora_one", "lora")
    )
    differences = {row["score"]: row for row in table(folder, "differences.csv")}
    assert list(differences) == ["accuracy", "task_loss"]
    for score, row in differences.items():
        assert (row["method"], row["reference"], row["rows"]) == ("lora_one", "lora", "20")
        change = ours["test"][score] - lora["test"][score]
        assert float(row["difference"]) == pytest.approx(change, abs=1e-6)

    # Again nothing is trained; a wider grid trains what is new, in any spelling of the rates.
    started.clear()
    assert compare(*wanted) == 0
    assert started == []
    wider = ("--methods=lora", "--learning_rates=1e-2,2e-2", "--seeds=0")
    assert compare(*wider) == 0
    assert [argv[0] for argv in started] == ["fit", "test"]
    assert "--output.name=lora-lr2e-2-seed0" in started[0]
    assert len(table(folder, "runs.csv")) == 5

    # Another task, and another method of the same name, do not get into the same folder, also with cells
    # that are new; what is refused leaves no trace.
    started.clear()
    capsys.readouterr()
    manifest = (folder / "compare.json").read_bytes()
    newer = ("--methods=lora", "--learning_rates=5e-2", "--seeds=9")
    for changed, message in (
        ("--data.max_length=64", "comparison of another task: data.init_args.max_length (128, 64)"),
        ("--model.adapter.r=2", "other settings of the method lora: model.adapter.r (4, 2)"),
    ):
        for cells in (wider, newer):
            assert compare(*cells, changed) == 2
            assert message in capsys.readouterr().err
            assert (folder / "compare.json").read_bytes() == manifest
    assert started == []


@pytest.mark.slow
def test_a_failed_cell_is_reported_and_the_others_go_on(compare, started, tmp_path, capsys):
    # 1e30 lets the loss overflow; the broken seed is a cell that fails for another reason.
    folder = tmp_path / "runs" / "compare_tiny"
    broken = folder / "cells" / "lora-lr1e-2-seed1" / "version_0"
    broken.parent.mkdir(parents=True)
    broken.write_text("a file where a folder belongs")
    wanted = ("--methods=lora", "--learning_rates=1e-2,1e30", "--seeds=0,1")
    options = ("--trainer.max_steps=3", OPTIONS[1], "--init=null")
    assert compare(*wanted, options=options) == 1
    assert "[1/4 finished, 3 failed" in capsys.readouterr().out
    rows = {row["folder"].rpartition("/")[2]: row for row in table(folder, "runs.csv")}
    assert rows["lora-lr1e-2-seed1"]["state"] == "failed"
    assert "is a file: set output.name" in rows["lora-lr1e-2-seed1"]["reason"]
    for seed in (0, 1):
        diverged = rows[f"lora-lr1e30-seed{seed}"]
        assert diverged["state"] == "diverged"
        assert "lower model.optimizer.lr" in diverged["reason"]
    page = (folder / "report.html").read_text()
    assert "2 diverged" in page
    assert "Runs in no mean" in page
    # The failed cell is tried again, the diverged ones are results.
    broken.unlink()
    started.clear()
    assert compare(*wanted, options=options) == 0
    assert [argv[0] for argv in started] == ["fit", "test"]
    assert "--output.name=lora-lr1e-2-seed1" in started[0]


@pytest.mark.slow
def test_refusals_of_what_is_asked_for(refused, tmp_path):
    lora, rates = "--methods=lora", "--learning_rates=1e-3"
    endless = ("--trainer.max_steps=-1", "--trainer.max_epochs=-1")
    too_long = "method lora: trainer.max_steps and trainer.max_epochs are both -1"
    positive = "expected numbers above 0"
    for argv, message in (
        (["--methods=lorra", rates], "--methods has 'lorra': expected some of"),
        (["--methods=lorra", rates], "lora_one_adamw"),
        (["--methods=lora,lora", rates], "names lora twice"),
        (["--methods=lora,", rates], "--methods has '': expected some of"),
        *(
            ([lora, f"--learning_rates={rate}"], f"--learning_rates has '{rate}': {positive}")
            for rate in ("fast", "0", "-1e-3", "nan", "inf")
        ),
        ([lora, "--learning_rates=1e-3,0.001"], "names 0.001 twice"),
        *(
            ([lora, rates, f"--seeds={seed}"], f"--seeds has '{seed}': expected whole numbers")
            for seed in ("one", "1.5", "-1", "4294967296")
        ),
        ([lora, rates, "--jobs=0"], "--jobs is 0"),
        ([lora, rates, "--score=bleu"], "expected accuracy, f1"),
        (
            [lora, rates, "--score=gsm8k/strict"],
            "the runs are asked no benchmark: name its overlay",
        ),
        (
            [lora, rates, "--reference=pissa"],
            "--reference is 'pissa', which is the method of no run",
        ),
        ([lora, rates, "--learning_rate=1"], "did you mean --learning_rates?"),
        ([lora, rates, "--model.optimizer.lr=1"], "give --learning_rates"),
        ([lora, rates, "--seed_everything=1"], "give --seeds"),
        ([lora], "arguments are required: --learning_rates"),
        (
            [lora, rates, "--data.btch_size=3"],
            "method lora: there is no setting data.btch_size; did you mean data.batch_size?",
        ),
        (
            ["--methods=adalora,lora", rates, "--model.adapter.use_dora=true"],
            "method adalora: model.adapter has use_dora",
        ),
        ([lora, rates, *endless], too_long),
        ([lora, rates, *endless, "--launch=wandb"], too_long),
        (
            [
                "--methods=lora,adalora",
                rates,
                "--model.adapter.adalora.init_r=6",
                OPTIONS[0][:-1] + "1",
            ],
            "method adalora: AdaLoRA prunes between step",
        ),
        (
            [lora, rates, "--launch=slurm", "--trainer.num_nodes=2"],
            "a task of the Slurm array has one device",
        ),
    ):
        assert message in refused(*argv)
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_finished_runs_are_asked_a_benchmark_that_is_added(compare, started, tmp_path, capsys):
    wanted = ("--methods=lora", "--learning_rates=1e-3")
    assert compare(*wanted) == 0
    overlay = tmp_path / "toy.yaml"
    toy = {"class_path": f"{Writing.__module__}.Writing", "init_args": {"size": 3}}
    data = {"class_path": "data_modules.benchmark_data.BenchmarkDataModule"}
    content = {"model": {"adapter": None}, "data": {**data, "init_args": {"evals": [toy]}}}
    overlay.write_text(yaml.safe_dump(content))
    started.clear()
    asked = (*wanted, f"--test_config={overlay}")
    assert compare(*asked, "--score=writing/has_e") == 0
    assert [argv[0] for argv in started] == ["test"]
    [row] = table(tmp_path / "runs" / "compare_tiny", "table.csv")
    assert "test writing/has_e, %" in row
    # Asked once, and with these settings only; the scores on the rows are still there.
    started.clear()
    assert compare(*asked) == 0
    assert started == []
    run = tmp_path / "runs" / "compare_tiny" / "cells" / "lora-lr1e-3-seed0" / "version_0"
    test = summary(run)["metrics"]["test"]
    assert {"accuracy", "writing/has_e"} <= set(test)
    for score, rows in (("accuracy", 20), ("writing/has_e", 3)):
        assert len(read_row_scores(read_run(run), "test", score).ids) == rows
    toy["init_args"]["limit"] = 1
    overlay.write_text(yaml.safe_dump(content))
    capsys.readouterr()
    assert compare(*asked) == 2
    message = "other settings of the benchmark writing: limit (None, 1) (then, now)"
    assert message in capsys.readouterr().err
