"""The first training loss of `fit`, and of TRL's SFTTrainer that trains on from `python train.py init`.

    python -m venv trl_env && trl_env/bin/pip install "trl==1.16.*" torch==2.13.0 transformers peft datasets
    python -m benchmarks.init_elsewhere --python trl_env/bin/python

SmolLM2-135M, LoRA-One, one batch of eight rows. TRL gets them as text and makes its own tokens of it; a few
minutes on two CPU cores.
"""

import argparse
import csv
import json
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CAPITALS = {
    **{"France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo", "Egypt": "Cairo"},
    **{"Peru": "Lima", "Cuba": "Havana", "Kenya": "Nairobi", "Norway": "Oslo", "Chile": "Santiago"},
}
OPTIONS = (
    *("--config=code_alpaca_smollm2.yaml", "--data.evals=null", "--data.chat_template=false"),
    *("--data.validation_size=2", "--data.batch_size=8", "--init.num_samples=8"),
    *("--trainer.max_steps=1", "--output.wandb=disabled", "--output.name=elsewhere"),
)


def ours(folder: Path) -> float:
    """Write adapter and rows into a folder; return the first loss of `fit`."""
    from transformers import AutoTokenizer

    from app.cli.main import main as run  # the project is not in TRL's environment
    from data_modules.instructions import InstructionDataModule

    rows = [
        {"instruction": f"Name the capital of {country}.", "output": f"It is {city}."}
        for country, city in CAPITALS.items()
    ]
    file = folder / "instructions.json"
    file.write_text(json.dumps(rows))
    options = (*OPTIONS, f"--data.path={file}", f"--output.root={folder}")
    for command in (["init", f"--output={folder / 'adapter'}"], ["fit"]):
        if status := run([*command, *options]):
            raise SystemExit(status)
    data = InstructionDataModule(str(file), validation_size=2)
    data.attach(AutoTokenizer.from_pretrained(folder / "adapter"), is_encoder_decoder=False)
    texts = [{"prompt": row.prompt, "completion": row.answer} for row in data.rows("train")]
    (folder / "texts.json").write_text(json.dumps(texts))
    with (folder / "elsewhere" / "version_0" / "metrics.csv").open(newline="") as stream:
        return float(next(row["train/loss"] for row in csv.DictReader(stream) if row["train/loss"]))


def of_trl(folder: Path) -> float:
    """Return the first loss that SFTTrainer logs; runs in TRL's environment."""
    from datasets import Dataset
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    adapter = folder / "adapter"
    trainer = SFTTrainer(
        AutoPeftModelForCausalLM.from_pretrained(adapter, is_trainable=True, dtype="float32"),
        args=SFTConfig(
            str(folder / "trl"),
            **{"max_steps": 1, "logging_steps": 1, "per_device_train_batch_size": 8},
            **{"use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no"},
        ),
        train_dataset=Dataset.from_list(json.loads((folder / "texts.json").read_text())),
        processing_class=AutoTokenizer.from_pretrained(adapter),
    )
    trainer.train()
    return trainer.state.log_history[0]["loss"]


def main() -> None:
    """Train one step in both environments and compare."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--python", help="the interpreter of an environment with TRL")
    parser.add_argument("--trl", type=Path, help=argparse.SUPPRESS)  # in that environment
    given = parser.parse_args()
    if given.trl:
        print(of_trl(given.trl))
        return
    if not given.python:
        parser.error("--python is required")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fit = ours(folder)
        there = [given.python, "-m", "benchmarks.init_elsewhere", "--trl", str(folder)]
        done = subprocess.run(there, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
        trl = float(done.stdout.splitlines()[-1])
    print(f"first loss: fit {fit:.6f}, TRL {trl:.6f}, difference {abs(fit - trl):.1e}")


if __name__ == "__main__":
    main()
