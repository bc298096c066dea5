"""What `plan` prints: examples as the model sees them, counts, a table of memory, a verdict."""

import math
from typing import Any

from lightning.pytorch import Trainer
from torch import nn

from app.commands.plan.memory import Placement, RunMemory
from app.models.batch import IGNORED_LABEL
from app.models.lora import lora_pairs
from app.training.module import LoraModule

EXAMPLES = 3
OPEN, CLOSE = ">>>", "<<<"
LABEL, NUMBER = 34, 12


def size_text(size: int) -> str:
    """Write bytes with a unit that leaves at most four digits before the point."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= factor:
            return f"{size / factor:,.1f} {unit}"
    return f"{size} B"


def _line(label: str, value: str, note: str = "") -> str:
    return f"  {label:<{LABEL}}{value:>{NUMBER}}   {note}".rstrip()


def data_text(trainer: Trainer, module: LoraModule, data: Any, placement: Placement) -> str:
    """Describe the data, the batches and the steps, and show the first training rows.

    Args:
        trainer: Its length of training and accumulation.
        module: The tokenizer.
        data: The data module, set up for fitting.
        placement: The run's processes.
    """
    splits = ("train", "validation")
    rows = {split: data.encoded(split) for split in splits}
    tokens = sum(map(len, rows["train"]))
    supervised = sum(len(row.answer_ids) for row in rows["train"])
    per_epoch, steps = steps_of(len(rows["train"]), data.batch_size, trainer, placement.world_size)
    accumulated = trainer.accumulate_grad_batches
    batch = data.batch_size * placement.world_size * accumulated
    lines = [f"data: {data.task_name}" + (f" from {data.source}" if data.source else "")]
    for split in splits:
        cut = data.cut_prompts[split]
        longest = max(map(len, rows[split]))
        note = f"longest {longest} tokens; {cut} prompts cut to data.max_length={data.max_length}"
        lines.append(_line(f"{split} rows", f"{len(rows[split]):,}", note))
    for prepared in data.prepare_benchmarks("validation"):
        decoding = prepared.benchmark.decoding
        longest = max(map(len, prepared.questions))
        told = "likeliest choice" if decoding is None else f"up to {decoding.max_new_tokens} new"
        note = f"longest {longest} tokens; {told}"
        lines.append(
            _line(f"{prepared.benchmark.name}", f"{len(prepared.questions):,} questions", note)
        )
    lines.append(_line("tokens an epoch", f"{tokens:,}", f"{supervised:,} supervised"))
    made = f"data.batch_size {data.batch_size} x {placement.world_size} processes x {accumulated}"
    lines.append(_line("rows an optimizer step", f"{batch:,}", f"{made} accumulated"))
    lines.append(_line("optimizer steps", f"{steps:,}", f"{per_epoch:,} an epoch"))
    lines += ["", f"examples as the model sees them, supervised tokens between {OPEN} and {CLOSE}:"]
    collated = data.train_dataloader().collate_fn(rows["train"][:EXAMPLES])
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


def _example(number: int, row: dict[str, Any], module: LoraModule) -> list[str]:
    """Show one row of a batch, decoded from the very ids that the model is given."""
    tokenizer = module.tokenizer
    labels = row["labels"]
    supervised = labels != IGNORED_LABEL
    prompt = row["attention_mask"].bool()
    if not module.is_encoder_decoder:
        prompt = prompt & ~supervised
    read, learnt = row["input_ids"][prompt].tolist(), labels[supervised].tolist()
    text = f"{tokenizer.decode(read)}{OPEN}{tokenizer.decode(learnt)}{CLOSE}"
    head = f"  {number + 1}. {len(read)} tokens read, {len(learnt)} supervised {learnt}"
    return [head, *(f"     | {line}" for line in text.splitlines())]


def model_text(module: LoraModule, model: nn.Module) -> str:
    """Describe the model: parameters, and which of them are trained.

    Args:
        module: Settings of the model and the adapter.
        model: The model as it will be trained.
    """
    pairs = lora_pairs(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    everything = sum(p.numel() for p in model.parameters())
    parameters = everything - (trained if pairs else 0)
    rank = f", rank {pairs[0].lora_A.shape[0]} in {len(pairs)} layers" if pairs else ""
    types = ", ".join(sorted({str(p.dtype)[6:] for p in model.parameters()}))
    share = f"{trained / parameters:.2%} of them{rank}"
    lines = [f"model: {module.name}", _line("parameters", f"{parameters:,}", types)]
    return "\n".join([*lines, _line("trained parameters", f"{trained:,}", share)])


def memory_text(needed: RunMemory, placement: Placement) -> str:
    """Write the table of memory on each process.

    Args:
        needed: The parts.
        placement: The run's processes, for the heading.
    """
    world = placement.world_size
    many = f"{placement.strategy}, {world} processes" if world > 1 else placement.strategy
    spread = f"1/{world} of them" if placement.sharded else "whole"
    if placement.cpu_offload:
        spread = "in host memory"
    lines = [
        f"memory of each process ({many}):",
        _line("frozen weights", size_text(needed.frozen), spread),
    ]
    if needed.gathered:
        lines.append(_line("gathered weights", size_text(needed.gathered), "whole while computing"))
    lines += [
        _line("trained weights", size_text(needed.trained)),
        _line("gradients", size_text(needed.gradients)),
        _line("optimizer states", size_text(needed.optimizer)),
    ]
    if needed.exchange:
        lines.append(
            _line("gradients in exchange", size_text(needed.exchange), "buffer between processes")
        )
    lines += [
        _line(
            "activations, kept for backward",
            size_text(needed.training.kept),
            "longest training batch",
        ),
        _line(
            "activations, most at once", size_text(needed.training.peak), "with temporary tensors"
        ),
        _line("validation batch", size_text(needed.evaluation.peak), "without gradients"),
    ]
    if needed.generation:
        note = "keys and values of the largest batch"
        lines.append(_line("benchmark questions", size_text(needed.generation), note))
    if needed.observation is not None:
        lines += [
            _line(
                "initialisation, activations",
                size_text(needed.observation.peak),
                "longest micro-batch",
            ),
            _line("initialisation, sketch", size_text(needed.sketch), _used("sketch", needed)),
            _line("initialisation, exact", size_text(needed.exact), _used("exact", needed)),
        ]
    lines += ["", "most at once:"]
    if needed.observation is not None:
        for kind in ("sketch", "exact"):
            peak = needed.initialisation_peak(kind)
            lines.append(_line(f"initialisation ({kind})", size_text(peak), _used(kind, needed)))
    lines += [
        _line("training", size_text(needed.training_peak)),
        _line("validation", size_text(needed.evaluation_peak)),
    ]
    if placement.sharded:
        note = "in the first process, which reads the weights"
        lines.append(_line("host memory while loading", size_text(needed.loading), note))
    lines.append(
        "  not counted: the interpreter and its libraries (or the CUDA context), about half a GiB, and"
    )
    lines.append("  what the allocator keeps aside")
    return "\n".join(lines)


def _used(kind: str, needed: RunMemory) -> str:
    return "<- this run" if kind == needed.estimator else ""


def verdict_text(peak: int, memory: int, given: bool) -> str:
    """Say whether a run fits.

    Args:
        peak: Bytes that it takes on one process.
        memory: Bytes that one process may use.
        given: Whether the user said how many these are.
    """
    whose = "--memory_gib" if given else "free on this machine for each process"
    told = f"{size_text(peak)} of {size_text(memory)} ({whose})"
    advice = (
        "lower data.batch_size or data.max_length, set model.gradient_checkpointing or model.dtype "
        "bfloat16, or spread the weights with --config strategies/fsdp.yaml"
    )
    if peak > memory:
        return f"does not fit: {told}\n{advice}"
    tight = f"\nless than a tenth to spare: {advice}" if peak > 0.9 * memory else ""
    return f"fits: {told}{tight}"
