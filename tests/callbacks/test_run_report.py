"""What a finished run leaves: pictures, record, adapter, printed table."""

import errno
import os

import pytest
from huggingface_hub import ModelCard

from app.tracking import plots
from app.tracking.metrics_table import read_metrics
from app.tracking.run_folder import RunFolder
from callbacks import run_report
from callbacks.score_at import ScoreAt
from tests.support.pictures import check_picture
from tests.support.run_folders import summary, table


def score_table(card):
    """Return the scores in a model card as {(moment, name): text}."""
    table = card.text.partition("## Scores\n\n")[2].partition("\n\n")[0]
    head, _, *rows = ([c.strip() for c in line.split("|")[1:-1]] for line in table.splitlines())
    return {(row[0], name): cell for row in rows for name, cell in zip(head, row, strict=True)}


def test_the_folder_of_a_run(monkeypatch, fit, caplog, tmp_path):
    monkeypatch.setattr("callbacks.run_report.write_plots", plots.write_plots)
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        folder = fit("--trainer.val_check_interval=2")
    names = {path.name for path in folder.iterdir()}
    assert names >= {
        *("config.yaml", "metrics.csv", "summary.json", "adapter", "checkpoints"),
        *("loss.png", "validation.png", "spectrum.png", "captured_energy.png"),
    }
    assert not [name for name in names if name.endswith(".part")]
    for name in ("loss", "validation", "spectrum", "captured_energy"):
        check_picture(folder / f"{name}.png")
    files = {path.name for path in (folder / "adapter").iterdir()}
    assert files >= {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"}
    metrics = summary(folder)["metrics"]
    card = ModelCard.load(folder / "adapter" / "README.md")
    assert card.data.to_dict() == {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "lora-one"],
    }
    moments = {"untouched": "zero_shot", "after the initialization": "after_init", "final": "final"}
    for (moment, name), cell in score_table(card).items():
        if name:
            assert cell == f"{metrics[moments[moment]][name]:.4f}"
    assert {moment for moment, _ in score_table(card)} == set(moments)
    assert str(tmp_path.parent) not in str(card)  # nor the base model's folder, nor the data's
    assert "| 3 optimizer steps, 24 examples |" in card.text
    printed = caplog.text
    for moment, scores in metrics.items():
        cells = (scores[name] for name in ("accuracy", "f1", "mcc", "loss"))
        row = "".join(f"{value:12.4f}" for value in cells)
        assert f"{moment:>12}{row}" in printed
    assert f"run folder: {folder}" in printed
    curves = read_metrics(folder / "metrics.csv")
    assert [step for step, _ in curves["train/loss"]] == [0, 1, 2]
    assert curves["final/loss"] == [(3, metrics["final"]["loss"])]
    assert curves["zero_shot/accuracy"] == [(0, metrics["zero_shot"]["accuracy"])]


def fails(error, times=None):
    """Return a function that raises an error, always or so many times, and then does nothing."""
    left = iter(range(times)) if times is not None else iter(int, 1)

    def failing(*_, **__):
        for _ in left:
            raise error
        return []

    return failing


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("error", [FULL, ValueError("Number of rows must be positive")])
def test_plots_that_fail_are_one_warning(error, fit, monkeypatch):
    monkeypatch.setattr("callbacks.run_report.write_plots", fails(error))
    with pytest.warns(
        UserWarning, match=r"drawing the plots failed \((No space|ValueError: Number)"
    ) as told:
        folder = fit()
    assert len([w for w in told if "failed" in str(w.message)]) == 1
    assert "final" in summary(folder)["metrics"]
    RunFolder(folder).check_finished()


def test_what_is_trained_is_saved_before_it_is_scored(
    command, fit, tiny_run, tmp_path, monkeypatch
):
    """A failure of the final scores leaves a run that exports; going on makes the scores, and nothing again."""
    folder = tmp_path / "runs" / "tiny" / "version_0"
    with monkeypatch.context() as patched:
        patched.setattr(ScoreAt, "on_fit_end", fails(RuntimeError("out of memory")))
        with pytest.raises(RuntimeError, match="out of memory"):
            command("fit", "--config", tiny_run)
    before = summary(folder)
    assert list(before["metrics"]) == ["zero_shot", "after_init"]
    assert before["train"]["steps"] == 3
    weights = (folder / "adapter" / "adapter_model.safetensors").read_bytes()
    assert command("export", "--run", folder) == 0
    assert fit("--ckpt_path=last") == folder
    after = summary(folder)
    assert list(after["metrics"]) == ["zero_shot", "after_init", "final"]
    kept = ("device", "host", "began", "steps", "samples")
    assert {k: after["train"][k] for k in kept} == {k: before["train"][k] for k in kept}
    assert after["train"]["peak_bytes"] == pytest.approx(before["train"]["peak_bytes"], rel=0.1)
    for name in ("seconds", "ended"):
        assert after["train"][name] == pytest.approx(before["train"][name], abs=2)
    assert (folder / "adapter" / "adapter_model.safetensors").read_bytes() == weights


def test_weights_that_cannot_be_saved_are_tried_again(
    fit, error_of, tiny_run, tmp_path, monkeypatch
):
    original = run_report.save_adapter
    failing = fails(FULL, times=1)
    monkeypatch.setattr(run_report, "save_adapter", lambda *args: failing() or original(*args))
    with pytest.warns(UserWarning, match=r"saving the trained weights .*No space.*tried again"):
        folder = fit()
    assert (folder / "adapter" / "adapter_config.json").is_file()
    monkeypatch.setattr(run_report, "save_adapter", fails(FULL))
    with pytest.warns(UserWarning, match="tried again"):
        error = error_of("fit", "--config", tiny_run)
    assert "could not all be saved (No space left on device): make room" in error
    names = {path.name for path in (tmp_path / "runs" / "tiny" / "version_1").iterdir()}
    assert names == {".lock", "config.yaml", "metrics.csv", "checkpoints", "row_scores"}
    monkeypatch.setattr(run_report, "save_adapter", original)
    RunFolder(fit("--ckpt_path=last")).check_finished()


def test_a_run_without_validation_rows(fit, capsys, caplog):
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        folder = fit("--data.validation_size=0")
    assert summary(folder)["metrics"] == {"zero_shot": {}, "after_init": {}, "final": {}}
    assert "no scores: there are no validation rows" in caplog.text
    assert [int(row["step"]) for row in table(folder)] == [0, 1, 2]
    RunFolder(folder).check_finished()
