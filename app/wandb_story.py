"""What Weights & Biases is told when a run ends: sortable numbers, charts, pictures, the adapter."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.loggers import WandbLogger

from app.compare.cells import rate_text
from app.run_record import RunRecord

SPECTRUM_TABLE = "init/spectrum"
SPECTRA_CHART = "init/spectra"


def cell_of(settings: Mapping[str, Any], task: str | None) -> str:
    """Name what only the runs share that differ in their seed alone: W&B can group by one key.

    Args:
        settings: The run's configuration.
        task: Name of the task.

    Returns:
        W&B group, method and learning rate, such as `glue/sst2: lora_one, lr 1e-3`.
    """
    model = settings["model"]
    rate = model["optimizer"].get("init_args", {}).get("lr")
    method: str = model["method"]
    cell = method if rate is None else f"{method}, lr {rate_text(rate)}"
    group = settings["output"]["wandb_group"] or task
    return cell if group is None else f"{group}: {cell}"


def tell_wandb(
    logger: WandbLogger, record: RunRecord, plots: Sequence[Path], adapter: Path | None
) -> None:
    """Tell W&B, online or offline, all that the run folder has.

    Args:
        logger: The run's.
        record: The finished run.
        plots: PNG files.
        adapter: Folder of the exported adapter, which becomes an artifact; None without one.
    """
    logger.experiment.summary.update(summary_of(record))
    layers = record.init.get("layers", {})
    if layers:
        rows = [
            [name, i + 1, value, values["captured_energy"]]
            for name, values in layers.items()
            for i, value in enumerate(values["singular_values"])
        ]
        columns = ["layer", "index", "singular_value", "captured_energy"]
        logger.log_table(SPECTRUM_TABLE, columns=columns, data=rows)
        logger.experiment.log({SPECTRA_CHART: _spectra(layers)})
    for plot in plots:
        logger.log_image(f"plots/{plot.stem}", [str(plot)])
    if adapter is not None:
        _keep_adapter(logger, record, adapter)


def summary_of(record: RunRecord) -> dict[str, Any]:
    """Return one number or word for each column by which the table of runs can be sorted."""
    told: dict[str, Any] = {
        "method": record.method,
        "task": record.data.get("name"),
        "seed": record.seed,
        "parameters": record.model.get("parameters"),
        "trainable_parameters": record.model.get("trainable_parameters"),
    }
    for moment, scores in record.metrics.items():
        told |= {f"{moment}/{name}": value for name, value in scores.items()}
    for section, values in (("train", record.train), ("init", record.init)):
        told |= {
            f"{section}/{name}": value
            for name, value in values.items()
            if isinstance(value, int | float)
        }
    if "captured_energy" in record.init:
        told["init/captured_energy"] = record.init["captured_energy"]["mean"]
    return {name: value for name, value in told.items() if value is not None}


def _spectra(layers: Mapping[str, Mapping[str, Any]]) -> Any:
    """Return W&B's own line chart of the spectra: the median of each kind of layer."""
    import wandb  # slow, and of no use to a run without it

    kinds: dict[str, list[list[float]]] = defaultdict(list)
    for name, values in layers.items():
        if values["singular_values"][0] > 0:
            kinds[name.rpartition(".")[2]].append(values["singular_values"])
    length = min(len(row) for rows in kinds.values() for row in rows)
    medians = {
        kind: np.median([np.array(row[:length]) / row[0] for row in rows], axis=0)
        for kind, rows in kinds.items()
    }
    return wandb.plot.line_series(
        xs=list(range(1, length + 1)),
        ys=[median.tolist() for median in medians.values()],
        keys=list(medians),
        title="Singular values of the one-step gradient over the first",
        xname="i",
    )


def _keep_adapter(logger: WandbLogger, record: RunRecord, folder: Path) -> None:
    """Make the adapter an artifact that names its base model; online that is its input, too."""
    import wandb  # slow, and of no use to a run without it

    run = logger.experiment
    base = {name: record.model[name] for name in ("name", "fingerprint")}
    about = {"base": base, "method": record.method, "seed": record.seed, "scores": record.metrics}
    adapter = wandb.Artifact(f"adapter-{run.id}", type="adapter", metadata=about)
    adapter.add_dir(str(folder))
    if not run.offline:  # W&B knows no inputs of a run that it has not heard of
        source = wandb.Artifact(f"base-{base['fingerprint'][:16]}", type="model", metadata=base)
        run.use_artifact(source)
    run.log_artifact(adapter)
