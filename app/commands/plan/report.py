"""What `plan` prints: examples as the model sees them, counts, a table of memory, a verdict."""

import itertools
import math
from collections import Counter
from typing import cast

from lightning.pytorch import Trainer
from torch import Tensor, nn

from app.commands.plan.memory import RunMemory
from app.commands.plan.placement import Placement
from app.commands.plan.protocols import PlannedData, TrainingRows
from app.models.batch import IGNORED_LABEL
from app.models.lora import lora_pairs
from app.models.quantization import number_of_weights
from app.training.module import LoraModule

EXAMPLES = 3
MOST_CLASSES = 10  # whose training rows are counted
OPEN, CLOSE = ">>>", "<<<"
LABEL, NUMBER = 34, 12
"""Columns of a line's first two parts."""
Row = tuple[str, int | None, str]
"""Label, bytes, note; without bytes there is no line."""
NOT_COUNTED = """\
  not counted: the interpreter and its libraries (or the CUDA context), about half a GiB, and
  what the allocator keeps aside"""
ADVICE = (
    "lower data.batch_size or data.max_length, set model.gradient_checkpointing or model.dtype "
    "bfloat16, or spread the weights with --config strategies/fsdp.yaml"
)


def size_text(size: int) -> str:
    """Write bytes with a unit that leaves at most four digits before the point."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= factor:
            return f"{size / factor:,.1f} {unit}"
    return f"{size} B"


def _line(label: str, value: int | str, note: str = "") -> str:
    number = f"{value:,}" if isinstance(value, int) else value
    return f"  {label:<{LABEL}}{number:>{NUMBER}}   {note}".rstrip()


def data_text(trainer: Trainer, module: LoraModule, data: PlannedData, placement: Placement) -> str:
    """Describe the data, set up for fitting, the batches and the steps, and show the first training rows."""
    lines = [f"data: {data.task_name}" + (f" from {data.source}" if data.source else "")]
    for split in ("train", "validation"):
        rows, cut = data.encoded(split), data.cut_prompts[split]
        longest = max(map(len, rows), default=0)
        note = f"longest {longest} tokens; {cut} prompts cut to data.max_length={data.max_length}"
        lines.append(_line(f"{split} rows", len(rows), note))
    if words := data.label_words:
        counts = Counter(dict.fromkeys(words, 0))
        counts.update(words[row.target] for row in data.encoded("train"))
        shown = [f"{word} {count:,}" for word, count in counts.most_common(MOST_CLASSES)]
        rest = ", ..." if len(words) > MOST_CLASSES else ""
        lines.append(_line("classes", len(words), ", ".join(shown) + rest))
    for prepared in data.prepare_benchmarks("validation"):
        decoding = prepared.benchmark.decoding
        if prepared.benchmark.runs_model:
            lines.append(_line(prepared.benchmark.name, f"{len(prepared.questions):,} tasks"))
            continue
        how = "likeliest choice" if decoding is None else f"up to {decoding.max_new_tokens} new"
        note = f"longest {max(map(len, prepared.questions))} tokens; {how}"
        lines.append(_line(prepared.benchmark.name, f"{len(prepared.questions):,} questions", note))
    rows, accumulated = data.encoded("train"), trainer.accumulate_grad_batches
    supervised = sum(row.num_supervised for row in rows)
    tokens = sum(map(len, rows))
    lines.append(_line("tokens an epoch", tokens, f"{supervised:,} supervised"))
    loader = data.train_dataloader()
    num_rows = len(cast(TrainingRows, loader.dataset).lengths)
    if data.packing:
        filled = f"of {data.max_length} tokens, {tokens / num_rows / data.max_length:.0%} filled"
        lines.append(_line("packed rows", num_rows, filled))
    size, world = data.batch_size, placement.world_size
    factors = f"data.batch_size {size} x {world} processes x {accumulated} accumulated"
    lines.append(_line("rows an optimizer step", size * world * accumulated, factors))
    per_epoch, steps = steps_of(num_rows, size, trainer, world)
    lines.append(_line("optimizer steps", steps, f"{per_epoch:,} an epoch"))
    lines += ["", f"examples as the model sees them, supervised tokens between {OPEN} and {CLOSE}:"]
    collated = data.encoder.collate(rows[:EXAMPLES])
    for i in range(len(collated["labels"])):
        lines += _example(i, {key: value[i] for key, value in collated.items()}, module)
    return "\n".join(lines)


def steps_of(num_rows: int, batch_size: int, trainer: Trainer, world_size: int) -> tuple[int, int]:
    """Return the optimizer steps of an epoch and of the whole run."""
    batches = math.ceil(math.ceil(num_rows / world_size) / batch_size)
    limit = trainer.limit_train_batches
    batches = int(batches * limit) if isinstance(limit, float) else min(batches, limit)
    per_epoch = math.ceil(batches / trainer.accumulate_grad_batches)
    bounds = [trainer.max_steps] if trainer.max_steps >= 0 else []
    if trainer.max_epochs is not None and trainer.max_epochs >= 0:
        bounds.append(trainer.max_epochs * per_epoch)
    return per_epoch, min(bounds)


def _example(number: int, row: dict[str, Tensor], module: LoraModule) -> list[str]:
    """Show one row of a batch, decoded from the very ids that the model is given."""
    labels = row["labels"]
    ids, supervised = row["input_ids"][row["attention_mask"].bool()], labels != IGNORED_LABEL
    if module.is_encoder_decoder:
        stretches = [(False, ids.tolist()), (True, labels[supervised].tolist())]
    else:
        marked = zip(supervised[: len(ids)].tolist(), ids.tolist(), strict=True)
        grouped = itertools.groupby(marked, key=lambda pair: pair[0])
        stretches = [(learnt, [token for _, token in pairs]) for learnt, pairs in grouped]
    text, answer = "", list[int]()
    for learnt, tokens in stretches:
        decoded = str(module.tokenizer.decode(tokens))
        text += f"{OPEN}{decoded}{CLOSE}" if learnt else decoded
        answer += tokens if learnt else []
    num_read = sum(len(tokens) for learnt, tokens in stretches if not learnt)
    head = f"  {number + 1}. {num_read} tokens read, {len(answer)} supervised {answer}"
    return [head, *(f"     | {line}" for line in text.splitlines())]


def model_text(module: LoraModule, model: nn.Module) -> str:
    """Describe the model as it will be trained: parameters, and which of them are trained."""
    pairs = lora_pairs(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    everything, quantized = number_of_weights(model)
    parameters = everything - (trained if pairs else 0)
    ranks = "/".join(map(str, sorted({pair.rank for pair in pairs})))
    rank = f", rank {ranks} in {len(pairs)} layers" if pairs else ""
    types = ", ".join(sorted({str(p.dtype)[6:] for p in model.parameters()}))
    types += f"; {quantized:,} quantised" if quantized else ""
    share = f"{trained / parameters:.2%} of them{rank}"
    lines = [f"model: {module.name}", _line("parameters", parameters, types)]
    return "\n".join([*lines, _line("trained parameters", trained, share)])


def memory_text(needed: RunMemory, placement: Placement) -> str:
    """Write the table of memory on each process."""
    world = placement.world_size
    processes = f"{placement.strategy}, {world} processes" if world > 1 else placement.strategy
    parts, peaks = (
        [_line(label, size_text(size), note) for label, size, note in rows if size is not None]
        for rows in (_parts(needed, placement), _peaks(needed, placement))
    )
    heading = f"memory of each process ({processes}):"
    return "\n".join([heading, *parts, "", "most at once:", *peaks, NOT_COUNTED])


def _parts(needed: RunMemory, placement: Placement) -> list[Row]:
    spread = f"1/{placement.world_size} of them" if placement.sharded else "whole"
    rows: list[Row] = [
        ("frozen weights", needed.frozen, "in host memory" if placement.cpu_offload else spread),
        ("gathered weights", needed.gathered or None, "whole while computing"),
        ("trained weights", needed.trained, ""),
        ("gradients", needed.trained, ""),
        ("optimizer states", needed.optimizer, ""),
        ("gradients in exchange", needed.exchange or None, "buffer between processes"),
        ("activations, kept for backward", needed.training.kept, "longest training batch"),
        ("activations, most at once", needed.training.peak, "with temporary tensors"),
        ("validation batch", needed.validation or None, "without gradients"),
        ("benchmark questions", needed.generation or None, "keys and values of the largest batch"),
    ]
    if (given := needed.initialization) is not None:
        rows += [
            ("initialization, activations", given.activations, "longest micro-batch"),
            ("initialization, sketch", given.sketch, _used("sketch", needed)),
            ("initialization, exact", given.exact, _used("exact", needed)),
        ]
    return rows


def _peaks(needed: RunMemory, placement: Placement) -> list[Row]:
    loading = "in the first process, which reads the weights"
    return [
        *(
            (f"initialization ({kind})", size, _used(kind, needed))
            for kind, size in needed.initialization_peaks.items()
        ),
        ("training", needed.training_peak, ""),
        ("validation", needed.validation_peak, ""),
        ("host memory while loading", needed.loading if placement.sharded else None, loading),
    ]


def _used(kind: str, needed: RunMemory) -> str:
    given = needed.initialization
    return "<- this run" if given is not None and kind == given.estimator else ""


def verdict_text(peak: int, memory: int, given: bool) -> str:
    """Say whether a run fits: bytes that it takes on one process, and that the process may use.

    The latter were given by the user, or are what is free.
    """
    of = "--memory_gib" if given else "free on this machine for each process"
    sizes = f"{size_text(peak)} of {size_text(memory)} ({of})"
    if peak > memory:
        return f"does not fit: {sizes}\n{ADVICE}"
    tight = f"\nless than a tenth to spare: {ADVICE}" if peak > 0.9 * memory else ""
    return f"fits: {sizes}{tight}"
