"""configs/paper.yaml against the authors' training, written out in torch and PEFT in float64."""

import json

import pytest
import yaml
from transformers import AutoModelForCausalLM

from tests.support.paper_loop import Settings, paper_loop, rows_by_number
from tests.support.run_folders import losses

STEPS, BATCH, ACCUMULATED = 10, 2, 2
SETTINGS = Settings(r=4, lora_alpha=16, gamma=4.0, lr=5e-3, warmup_steps=3)


@pytest.fixture
def run_of_free_answers(tmp_path, run_models):
    """Return a configuration of ten steps of four rows, whose answers have 1 to 40 tokens."""
    rows = [
        {"instruction": f"Say {i}.", "input": "", "output": f"{i} " + "so " * (7 * i % 12)}
        for i in range(24)
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    options = {"path": str(tmp_path / "rows.json"), "batch_size": BATCH, "validation_size": 0}
    config = {
        "trainer": {
            "max_steps": STEPS,
            "accumulate_grad_batches": ACCUMULATED,
            "log_every_n_steps": 1,
            "accelerator": "cpu",
        },
        "model": {
            "name": str(run_models / "llama"),
            "adapter": {"r": SETTINGS.r, "lora_alpha": SETTINGS.lora_alpha},
            "optimizer": {
                "class_path": "PreconditionedAdamW",
                "init_args": {"lr": SETTINGS.lr},
            },
            "warmup_steps": SETTINGS.warmup_steps,
        },
        "data": {"class_path": "InstructionDataModule", "init_args": options},
        "init": {"class_path": "LoraOneInit"},
        "output": {"name": "tiny", "root": str(tmp_path / "runs"), "wandb": "disabled"},
    }
    file = tmp_path / "free_answers.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


def test_the_overlay_trains_as_the_authors_do(
    command, run_of_free_answers, run_models, watched_fit, tmp_path
):
    """Ten steps with equal losses: factors, mean over rows, clipping, schedule and AdamW."""
    overlay = ("--config", "paper.yaml", f"--init.gamma={SETTINGS.gamma}")
    assert command("fit", "--config", run_of_free_answers, *overlay) == 0
    batches = watched_fit["batches"]
    order = [
        [i for batch in batches[start : start + ACCUMULATED] for i in batch["index"].tolist()]
        for start in range(0, len(batches), ACCUMULATED)
    ]
    assert [len(numbers) for numbers in order] == [BATCH * ACCUMULATED] * STEPS
    rows = rows_by_number(batches)
    base = AutoModelForCausalLM.from_pretrained(run_models / "llama").double()
    wanted, norms = paper_loop(base, rows, order, SETTINGS)
    assert min(norms) < SETTINGS.clip < max(norms)
    found = list(losses(tmp_path / "runs" / "tiny" / "version_0").values())
    assert found == pytest.approx(wanted, abs=1e-5)
    assert wanted[-1] < wanted[0] - 0.1
