"""Time from a command to what it is started for, as whole processes that take turns.

    python -m benchmarks.start_up [--rounds 5] [--only help plan] [--runs FOLDER] [--other CHECKOUT]
        [--peers peers/bin/python]

Everything that the commands load is cached (the first round of a machine downloads SmolLM2). The first step
of a run is behind three passes that its configuration asks for: the untouched model's scores, the
one-step gradient, the scores after initialization; `first pass` is where they begin. `a method of compare` is
what each further method adds to a comparison before its first run. With `--other`, another checkout takes
turns with this one. Wall time is what a user waits on a quiet machine; CPU time is the process's own, whoever
else computes.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks import history

ROOT = Path(__file__).resolve().parents[1]
REVIEWS = ("--config", "reviews_smollm2.yaml")
METHODS = "lora,lora_one,lora_ga,pissa,dora,lora_plus"
COMPARE = ("compare", *REVIEWS, "--learning_rates=1e-3", "--launch=wandb")
MARK = "start_up:"
MARKS = f"""
from lightning.pytorch import Callback

class Marks(Callback):
    def on_fit_start(self, *_):
        print("{MARK} first pass", flush=True)  # before the run's own callbacks

    def on_train_batch_start(self, *_):
        print("{MARK} first step", flush=True)
"""
FIT = ("fit", *REVIEWS, "--trainer.callbacks+=marks.Marks")
OURS: dict[str, tuple[str, ...]] = {
    "help": ("--help",),
    "report": ("report", "{runs}", "--output=report"),
    "print_config": ("fit", *REVIEWS, "--print_config"),
    "plan": ("plan", *REVIEWS),
    "compare 1 method": (*COMPARE, "--methods=lora"),
    "compare 6 methods": (*COMPARE, f"--methods={METHODS}"),
    "first pass": FIT,
    "first step": FIT,
}
LIMITS = {"help": 3, "report": 3, "print_config": 8, "plan": 15, "first step": 20}
"""Seconds that each may take on a quiet machine with two cores."""
IMPORTS = {
    "import torch": "import torch",
    "import lightning": "import torch, lightning",
    "import transformers.Trainer": "from transformers import Trainer",
}
PEERS = ("litgpt", "trl", "accelerate")
RATIOS = (
    *(("import lightning", name) for name in ("help", "print_config", "plan", "first pass")),
    *((f"{peer} --help", "help") for peer in PEERS),
)


def measure(command: list[str], folder: Path, until: str | None = None) -> tuple[float, float]:
    """Run a command, up to a mark if one is named; return its wall and CPU seconds."""
    begin, used = time.perf_counter(), _children()
    options = {"cwd": folder, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command, **options) as process:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if until and line.strip() == f"{MARK} {until}":
                seconds = time.perf_counter() - begin
                process.kill()
                break
        else:
            seconds = time.perf_counter() - begin
    if process.returncode not in (0, -9) or (until and process.returncode == 0):
        raise RuntimeError(
            f"{' '.join(command)} ended with {process.returncode}:\n{''.join(lines)}"
        )
    return seconds, _children() - used


def _children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def contenders(args: argparse.Namespace) -> Iterator[tuple[str, str, list[str]]]:
    """Yield the name of each command, what stands behind it in the table, and the command."""
    for tree in filter(None, (ROOT, args.other)):
        mark = "" if tree == ROOT else f", {tree.name}"
        for name, options in OURS.items():
            if name != "report" or args.runs:
                words = (str(args.runs) if word == "{runs}" else word for word in options)
                yield name, mark, [sys.executable, str(tree / "train.py"), *words]
    for name, code in IMPORTS.items():
        yield name, "", [sys.executable, "-c", code]
    for peer in PEERS if args.peers else ():
        yield f"{peer} --help", "", [str(args.peers.parent / peer), "--help"]


def run(args: argparse.Namespace) -> dict[str, list[tuple[float, float]]]:
    """Let the commands take turns; return the wall and CPU seconds of every run."""
    measured: dict[str, list[tuple[float, float]]] = {}
    for number in range(args.rounds):
        for name, mark, command in contenders(args):
            if args.only and name not in args.only:
                continue
            with tempfile.TemporaryDirectory() as folder:
                Path(folder, "marks.py").write_text(MARKS)
                seconds = measure(command, Path(folder), name if name.startswith("first") else None)
            measured.setdefault(name + mark, []).append(seconds)
            print(f"{number + 1}/{args.rounds} {name}{mark}: {seconds[0]:.1f} s", file=sys.stderr)
    return measured


def table(measured: dict[str, list[tuple[float, float]]]) -> str:
    """Return the measurements as a Markdown table."""
    lines = [
        "| command | seconds (median) | of | CPU seconds | at most |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, runs in measured.items():
        wall, cpu = zip(*runs, strict=True)
        spread = f"{min(wall):.1f} to {max(wall):.1f}"
        limit = LIMITS.get(name.partition(", ")[0], "")
        median = statistics.median(wall)
        lines.append(
            f"| {name} | {median:.1f} | {spread} | {statistics.median(cpu):.1f} | {limit} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Parse the command line, measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", help="some of the commands, by the table's names")
    parser.add_argument(
        "--runs", type=Path, help="finished runs for `report`, such as runs/reviews_smollm2"
    )
    parser.add_argument("--other", type=Path, help="another checkout, such as of an earlier commit")
    parser.add_argument(
        "--peers", type=Path, help="Python of the environment of benchmarks/peers.txt"
    )
    args = parser.parse_args()
    for option in ("runs", "other", "peers"):
        path = getattr(args, option)
        setattr(args, option, path and path.absolute())
        if path and not path.exists():
            parser.error(f"--{option} is {path}, which does not exist")
    measured = run(args)
    print(table(measured))
    medians = {name: statistics.median(s for s, _ in runs) for name, runs in measured.items()}
    pair = [measured.get(f"compare {n}") for n in ("1 method", "6 methods")]
    if all(pair):
        one, six = (map(statistics.median, zip(*runs, strict=True)) for runs in pair)
        wall, cpu = ((many - few) / 5 for few, many in zip(one, six, strict=True))
        print(f"\na method of compare: {wall:.2f} s, {cpu:.2f} s of CPU time; at most 1 s")
    figures = {
        f"{theirs} / {ours}": medians[theirs] / medians[ours]
        for theirs, ours in RATIOS
        if theirs in medians and ours in medians
    }
    if figures:
        history.append("start_up", vars(args), figures)


if __name__ == "__main__":
    main()
