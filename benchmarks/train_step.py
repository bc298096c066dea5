"""Time and memory of a LoRA training step beside other implementations' own training loops.

    python -m benchmarks.train_step --peers peers/bin/python [--data ../shared/data] [--tasks reviews gsm8k]
        [--rounds 5] [--steps N] [--threads 1] [--contenders ours trainer ...] [--profile]

The environment of the peers is made as benchmarks/peers.txt says. The model is SmolLM2-135M in float32
with scaled dot product attention; LoRA of rank 8 on all linear layers, AdamW, no clipping, nothing
recomputed. Tasks, of each a sample of batches at evenly spaced quantiles of the rows' lengths:

    reviews     movie reviews in batches of 8: a word is supervised
    gsm8k       GSM8K with answers, in the chat template, in batches of 4

Everybody gets the same token ids. Ours are grouped by length as in a run over the whole data, whose batches are
of neighbours among hundreds; a peer gets the same batches, or the same rows shuffled.
Each contender has a process of its own, which loads the model and computes the loss of the longest batch: all
must agree to 1e-4 and train weights of the same size, or the benchmark ends there. Then they take turns for
`--rounds` rounds: a pass that warms up, and an epoch over the sample, which is timed; those that wait do
nothing. Ratios are taken within a round; the table shows their median, least and most. Peaks are resident
memory in a turn, as a median; excess lies above the loaded model.
`--profile` prints where our step's time goes instead, and how long its matrix products take by themselves.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from app.models.loading import load_tokenizer, local_directory
from app.models.source import resolve_model
from benchmarks import history
from benchmarks.init import model_name
from data_modules.gsm8k import Gsm8kDataModule
from data_modules.movie_reviews import MovieReviewsDataModule
from data_modules.sampling import longest_first
from data_modules.text import TextDataModule

ROOT = Path(__file__).resolve().parents[1]

Figures = dict[str, float]


class Contender(NamedTuple):
    """One implementation: what it is called, its program, and how it orders rows."""

    label: str
    program: tuple[str, ...]
    grouped: bool


OURS = "parts.our_step"
CONTENDERS = {
    "ours": Contender("ours, LoRA", (OURS, "lora"), True),
    "preconditioned": Contender("ours, LoRA-One's optimizer", (OURS, "preconditioned"), True),
    "packed": Contender("ours, packed", (OURS, "packed"), True),
    "trainer": Contender("Trainer + PEFT", ("peers.trainer", "trainer"), False),
    "trainer_grouped": Contender("Trainer + PEFT, grouped", ("peers.trainer", "trainer"), True),
    "trl": Contender("TRL SFTTrainer", ("peers.trainer", "trl"), False),
    "trl_grouped": Contender("TRL SFTTrainer, grouped", ("peers.trainer", "trl"), True),
    "litgpt": Contender("litgpt LoRA", ("peers.litgpt",), False),
}
DEFAULT = [name for name in CONTENDERS if name != "packed"]
STEPS = {"reviews": 5, "gsm8k": 3}  # of a turn: five rounds of everything take about 20 minutes
SAME_LOSS = 1e-4
HEADINGS = (
    "contender | seconds a step | samples/s | supervised tokens/s | time / ours | CPU time / ours | "
    "peak, MiB | above the model, MiB | our peak / its | our excess / its"
)


def task_data(task: str, data: Path) -> TextDataModule:
    """Return the rows of a task."""
    if task == "reviews":
        return MovieReviewsDataModule(batch_size=8)
    path = str(data / "gsm8k" / "train.jsonl.gz")
    return Gsm8kDataModule(path, max_length=256, batch_size=4, chat_template=True)


def stratified(lengths: Sequence[int], steps: int, batch_size: int) -> list[int]:
    """Return batches of neighbours by length at the quantiles (i + 1/2) / steps, the longest first."""
    if steps * batch_size > len(lengths):
        sys.exit(f"--steps={steps} of {batch_size} rows each, of {len(lengths)} rows: give fewer")
    order, size = longest_first(lengths), len(lengths)
    starts = [((2 * i + 1) * size // steps - batch_size) // 2 for i in range(steps)]
    return [row for start in starts for row in order[start : start + batch_size]]


def write_task(task: str, args: argparse.Namespace, folder: Path, tokenizer: Any) -> Figures:
    """Write the rows and settings of a task, in both orders; return how much is in an epoch."""
    data = task_data(task, args.data)
    data.attach(tokenizer, False)
    encoded, texts = data.encoded("train"), data.rows("train")
    steps = args.steps or STEPS[task]
    grouped = stratified([len(row) for row in encoded], steps, data.batch_size)
    drawn = torch.randperm(len(grouped), generator=torch.Generator().manual_seed(0)).tolist()
    for name, order in (("grouped", grouped), ("plain", [grouped[i] for i in drawn])):
        settings = {
            "rows": [
                [encoded[i].prompt_ids.tolist(), encoded[i].answer_ids.tolist()] for i in order
            ],
            "texts": [[texts[i].prompt, texts[i].answer] for i in order],
            "check": [order.index(i) for i in grouped[: data.batch_size]],
            "model": str(args.model),
            "output": str(folder / "output"),
            "batch_size": data.batch_size,
            "max_length": data.max_length,
            "chat_template": data.chat_template,
            "threads": args.threads,
            "r": 8,
            "lora_alpha": 16,
            "lr": 1e-4,
            "log_every_n_steps": 10,  # TRL's default
        }
        (folder / f"{task}_{name}.json").write_text(json.dumps(settings))
    return {
        "steps": steps,
        "rows": len(grouped),
        "tokens": sum(len(encoded[i]) for i in grouped),
        "supervised": sum(len(encoded[i].answer_ids) for i in grouped),
    }


class Process:
    """A contender's process, which trains an epoch when it is told to.

    Args:
        name: The contender's.
        command: Its command line.
        log: File for what it prints.
        threads: Of torch.
    """

    def __init__(self, name: str, command: Sequence[str], log: Path, threads: int) -> None:
        self.name, self.log = name, log
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        here, there = socket.socketpair()
        with log.open("w") as stream, there:
            self.process = subprocess.Popen(
                command, stdin=there, stdout=stream, stderr=stream, cwd=ROOT, env=environment
            )
        with here:
            self.line = here.makefile("rw")
        self.ready = self._read()

    def _read(self) -> Figures:
        line = self.line.readline()
        if not line:
            sys.exit(f"{self.name} ended before its turn:\n{self.log.read_text()[-3000:]}")
        return json.loads(line)

    def turn(self) -> Figures:
        """Let it train an epoch; return what that took."""
        print("go", file=self.line, flush=True)
        return self._read()

    def close(self) -> None:
        """End it."""
        self.line.close()
        self.process.wait()


def check_same(ready: dict[str, Figures]) -> None:
    """End the benchmark if the contenders do not compute the same, or do not train as much."""
    told = ", ".join(
        f"{name} {each['loss']:.6f} ({each['trained_bytes']:,.0f} bytes trained)"
        for name, each in ready.items()
    )
    print(f"loss of the longest batch: {told}", file=sys.stderr, flush=True)
    losses, trained = ([each[key] for each in ready.values()] for key in ("loss", "trained_bytes"))
    if max(losses) - min(losses) > SAME_LOSS or len(set(trained)) > 1:
        sys.exit(
            f"the losses differ by more than {SAME_LOSS}, or the trained weights in size, so that times mean "
            f"nothing: {told}"
        )


def measure(task: str, args: argparse.Namespace, folder: Path) -> dict[str, list[Figures]]:
    """Let the contenders take turns at a task; return each one's rounds."""
    measured: dict[str, list[Figures]] = {name: [] for name in args.contenders}
    processes: list[Process] = []
    try:
        for name in args.contenders:
            _, (program, *words), grouped = CONTENDERS[name]
            python = sys.executable if program == OURS else str(args.peers)
            file = folder / f"{task}_{'grouped' if grouped else 'plain'}.json"
            command = [python, "-m", f"benchmarks.{program}", *words, str(file)]
            log = folder / f"{task}_{name}.log"
            processes.append(Process(name, command, log, args.threads))
        check_same({each.name: each.ready for each in processes})
        for number in range(args.rounds):
            first = number % len(processes)
            for each in processes[first:] + processes[:first]:
                measured[each.name].append(each.turn())
                print(task, each.name, measured[each.name][-1], file=sys.stderr, flush=True)
    finally:
        for each in processes:
            each.close()
    return measured


def spread(ratios: Sequence[float]) -> str:
    """Return the median of ratios, and the least and the most."""
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def report(task: str, epoch: Figures, measured: dict[str, list[Figures]]) -> dict[str, float]:
    """Print a task's Markdown table; return the ratios to follow."""
    ours, figures = measured["ours"], {}
    print(
        f"{task}: {epoch['steps']} steps of {epoch['rows'] / epoch['steps']:.0f} rows a turn, "
        f"{epoch['tokens']} tokens, {epoch['supervised']} of them supervised; {len(ours)} rounds\n"
    )
    print(f"| {HEADINGS} |\n{'| --- ' * len(HEADINGS.split(' | '))}|")
    our_peak, our_excess = (
        statistics.median(r[key] for r in ours) for key in ("peak_mib", "excess_mib")
    )
    for name, rounds in measured.items():
        seconds, peak, excess = (
            statistics.median(r[key] for r in rounds)
            for key in ("seconds", "peak_mib", "excess_mib")
        )
        ratios = {
            key: [its[key] / our[key] for its, our in zip(rounds, ours, strict=True)]
            for key in ("seconds", "cpu_seconds")
        }
        print(
            f"| {CONTENDERS[name].label} | {seconds / epoch['steps']:.2f} | {epoch['rows'] / seconds:.2f} | "
            f"{epoch['supervised'] / seconds:.1f} | {spread(ratios['seconds'])} | "
            f"{spread(ratios['cpu_seconds'])} | {peak:.0f} | {excess:.0f} | {our_peak / peak:.2f} | "
            f"{our_excess / excess:.2f} |"
        )
        if name != "ours":
            figures[f"{task}, {name} / ours, time"] = statistics.median(ratios["seconds"])
            figures[f"{task}, ours / {name}, peak"] = our_peak / peak
    print(flush=True)
    return figures


def versions(python: Path) -> str:
    """Return the versions of the peers' environment."""
    names = ("torch", "transformers", "peft", "trl", "litgpt")
    code = f"from importlib.metadata import version as v; print(', '.join(n + ' ' + v(n) for n in {names}))"
    command = [str(python), "-c", code]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def main() -> None:
    """Parse the command line, write the rows, let the contenders take turns, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", type=lambda name: Path(name).absolute(), help="their python")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--tasks", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=DEFAULT)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, help=f"steps of a turn; without, {STEPS}")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--profile", action="store_true", help="profile ours, and stop")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    args = parser.parse_args()
    if "ours" not in args.contenders:
        parser.error("--contenders must have ours, which the others are compared with")
    if not args.profile and not (args.peers and args.peers.is_file()):
        parser.error(f"--peers={args.peers}: expected the python that benchmarks/peers.txt makes")
    source = resolve_model(model_name())
    args.model = local_directory(source)
    tokenizer, results, figures = load_tokenizer(source), {}, {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if not args.profile:
            print(
                f"SmolLM2-135M, {args.threads} threads; peers: {versions(args.peers)}\n", flush=True
            )
        for task in args.tasks:
            epoch = write_task(task, args, folder, tokenizer)
            if args.profile:
                file = str(folder / f"{task}_grouped.json")
                program = [sys.executable, "-m", f"benchmarks.{OURS}", "lora", file]
                subprocess.run([*program, "--profile"], check=True, cwd=ROOT)
                continue
            results[task] = measure(task, args, folder)
            figures |= report(task, epoch, results[task])
    if results:
        history.append("train_step", vars(args), figures)
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
