"""TensorBoard: the run's event file has the scalars, pictures and tables that W&B's file has."""

import pytest
import wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from app.tracking import plots
from app.tracking.metrics_table import read_metrics
from app.tracking.tensorboard_summary import markdown_table
from tests.support.run_folders import summary
from tests.support.wandb_file import read


@pytest.mark.slow
def test_both_loggers_have_the_same(no_key, fit, tmp_path, monkeypatch):
    monkeypatch.setattr("callbacks.run_report.write_plots", plots.write_plots)
    folder = fit(
        *("--output.wandb=offline", "--trainer.val_check_interval=2"),
        *("--config", "callbacks/alignment.yaml", "--trainer.callbacks.every_n_steps=1"),
        *("--trainer.logger=TensorBoardLogger", f"--trainer.logger.save_dir={tmp_path}/tb"),
    )
    wandb.teardown()  # until then W&B's own process may still write
    [file] = folder.glob("wandb/offline-run-*/*.wandb")
    ours = read(file)
    [events] = (tmp_path / "tb").rglob("events.out.*")
    shown = EventAccumulator(str(events), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    shown.Reload()

    scalars = {
        name: [(event.step, event.value) for event in shown.Scalars(name)]
        for name in shown.Tags()["scalars"]
    }
    curves = read_metrics(folder / "metrics.csv")
    for name, curve in curves.items():
        logged = scalars[name][: len(curve)]  # behind the curve of the seconds stands their sum
        assert [step for step, _ in logged] == [step for step, _ in curve]
        assert [v for _, v in logged] == pytest.approx([v for _, v in curve], rel=1e-5)
        assert any(name in row for row in ours.history)
    numbers = {
        name: value
        for name, value in ours.summary.items()
        if name.startswith(("init/", "train/", "parameters")) and "spectr" not in name
    }
    assert numbers.keys() >= {"init/seconds", "train/tokens_per_second", "train/peak_bytes"}
    for name, value in numbers.items():
        assert scalars[name][-1][1] == pytest.approx(value, rel=1e-5), name

    pictures = {
        f"plots/{path.name.partition('_')[0]}"
        for path in file.parent.glob("files/media/images/plots/*")
    }
    tags = shown.Tags()
    assert {tag.partition("_")[0] for tag in tags["images"]} == pictures >= {"plots/loss"}
    assert shown.Images("plots/loss")[0].width == 960
    layers = {name for row in ours.history for name in row if name.startswith("alignment_layers/")}
    assert set(tags["histograms"]) == {name.rpartition("/")[0] for name in layers}
    [spectrum] = shown.Tensors("init/spectrum/text_summary")
    text = spectrum.tensor_proto.string_val[0].decode().splitlines()
    name, layer = next(iter(summary(folder)["init"]["layers"].items()))
    first = (name, 1, layer["singular_values"][0], layer["captured_energy"])
    assert text[0] == "| layer | index | singular_value | captured_energy |"
    assert text[2] == "| {} | {} | {:.6g} | {:.6g} |".format(*first)
    # Settings are logged once.
    assert len(shown.Scalars("hp_metric")) == 1


def test_a_long_table_says_what_it_leaves_out():
    text = markdown_table(["output", "score"], [["a|b\nc", 0.5]] * 203)
    lines = text.splitlines()
    assert lines[:3] == ["| output | score |", "| --- | --- |", "| a\\|b c | 0.5 |"]
    assert len(lines) == 2 + 200 + 2
    assert lines[-1] == "3 more rows"
