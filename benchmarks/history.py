"""Keep one dated row for each run of a benchmark, and draw how its figures change.

    python -m benchmarks.history [--file benchmarks/history.jsonl] [--output docs/benchmarks/history.png]

A benchmark calls `append` with ratios to other implementations that ran beside it, which another machine
can be compared with. Rows of other arguments, or of another number of threads, are lines of their own.
"""

import argparse
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import matplotlib.dates as mdates
import torch

from app.tracking.plots import panels

ROOT = Path(__file__).resolve().parents[1]
HISTORY = ROOT / "benchmarks" / "history.jsonl"
PICTURE = ROOT / "docs" / "benchmarks" / "history.png"


def append(
    script: str, arguments: Mapping[str, Any], figures: Mapping[str, float], file: Path = HISTORY
) -> None:
    """Append one run to the history.

    Args:
        script: Name of the benchmark, such as "init".
        arguments: What its command line was parsed to, `vars(args)`; of a path, the last part is kept.
        figures: Values to follow, by name: "PEFT's / ours".
        file: JSON lines.
    """
    given = {key: value for key, value in arguments.items() if value is not None}
    row = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": f"{processor()}, {os.cpu_count()} cores",
        "load": round(os.getloadavg()[0], 2),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "script": script,
        "arguments": {k: v.name if isinstance(v, Path) else v for k, v in given.items()},
        "figures": {name: round(value, 4) for name, value in figures.items()},
    }
    with file.open("a") as stream:
        stream.write(json.dumps(row) + "\n")


def commit() -> str | None:
    """Return the commit, with a plus sign if another file than the history differs; None outside git."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(ROOT), *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", ".", f":!{HISTORY.relative_to(ROOT)}")
        return git("rev-parse", "--short=10", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def processor() -> str:
    """Return the processor's model, or what Python knows of it where the kernel does not tell."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw a panel for each script, and in it a line for each figure of the same settings."""
    scripts = sorted({row["script"] for row in rows})
    path.parent.mkdir(parents=True, exist_ok=True)
    with panels(path, (9, 3.4 * len(scripts)), rows=len(scripts)) as all_axes:
        for axes, script in zip(all_axes, scripts, strict=True):
            lines: dict[tuple[str, str], list[tuple[datetime, float]]] = {}
            for row in rows:
                if row["script"] == script:
                    settings = json.dumps([row["arguments"], row["threads"], row["machine"]])
                    for name, value in row["figures"].items():
                        point = (datetime.fromisoformat(row["date"]), value)
                        lines.setdefault((name, settings), []).append(point)
            for i, ((name, _), points) in enumerate(lines.items()):
                style = f"C{i % 10}{'os^Dvx'[i // 10 % 6]}-"
                axes.plot(*zip(*points, strict=True), style, label=name, markersize=4)
            axes.set(title=script, ylabel="ratio")
            axes.xaxis.set_major_formatter(
                mdates.ConciseDateFormatter(axes.xaxis.get_major_locator())
            )
            axes.grid(alpha=0.3)
            axes.legend(fontsize=6, loc="center left", bbox_to_anchor=(1, 0.5))


def main() -> None:
    """Parse the command line and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--file", type=Path, default=HISTORY)
    parser.add_argument("--output", type=Path, default=PICTURE)
    args = parser.parse_args()
    if not args.file.is_file():
        parser.error(f"{args.file} does not exist: run a benchmark first")
    rows = [json.loads(line) for line in args.file.read_text().splitlines()]
    draw(rows, args.output)
    print(f"{len(rows)} runs drawn in {args.output}")


if __name__ == "__main__":
    main()
