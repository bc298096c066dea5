r"""Speed of batched generation on GSM8K questions, on the real SmolLM2-135M, greedy in float32.

    OMP_NUM_THREADS=1 python -m benchmarks.generation DATA [--questions 50] [--batch_size 25]
        [--max_new_tokens 128] [--rounds 3] [--write_oracle FILE]

DATA is GSM8K's test.jsonl; its first questions are asked as "Question: ...\nAnswer:", the longest first:

    loop        transformers' `generate`, one prompt at a time, once
    batched     transformers' `generate`, batches padded on the left
    continuous  transformers' `generate_batch`, all prompts at once, in a cache for one batch
    ours        app.models.generation.generate, the same batches as `batched`

All but the loop take turns for `--rounds` rounds, and the table shows medians. CPU seconds are what counts on
a shared machine. `batched` and `ours` must write the loop's texts, or the benchmark ends with an error;
those of `continuous` that differ are counted. `--write_oracle` keeps what the loop wrote for
tests/models/test_generation.py.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
import yaml
from transformers import ContinuousBatchingConfig, GenerationConfig

from app.models.decoding import Decoding
from app.models.generation import generate
from app.models.loading import load_model, load_tokenizer
from app.models.source import resolve_model
from benchmarks import history

ROOT = Path(__file__).resolve().parents[1]

ORACLE_TOKENS = 32
LABELS = {
    "loop": "`generate`, one prompt at a time",
    "batched": "`generate`, batches padded on the left",
    "continuous": "`generate_batch`, continuous batching",
    "ours": "ours",
}
TAKING_TURNS = ("batched", "continuous", "ours")


class Contenders:
    """Everything that writes outputs to the same prompts; each method returns the texts in their order.

    Args:
        lines: Of GSM8K's test.jsonl.
        batch_size: Prompts at once.
        max_new_tokens: Most tokens of an output.
    """

    def __init__(self, lines: list[str], batch_size: int, max_new_tokens: int) -> None:
        overlay = yaml.safe_load((ROOT / "configs" / "models" / "smollm2.yaml").read_text())
        source = resolve_model(overlay["model"]["name"])
        self.model, self.tokenizer = load_model(source), load_tokenizer(source)
        self.tokenizer.padding_side = "left"
        asked = [f"Question: {json.loads(line)['question']}\nAnswer:" for line in lines]
        prompts = self.tokenizer(asked)["input_ids"]
        self.order = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
        self.prompts = [prompts[row] for row in self.order]
        starts = range(0, len(prompts), batch_size)
        self.batches = [self.prompts[start : start + batch_size] for start in starts]
        self.batch_size, self.max_new_tokens = batch_size, max_new_tokens
        self.greedy = {"max_new_tokens": max_new_tokens, "do_sample": False}
        self.alone: list[list[int]] = []  # what the loop wrote

    def _texts(self, outputs: list[list[int]]) -> list[str]:
        return self.tokenizer.batch_decode(outputs, skip_special_tokens=True)

    def loop(self) -> list[str]:
        """Ask `generate` one prompt at a time."""
        for prompt in self.prompts:
            out = self.model.generate(input_ids=torch.tensor([prompt]), **self.greedy)
            self.alone.append(out[0, len(prompt) :].tolist())
        return self._texts(self.alone)

    def batched(self) -> list[str]:
        """Ask `generate` in batches padded on the left."""
        written = []
        for batch in self.batches:
            padded = self.tokenizer.pad({"input_ids": batch}, return_tensors="pt")
            out = self.model.generate(**padded, **self.greedy)
            written += out[:, padded["input_ids"].shape[1] :].tolist()
        return self._texts(written)

    def continuous(self) -> list[str]:
        """Ask `generate_batch`, all prompts at once."""
        ends = {name: getattr(self.tokenizer, name) for name in ("eos_token_id", "pad_token_id")}
        page, longest = 256, len(self.prompts[0]) + self.max_new_tokens
        cache = ContinuousBatchingConfig(
            num_blocks=self.batch_size * -(-longest // page), max_batch_tokens=1024
        )
        settings = GenerationConfig(**self.greedy, **ends)
        requests = self.model.generate_batch(self.prompts, settings, cache, warmup=False)
        rows = range(len(self.prompts))
        return self._texts([requests[f"req_{row}"].generated_tokens for row in rows])

    def ours(self) -> list[str]:
        """Ask ours, in the same batches."""
        written = []
        for batch in self.batches:
            keys = [str(row) for row in range(len(batch))]
            decoding = Decoding(self.max_new_tokens)
            written += generate(self.model, self.model, self.tokenizer, batch, keys, decoding)
        return [output.text for (output,) in written]


def main() -> None:
    """Parse the command line, run the contenders in turns, compare their texts, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="test.jsonl of GSM8K")
    parser.add_argument("--questions", type=int, default=50)
    parser.add_argument("--batch_size", type=int, default=25)
    parser.add_argument("--max_new_tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write_oracle", type=Path, help="file for the test's oracle")
    args = parser.parse_args()
    lines = args.data.read_text().splitlines()[: args.questions]
    contenders = Contenders(lines, args.batch_size, args.max_new_tokens)
    seconds: dict[str, list[float]] = {name: [] for name in LABELS}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in LABELS}

    def timed(name: str) -> list[str]:
        start, cpu_start = time.perf_counter(), time.process_time()
        written = getattr(contenders, name)()
        seconds[name].append(time.perf_counter() - start)
        cpu_seconds[name].append(time.process_time() - cpu_start)
        took = f"{seconds[name][-1]:.1f} s, CPU {cpu_seconds[name][-1]:.1f} s"
        print(f"{name}: {took}", file=sys.stderr, flush=True)
        return written

    expected, alone = timed("loop"), contenders.alone
    if args.write_oracle:
        write_oracle(args.write_oracle, dict(zip(contenders.order, alone, strict=True)))
    for number in range(args.rounds):
        names = TAKING_TURNS[number % 3 :] + TAKING_TURNS[: number % 3]
        for name in names:
            pairs = zip(timed(name), expected, strict=True)
            if different := sum(theirs != right for theirs, right in pairs):
                message = f"{name} wrote {different} of {len(expected)} texts otherwise"
                if name != "continuous":
                    sys.exit(message)
                print(message)
    tokens, prompts = sum(map(len, alone)), contenders.prompts
    print(
        f"SmolLM2-135M, {len(prompts)} GSM8K questions ({sum(map(len, prompts))} tokens), {tokens} tokens "
        f"written, at most {args.max_new_tokens} each; batches of {args.batch_size}, {args.rounds} rounds, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}.\n"
    )
    history.append("generation", vars(args), report(seconds, cpu_seconds, len(prompts), tokens))


def write_oracle(file: Path, written: dict[int, list[int]]) -> None:
    """Write the first tokens of each output, by the question's row in the data, as JSON."""
    rows = [{"row": row, "tokens": written[row][:ORACLE_TOKENS]} for row in sorted(written)]
    file.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")


def report(
    seconds: dict[str, list[float]],
    cpu_seconds: dict[str, list[float]],
    samples: int,
    tokens: int,
) -> dict[str, float]:
    """Print medians, and how many times as fast as the loop and as `batched` each is, as a Markdown table.

    Returns:
        The others' CPU time over ours.
    """
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    cpu = {name: statistics.median(times) for name, times in cpu_seconds.items()}
    print(
        "| contender | seconds | samples/s | tokens/s | CPU s | x loop (CPU) | x batched (CPU) |\n"
        "| --- | --- | --- | --- | --- | --- | --- |"
    )
    for name, median in medians.items():
        print(
            f"| {LABELS[name]} | {median:.1f} | {samples / median:.3f} | {tokens / median:.1f} | "
            f"{cpu[name]:.1f} | {cpu['loop'] / cpu[name]:.2f} | {cpu['batched'] / cpu[name]:.2f} |"
        )
    return {f"{name} / ours": cpu[name] / cpu["ours"] for name in cpu if name != "ours"}


if __name__ == "__main__":
    main()
