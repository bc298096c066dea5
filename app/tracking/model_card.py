"""README.md of an adapter or model: base, method, data, scores, how to load and serve it, what to cite.

What it says is true on any machine: a local base model or data file is named without its folder.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from jinja2 import Environment, FileSystemLoader

from app.tracking.model_usage import (
    BaseName,
    adapter_kind,
    last_part,
    loading_code,
    serving_text,
)
from app.tracking.record import RunRecord, main_scores
from app.tracking.run_folder import RunFolder
from app.utils.class_paths import bare_name
from app.utils.files import atomic_write, read_json, read_yaml

CARD_FILE = "README.md"
ADAPTER_CONFIG = "adapter_config.json"
SEQ2SEQ = "SEQ_2_SEQ_LM"
MOMENTS = {
    "zero_shot": "untouched",
    "after_init": "after the initialization",
    "final": "final",
    "test": "test",
}
PAPERS = {
    "LORA": "LoRA: Hu et al., ICLR 2022, arXiv:2106.09685",
    "ADALORA": "AdaLoRA: Zhang et al., ICLR 2023, arXiv:2303.10512",
    "use_rslora": "rsLoRA: Kalajdzievski, 2023, arXiv:2312.03732",
    "use_dora": "DoRA: Liu et al., ICML 2024, arXiv:2402.09353",
    "LoraGaInit": "LoRA-GA: Wang, Yu and Li, NeurIPS 2024, arXiv:2407.05000",
    "PissaInit": "PiSSA: Meng, Wang and Zhang, NeurIPS 2024, arXiv:2404.02948",
    "OloraInit": "OLoRA: Büyükakyüz, 2024, arXiv:2406.01775",
    "LoramInit": "LoRAM: Zhang et al., NeurIPS 2025, arXiv:2507.06558",
    "LoraSbInit": "LoRA-SB: Ponkshe et al., 2024, arXiv:2411.19557",
    "PreconditionedAdamW": "preconditioned LoRA: Zhang and Pilanci, ICML 2024, arXiv:2402.02347",
    "LoraPlusAdamW": "LoRA+: Hayou, Ghosh and Yu, ICML 2024, arXiv:2402.12354",
    "LoraProAdamW": "LoRA-Pro: Wang et al., ICLR 2025, arXiv:2407.18242",
    "RefLoraAdamW": "RefLoRA: Zhang, Li and Giannakis, NeurIPS 2025, arXiv:2505.18877",
}
"""By what a method consists of: kind and switches of the adapter, initialization, optimizer."""
LORA_ONE = "LoRA-One: Zhang, Liu and Chen, ICML 2025, arXiv:2502.01235"


def write_run_card(run: RunFolder, folder: Path) -> None:
    """Write the card of what a finished run has trained into `folder`, from the files of the run."""
    config = read_yaml(run.config, "--run")
    # An export may have changed the kind of adapter.
    adapter = read_json(folder / ADAPTER_CONFIG) or read_json(run.adapter / ADAPTER_CONFIG)
    write_card(folder, RunRecord.read(run.summary), config, adapter)


def write_card(
    folder: Path,
    record: RunRecord,
    config: Mapping[str, Any],
    adapter: Mapping[str, Any] | None,
) -> None:
    """Write `README.md` in the form of the Hub's model cards.

    Args:
        folder: Has an adapter in PEFT's layout, or a whole model.
        record: Facts of the run; without optimizer steps, the adapter is one to begin training with.
        config: The resolved configuration of `fit`.
        adapter: PEFT's configuration of the adapter, also where it has been merged into the model; None where
            all weights were trained.
    """
    model = read_json(folder / "config.json")  # of a whole model alone
    whole = model is not None
    base, is_initial = BaseName.of(record.model), not record.train.steps
    encodes = (model or {}).get("is_encoder_decoder") or (adapter or {}).get("task_type") == SEQ2SEQ
    dtype = (model or {}).get("dtype")
    method = record.method.replace("_", "-")
    kind = None if adapter is None else adapter_kind(adapter)
    front_matter = ModelCardData(
        base_model=base.hub_id,
        library_name="transformers" if whole else "peft",
        pipeline_tag=None if encodes else "text-generation",
        tags=list(dict.fromkeys([*([kind.lower()] if kind else []), method])),
        datasets=_hub_data(config, record),
    )
    environment = Environment(  # Markdown, not HTML
        loader=FileSystemLoader(Path(__file__).parent),
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    text = environment.get_template("model_card.md.j2").render(
        front_matter=front_matter.to_yaml(),
        title=f"{base.title} with {method}",
        summary=_summary(kind, whole, is_initial, base),
        facts=_table(("", ""), _facts(record, config, adapter, base, dtype)),
        scores=_score_table(record),
        base="" if whole or base.hub_id else base.text,
        loading=loading_code(base, whole, encodes, config["model"]["dtype"], is_initial),
        is_initial=is_initial,
        serving=serving_text(base, whole, encodes, adapter),
        papers=_papers(config, adapter),
    )
    with atomic_write(folder / CARD_FILE) as stream:
        stream.write(text.encode())


def _summary(kind: str | None, whole: bool, is_initial: bool, base: BaseName) -> str:
    if kind is None:
        what = f"{base.title} with all weights trained"
    elif whole:
        what = f"{base.title} with a trained {kind} adapter merged into its weights"
    elif is_initial:
        what = f"A {kind} adapter for {base.title} to begin training with: initialized, not trained"
    else:
        what = f"A {kind} adapter for {base.title}"
    return f"{what}. Made by LoRA-One on PyTorch Lightning."


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """Return the lines of a Markdown table."""
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in lines]


def _facts(
    record: RunRecord,
    config: Mapping[str, Any],
    adapter: Mapping[str, Any] | None,
    base: BaseName,
    dtype: str | None,
) -> Iterator[tuple[str, str]]:
    model, trainer, train = config["model"], config["trainer"], record.train
    quantized = f", quantised to {base.quantization} by bitsandbytes while it was loaded"
    yield "base model", base.text + quantized * bool(base.quantization)
    if dtype is not None:
        values = f" into the values of {base.quantization}" * bool(base.quantization)
        merged = f"{dtype}, rounded to it after the merge{values}"
        yield "weights", dtype if adapter is None else merged
    yield "method", f"`{record.method}`"
    if adapter is not None:
        yield "adapter", _adapter_text(adapter)
        yield "initialization", _init_text(config, record)
    yield "optimizer", _class_text(model["optimizer"])
    if train.steps:
        yield (
            "learning rate",
            f"{model['lr_scheduler_type']}, warmup_steps {model['warmup_steps']}",
        )
    done = f"{train.steps} optimizer steps, {train.samples} examples" if train.steps else "none"
    yield "training", done
    yield "seed", str(record.seed)
    precision = trainer.get("precision") or "32-true"
    weights = f"{'trained on ' if train.steps else ''}weights in {model['dtype']}"
    yield "precision", f"{weights}, `trainer.precision` {precision}"
    rows = ", ".join(f"{count} {split}" for split, count in record.data.rows.items() if count)
    yield "data", f"`{record.data.name}`: {rows} rows of {_data_source(config, record)}"


def _adapter_text(adapter: Mapping[str, Any]) -> str:
    modules, parameters = adapter["target_modules"] or [], adapter.get("target_parameters") or []
    named = [modules] if isinstance(modules, str) else {name.rpartition(".")[2] for name in modules}
    targets = ", ".join([*sorted(named), *sorted({name.rpartition(".")[2] for name in parameters})])
    if adapter["peft_type"] == "ADALORA":
        return f"AdaLoRA pruned to rank {adapter['target_r']} on average, on {targets}"
    rank, alpha = adapter["r"], adapter["lora_alpha"]
    scaling = alpha / (math.sqrt(rank) if adapter["use_rslora"] else rank)
    patterns = [name for name in ("rank_pattern", "alpha_pattern") if adapter.get(name)]
    others = f" ({' and '.join(patterns)}: other layers have others)" if patterns else ""
    return f"{adapter_kind(adapter)} of rank {rank}, scaling {scaling:.6g}{others}, on {targets}"


def _init_text(config: Mapping[str, Any], record: RunRecord) -> str:
    if config.get("init") is None:
        trained = config["model"].get("adapter_path") is not None
        return "that of an earlier adapter" if trained else "PEFT's own"
    text = _class_text(config["init"])
    loss, gamma = (getattr(record.init, name, None) for name in ("loss", "gamma"))
    if gamma is not None and config["init"].get("init_args", {}).get("gamma") == "auto":
        text += f"; gamma found: {gamma:g}"
    if loss is not None:
        text += f"; loss of the untouched model on its samples {loss:.4f}"
    return text


def _class_text(section: Mapping[str, Any]) -> str:
    """Return a class and its settings, those of sections in it by dotted names."""

    def flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
        for name, value in settings.items():
            if isinstance(value, Mapping):
                yield from flat(value, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name} {value}"

    return f"{bare_name(section['class_path'])} ({', '.join(flat(section.get('init_args', {})))})"


def _data_path(config: Mapping[str, Any]) -> str | None:
    path = config["data"].get("init_args", {}).get("path")
    return None if path is None else str(path)


def _data_source(config: Mapping[str, Any], record: RunRecord) -> str:
    path = _data_path(config)
    return f"`{getattr(record.data, 'source', '') if path is None else last_part(path)}`"


def _hub_data(config: Mapping[str, Any], record: RunRecord) -> list[str] | None:
    source = str(getattr(record.data, "source", ""))
    on_hub = _data_path(config) is None and re.fullmatch(r"[\w.-]+/[\w.-]+", source)
    return [source] if on_hub else None


def _score_table(record: RunRecord) -> list[str]:
    names = main_scores(record.metrics.values())
    rows = (
        [MOMENTS.get(moment, moment), *(_number(scores.get(name)) for name in names)]
        for moment, scores in record.metrics.items()
    )
    return _table(("", *names), rows) if names else []


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _papers(config: Mapping[str, Any], adapter: Mapping[str, Any] | None) -> list[str]:
    model, init = config["model"], config.get("init")
    parts = [bare_name(model["optimizer"]["class_path"])]
    if init is not None:
        parts.insert(0, bare_name(init["class_path"]))
    if adapter is not None:
        settings = model.get("adapter") or {}
        switches = [name for name in ("use_rslora", "use_dora") if settings.get(name)]
        # AdaLoRA may have been exported as LoRA.
        kind = "ADALORA" if settings.get("adalora") else adapter["peft_type"]
        parts = [kind, *(switches if kind == "LORA" else ()), *parts]
    return [LORA_ONE, *(PAPERS[part] for part in parts if part in PAPERS)]
