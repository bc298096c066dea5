r"""Speed of batched generation on GSM8K questions, on the real SmolLM2-135M, greedy in float32.

    OMP_NUM_THREADS=1 python benchmarks/generation.py DATA [--questions 50] [--batch_size 25]
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
from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from transformers import ContinuousBatchingConfig, GenerationConfig

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from app.models.generation import Decoding, generate
from app.models.loading import load_model, load_tokenizer, resolve_model

ORACLE_TOKENS = 32
LABELS = {
    "loop": "`generate`, one prompt at a time",
    "batched": "`generate`, batches padded on the left",
    "continuous": "`generate_batch`, continuous batching",
    "ours": "ours",
}


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

    overlay = yaml.safe_load((ROOT / "configs" / "models" / "smollm2.yaml").read_text())
    source = resolve_model(overlay["model"]["name"])
    model, tokenizer = load_model(source), load_tokenizer(source)
    tokenizer.padding_side = "left"
    lines = args.data.read_text().splitlines()[: args.questions]
    asked = [f"Question: {json.loads(line)['question']}\nAnswer:" for line in lines]
    prompts = tokenizer(asked)["input_ids"]
    order = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
    prompts = [prompts[row] for row in order]
    greedy = {"max_new_tokens": args.max_new_tokens, "do_sample": False}
    batches = [
        prompts[start : start + args.batch_size]
        for start in range(0, len(prompts), args.batch_size)
    ]

    def texts(outputs: list[list[int]]) -> list[str]:
        return tokenizer.batch_decode(outputs, skip_special_tokens=True)

    alone: list[list[int]] = []  # what the loop wrote

    def loop() -> list[str]:
        for prompt in prompts:
            out = model.generate(input_ids=torch.tensor([prompt]), **greedy)
            alone.append(out[0, len(prompt) :].tolist())
        return texts(alone)

    def batched() -> list[str]:
        written = []
        for batch in batches:
            padded = tokenizer.pad({"input_ids": batch}, return_tensors="pt")
            out = model.generate(**padded, **greedy)
            written += out[:, padded["input_ids"].shape[1] :].tolist()
        return texts(written)

    def continuous() -> list[str]:
        settings = GenerationConfig(
            **greedy, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
        )
        page, longest = 256, len(prompts[0]) + args.max_new_tokens
        cache = ContinuousBatchingConfig(
            num_blocks=args.batch_size * -(-longest // page), max_batch_tokens=1024
        )
        requests = model.generate_batch(prompts, settings, cache, warmup=False)
        return texts([requests[f"req_{row}"].generated_tokens for row in range(len(prompts))])

    def ours() -> list[str]:
        written = []
        for batch in batches:
            keys = [str(row) for row in range(len(batch))]
            written += generate(model, model, tokenizer, batch, keys, Decoding(args.max_new_tokens))
        return [output.text for (output,) in written]

    contenders: dict[str, Callable[[], list[str]]] = {
        "batched": batched,
        "continuous": continuous,
        "ours": ours,
    }
    seconds: dict[str, list[float]] = {name: [] for name in LABELS}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in LABELS}

    def timed(name: str, contender: Callable[[], list[str]]) -> list[str]:
        start, cpu_start = time.perf_counter(), time.process_time()
        written = contender()
        seconds[name].append(time.perf_counter() - start)
        cpu_seconds[name].append(time.process_time() - cpu_start)
        print(
            f"{name}: {seconds[name][-1]:.1f} s, CPU {cpu_seconds[name][-1]:.1f} s", file=sys.stderr
        )
        return written

    expected = timed("loop", loop)
    if args.write_oracle:
        write_oracle(args.write_oracle, dict(zip(order, alone, strict=True)))
    for number in range(args.rounds):
        names = [*contenders][number % 3 :] + [*contenders][: number % 3]
        for name in names:
            pairs = zip(timed(name, contenders[name]), expected, strict=True)
            different = sum(theirs != right for theirs, right in pairs)
            if different and name != "continuous":
                sys.exit(f"{name} wrote {different} of {len(expected)} texts otherwise")
            if different:
                print(f"{name} wrote {different} of {len(expected)} texts otherwise")
    tokens = sum(map(len, alone))
    print(
        f"SmolLM2-135M, {len(prompts)} GSM8K questions ({sum(map(len, prompts))} tokens), {tokens} tokens "
        f"written, at most {args.max_new_tokens} each; batches of {args.batch_size}, {args.rounds} rounds, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}.\n"
    )
    report(seconds, cpu_seconds, len(prompts), tokens)


def write_oracle(file: Path, written: dict[int, list[int]]) -> None:
    """Write the first tokens of each output, by the question's row in the data, as JSON."""
    rows = [{"row": row, "tokens": written[row][:ORACLE_TOKENS]} for row in sorted(written)]
    file.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")


def report(
    seconds: dict[str, list[float]],
    cpu_seconds: dict[str, list[float]],
    samples: int,
    tokens: int,
) -> None:
    """Print medians, and how many times as fast as the loop and as `batched` each is, as a Markdown table."""
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


if __name__ == "__main__":
    main()
