"""What Weights & Biases is told when a run ends: sortable numbers, charts, pictures, the adapter."""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from app.tracking.loggers import OutputSettings, wandb_mode
from app.tracking.record import RunRecord
from app.tracking.run_folder import RunFolder
from app.utils.files import write_json
from app.utils.text import rate_text

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


def log_run_summary(
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
    layers = record.init.layers
    if layers:
        rows = [
            [name, i + 1, value, values["captured_energy"]]
            for name, values in layers.items()
            for i, value in enumerate(values["singular_values"])
        ]
        columns = ["layer", "index", "singular_value", "captured_energy"]
        logger.log_table(SPECTRUM_TABLE, columns=columns, data=rows)
        chart = _spectra(layers)
        if chart is not None:
            logger.experiment.log({SPECTRA_CHART: chart})
    for plot in plots:
        logger.log_image(f"plots/{plot.stem}", [str(plot)])
    if adapter is not None:
        _keep_adapter(logger, record, adapter)


def keep_wandb_run(logger: WandbLogger, folder: RunFolder) -> None:
    """Write into the run folder which W&B run it is, and what that run has been told of itself."""
    run = logger.experiment
    about = {
        "entity": run.entity or None,
        "project": run.project,
        "id": run.id,
        "name": run.name,
        "group": run.group or None,
        "tags": list(run.tags or ()),
        "config": dict(run.config),
    }
    write_json(folder.wandb, about)


def log_test_scores(folder: RunFolder, settings: OutputSettings) -> None:
    """Add a test's scores to the summary of the W&B run that has trained what was tested.

    The history stays as it is. A W&B that cannot be reached is a warning: the scores are in the folder.

    Args:
        folder: The run folder, with the scores in its summary. Nothing is told if its training was not.
        settings: Whether W&B hears of it, and how.
    """
    if settings.wandb == "disabled" or not folder.wandb.is_file():
        return
    import wandb  # slow, and of no use to a run without it

    try:
        record = RunRecord.read(folder.summary)
        with wandb.init(
            # All of it once more: nothing is lost if `wandb sync` takes this part for the whole run.
            **json.loads(folder.wandb.read_text()),
            dir=str(folder),
            mode=wandb_mode(settings),
            resume="allow",
            reinit="create_new",
            settings=wandb.Settings(
                silent=True,
                console="off",  # the log, the machine and the packages are those of the training
                x_disable_stats=True,
                x_disable_meta=True,
                x_save_requirements=False,
            ),
        ) as run:
            run.summary.update(summary_of(record))
    except Exception as error:  # of the network, of the key, of the server: all in their own words
        rank_zero_warn(
            f"the scores of this test did not reach the W&B run of {folder} ({error}); they are in "
            f"{folder.summary}. --output.wandb disabled keeps a test from W&B"
        )


def summary_of(record: RunRecord) -> dict[str, Any]:
    """Return one number or word for each column by which the table of runs can be sorted."""
    told: dict[str, Any] = {
        "method": record.method,
        "task": record.data.name,
        "seed": record.seed,
        "parameters": record.model.parameters,
        "trainable_parameters": record.model.trainable_parameters,
    }
    for moment, scores in record.metrics.items():
        told |= {f"{moment}/{name}": value for name, value in scores.items()}
    for section, values in (("train", record.train), ("init", record.init)):
        told |= {
            f"{section}/{name}": value
            for name, value in values.to_json().items()
            if isinstance(value, int | float)
        }
    if record.init.captured_energy:
        told["init/captured_energy"] = record.init.captured_energy["mean"]
    return {name: value for name, value in told.items() if value is not None}


def _spectra(layers: Mapping[str, Mapping[str, Any]]) -> Any:
    """Return W&B's own line chart of the spectra: the median of each kind of layer.

    Layers without a gradient have no spectrum to scale; None if that is all of them.
    """
    import wandb  # slow, and of no use to a run without it

    kinds: dict[str, list[list[float]]] = defaultdict(list)
    for name, values in layers.items():
        if values["singular_values"][0] > 0:
            kinds[name.rpartition(".")[2]].append(values["singular_values"])
    if not kinds:
        return None
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
    base = {"name": record.model.name, "fingerprint": record.model.fingerprint}
    about = {"base": base, "method": record.method, "seed": record.seed, "scores": record.metrics}
    adapter = wandb.Artifact(f"adapter-{run.id}", type="adapter", metadata=about)
    adapter.add_dir(str(folder))
    if not run.offline:  # W&B knows no inputs of a run that it has not heard of
        source = wandb.Artifact(
            f"base-{str(record.model.fingerprint)[:16]}", type="model", metadata=base
        )
        run.use_artifact(source)
    run.log_artifact(adapter)
