"""`python train.py one_step` on the tiny run."""

import json
from collections import Counter
from math import sqrt

import pytest

from app.commands.one_step import scores
from app.commands.one_step.command import UNTOUCHED, Grid, one_step
from tests.support import run_folders
from tests.support.pictures import check_picture
from tests.support.tiny_run import write_tiny_run

ETAS = (1e-3, 0.3, 100.0)
OPTIONS = ("--samples=8,16", "--ranks=2,full", "--etas", ",".join(map(str, ETAS)), "--eta_rows=12")


@pytest.fixture
def undrawn(monkeypatch):
    """Draw no figures."""
    monkeypatch.setattr("app.commands.one_step.report.draw", lambda *_: None)


def lines(folder):
    return [json.loads(line) for line in (folder / "measurements.jsonl").read_text().splitlines()]


def test_the_options_make_a_grid():
    seen = []
    assert (
        one_step(["--ranks=4,full", "--samples", "8", "--data.seed=3"], lambda *a: seen.append(a))
        is None
    )
    [(rest, grid, folder)] = seen
    assert rest == ["--data.seed=3"]
    assert folder is None
    assert grid == Grid((8,), (4, "full"), ("global", "layer"), grid.etas, 64)
    assert [round(eta, 7) for eta in grid.etas[::2]] == [1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1, 10]
    assert grid.completed(32, 8) == grid
    grid = Grid((), (), ("layer",), (1.0,), 64).completed(32, 8)
    assert grid.series(32) == [[(32, 8, "layer", 1.0)], [(32, "full", "layer", 1.0)]]


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ("--samples=8,0", "--samples has '0': expected whole numbers above 0"),
        ("--samples=8,8", "--samples names 8 twice"),
        ("--ranks=8,all", "--ranks has 'all': expected whole numbers above 0 or full"),
        ("--ranks=-1", "--ranks has '-1': expected whole numbers above 0 or full"),
        ("--etas=1e-3,-1", "--etas has '-1': expected numbers above 0"),
        ("--etas=inf", "--etas has 'inf': expected numbers above 0"),
        ("--scale=local", "--scale has 'local': expected global or layer"),
        ("--eta_rows=0", "--eta_rows is 0: expected at least 1"),
        ("--sample=8", "there is no option --sample; did you mean --samples?"),
    ],
)
def test_wrong_options(option, told, error_of):
    assert error_of("one_step", "--config=quickstart.yaml", option).startswith(told)


def test_a_grid_is_measured_and_the_best_steps_are_reported(
    command, undrawn, tiny_run, tmp_path, capsys
):
    folder = tmp_path / "runs" / "tiny" / "one_step"
    assert command("one_step", "--config", tiny_run, *OPTIONS) == 0
    measured = lines(folder)
    assert Counter(line["rows"] for line in measured) == {
        12: 1 + 2 * 2 * 2 * 3,
        "validation": 1 + 8,
    }
    assert {"task_loss", "accuracy", "f1", "mcc", "loss"} == set(measured[0]["scores"])
    by_step = {
        (line["samples"], line["rank"], line["scale"], line["eta"], line["rows"]): line["scores"]
        for line in measured
    }
    summary = run_folders.summary(folder)
    assert summary["untouched"]["training"] == by_step[(*UNTOUCHED, 12)]
    assert summary["untouched"]["validation"] == by_step[(*UNTOUCHED, "validation")]
    assert len(summary["steps"]) == 8
    for step in summary["steps"]:
        series = step["samples"], step["rank"], step["scale"]
        losses = {eta: by_step[(*series, eta, 12)]["task_loss"] for eta in ETAS}
        assert step["eta"] == min(losses, key=losses.__getitem__)
        assert step["training"]["task_loss"] == min(losses.values())
        assert step["validation"] == by_step[(*series, step["eta"], "validation")]
        lowers = min(losses.values()) < summary["untouched"]["training"]["task_loss"]
        assert ("no eta lowers the task loss" in step["notes"]) != lowers
        assert ("at the end of --etas" in step["notes"]) == (step["eta"] in (1e-3, 100.0))
        gamma = None if step["rank"] == "full" else 16 / sqrt(2) / step["eta"]
        assert step["gamma"] == (gamma and pytest.approx(gamma))
    printed, table = capsys.readouterr().out, (folder / "table.md").read_text()
    assert table in printed
    assert len(table.splitlines()) == 2 + 1 + 8
    assert f"wrote {folder}" in printed
    assert not list(folder.parent.glob("version_*"))


@pytest.mark.parametrize("scale", ["layer", "global"])
def test_a_truncated_step_scores_as_the_initialization_of_its_gamma(
    scale, command, undrawn, fit, tiny_run, tmp_path
):
    """LoRA-One's factors add -scaling / gamma * G_r / S_1 to the weights: eta is scaling / gamma."""
    folder = tmp_path / "steps"
    options = ("--samples=16", "--ranks=4", f"--scale={scale}", "--etas=0.5", "--eta_rows=12")
    assert command("one_step", "--config", tiny_run, *options, "--output", folder) == 0
    [step] = run_folders.summary(folder)["steps"]
    assert step["gamma"] == pytest.approx(16)  # lora_alpha / sqrt(r) = 8
    run = fit(
        *(f"--init.gamma={step['gamma']}", f"--init.scale={scale}", "--init.estimator.kind=exact"),
        *("--init.num_samples=16", "--trainer.max_steps=1"),
    )
    after = run_folders.summary(run)["metrics"]["after_init"]
    assert after["loss"] == pytest.approx(step["validation"]["loss"], rel=1e-4)
    assert after["accuracy"] == step["validation"]["accuracy"]
    untouched = run_folders.summary(folder)["untouched"]["validation"]["loss"]
    assert abs(after["loss"] - untouched) > 0.05


class Killed(Exception):
    """Stands for `kill -9`."""


@pytest.mark.slow
def test_an_interrupted_experiment_goes_on(
    command, undrawn, error_of, tiny_run, tmp_path, monkeypatch
):
    """With a line half written, as if it had been alone all the time; and then a wider grid adds to it."""
    options = ("--samples=8", "--ranks=2", "--scale=layer", "--etas=0.1,1,10", "--eta_rows=12")
    alone, folder = tmp_path / "alone", tmp_path / "interrupted"
    assert command("one_step", "--config", tiny_run, *options, "--output", alone) == 0
    calls, score = [], scores.Scorer.score

    def dying(scorer, rows):
        calls.append(rows)
        if len(calls) == 4:
            raise Killed
        return score(scorer, rows)

    with monkeypatch.context() as patch:
        patch.setattr(scores.Scorer, "score", dying)
        with pytest.raises(Killed):
            command("one_step", "--config", tiny_run, *options, "--output", folder)
        file = folder / "measurements.jsonl"
        with file.open("a") as stream:
            stream.write('{"samples": 8, "rank"')
        assert command("one_step", "--config", tiny_run, *options, "--output", folder) == 0
        assert len(calls) == 4 + 3
        assert lines(folder) == lines(alone)
        assert (folder / "summary.json").read_text() == (alone / "summary.json").read_text()
        wider = ("--etas=0.1,0.3,1,10", *options[:3], "--eta_rows=12")
        assert command("one_step", "--config", tiny_run, *wider, "--output", folder) == 0
        assert len(calls) in (8, 9)  # and the validation rows, if it is the best one
    with file.open("a") as stream:
        stream.write("{}\n")
    told = error_of("one_step", "--config", tiny_run, *options, "--output", folder)
    assert f"{file} is no measurement: remove the line" in told


@pytest.mark.slow
def test_a_text_to_text_model_and_free_answers(command, run_models, sst2_folder, tmp_path):
    config = write_tiny_run(tmp_path / "t5.yaml", run_models / "t5", sst2_folder, tmp_path)
    assert command("one_step", "--config", config, *OPTIONS) == 0
    by_eta = {
        line["eta"]: line["scores"]["loss"]
        for line in lines(tmp_path / "tiny" / "one_step")
        if (line["samples"], line["rank"], line["rows"]) in ((16, "full", 12), (0, "full", 12))
    }
    assert min(by_eta.values()) < by_eta[0.0] - 0.1

    rows = tmp_path / "rows.jsonl"
    answers = [
        {"instruction": f"say {i}", "input": "", "output": f"{i % 3} it is"} for i in range(60)
    ]
    rows.write_text("".join(json.dumps(row) + "\n" for row in answers))
    free = ("--data=InstructionDataModule", f"--data.path={rows}", "--data.validation_size=20")
    folder = tmp_path / "free"
    options = (*free, *OPTIONS, "--scale=global", "--output", folder)
    assert (
        command("one_step", "--config", config, f"--model.name={run_models / 'llama'}", *options)
        == 0
    )
    for drawn in (tmp_path / "tiny" / "one_step", folder):
        check_picture(drawn / "one_step.png")
    for step in run_folders.summary(folder)["steps"]:
        assert set(step["validation"]) == {"task_loss", "loss"}
        assert step["validation"]["task_loss"] == step["validation"]["loss"]


def test_what_cannot_step_is_refused_in_one_line(error_of, tiny_run, tmp_path, monkeypatch):
    monkeypatch.setattr("app.training.module.build_model", lambda *_: pytest.fail("loads weights"))

    def told(*options):
        return error_of("one_step", "--config", tiny_run, *options)

    assert "init is null, which takes no gradient" in told("--config", "methods/lora.yaml")
    assert "init is PissaInit, which takes no gradient" in told("--config", "methods/pissa.yaml")
    assert "but the model has no LoRA adapter" in told("--model.adapter=null")
    assert "--samples 32 and --eta_rows 64 are more than the 40 training rows" in told(
        "--samples=16,32"
    )
    few = ("--samples=8", "--eta_rows=8")
    assert "the weight of model.layers.0.self_attn.k_proj is (8, 16), of rank 8 at most" in told(
        *few, "--ranks=9,full"
    )
    assert "are quantised (model.quantization nf4)" in told(*few, "--config", "models/nf4.yaml")
    assert "one process: set trainer.devices" in told(*few, "--trainer.devices=2")
    assert "and leave --config strategies/ out" in told(*few, "--config", "strategies/fsdp.yaml")
    assert "ckpt_path is set, but one_step scores an untrained model" in told("--ckpt_path=last")
    assert f"{str(tmp_path)!r}, which holds other files" in told("--output", tmp_path)
    assert "is no folder that can be written" in told("--output", tiny_run)
    assert not (tmp_path / "runs").exists()


def test_a_folder_holds_one_run(command, undrawn, error_of, tiny_run, tmp_path):
    options = ("--samples=8", "--ranks=2", "--scale=layer", "--etas=0.1", "--eta_rows=12")
    again = ("one_step", "--config", tiny_run, *options)
    assert command(*again) == 0
    assert command(*again, "--data.eval_batch_size=5", "--trainer.max_steps=9") == 0
    told = error_of(*again, "--seed_everything=3", "--trainer.precision=bf16-mixed")
    assert "holds measurements with other settings: " in told
    assert "seed_everything 0 (now 3), trainer.precision " in told


@pytest.mark.slow
def test_benchmarks_score_the_chosen_steps_alone(command, undrawn, tiny_run, tmp_path):
    """Also without validation rows; which training rows choose has nothing to do with them."""
    options = ("--samples=8", "--ranks=2", "--scale=layer", "--etas=0.1,1", "--eta_rows=12")
    evals = "--data.evals=[{class_path: tests.support.toy_benchmarks.Choosing}]"
    rows = "--data.validation_size=0"
    assert command("one_step", "--config", tiny_run, evals, rows, *options) == 0
    measured = lines(tmp_path / "runs" / "tiny" / "one_step")
    names = {tuple(line["scores"]) for line in measured if line["rows"] == "validation"}
    assert [name.partition("/")[0] for (name,) in names] == ["choosing"]
    assert len([line for line in measured if line["rows"] == "validation"]) == 2
    assert all("task_loss" in line["scores"] for line in measured if line["rows"] == 12)
