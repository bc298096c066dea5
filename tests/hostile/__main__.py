"""Print the table of docs/sandbox.md: `python -m tests.hostile` in the checkout."""

import tempfile
from pathlib import Path

from . import PROGRAMS, attack, stage


def outcome(name, mode, places):
    verdict, seconds = attack(name, mode, places)
    return "WORKS" if verdict.passed else f"fails, {seconds:.1f} s", verdict.reason


def main():
    print("| program | what it tries | bubblewrap | unprotected |\n| --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder, stage(Path(folder)) as places:
        for name, (tries, _) in PROGRAMS.items():
            results = [outcome(name, mode, places) for mode in ("bubblewrap", "unprotected")]
            cells = " | ".join(f"{told}: {why}" if why else told for told, why in results)
            print(f"| {name} | {tries} | {cells} |", flush=True)


main()
