"""What a finished run leaves: pictures, record, adapter, printed table."""

from huggingface_hub import ModelCard

from app.tracking import plots
from app.tracking.metrics_table import read_metrics
from tests.support.pictures import check_picture
from tests.support.run_folders import summary


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
