"""Log to Weights & Biases what a run ends with: sortable numbers, charts, pictures, the adapter."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from app.tracking.loggers import OutputSettings
from app.tracking.plots import Layers, median_spectra
from app.tracking.record import RunRecord
from app.tracking.run_folder import RunFolder
from app.tracking.wandb_logger import wandb_mode
from app.utils.files import write_json
from app.utils.text import rate_text

Tables = Mapping[str, tuple[list[str], list[list[Any]]]]
"""The columns and rows of each table by its name."""


def cell_of(settings: Mapping[str, Any], task: str | None) -> str:
    """Name what only the runs share that differ in their seed alone: W&B can group by one key.

    Returns:
        W&B group, method, rank and learning rate, such as `glue/sst2: lora_one, r 8, lr 1e-3`.
    """
    model = settings["model"]
    rank = (model.get("adapter") or {}).get("r")
    rate = model["optimizer"].get("init_args", {}).get("lr")
    parts = [model["method"]]
    parts += [] if rank is None else [f"r {rank}"]
    parts += [] if rate is None else [f"lr {rate_text(rate)}"]
    cell = ", ".join(parts)
    group = settings["output"]["wandb_group"] or task
    return cell if group is None else f"{group}: {cell}"


def log_run_summary(
    logger: WandbLogger, record: RunRecord, plots: Sequence[Path], adapter: Path | None
) -> None:
    """Log all that the folder of a finished run has.

    Args:
        logger: The run's.
        record: The run's.
        plots: PNG files.
        adapter: Folder of the adapter, which becomes an artifact; None without one.
    """
    logger.experiment.summary.update(summary_of(record))
    layers = record.init.layers
    if layers:
        columns, rows = spectrum_table(layers)
        logger.log_table("init/spectrum", columns=columns, data=rows)
    if medians := {kind: median for kind, (_, median, _) in median_spectra(layers).items()}:
        title = "Singular values of the one-step gradient over the first"
        spectra = {kind: dict(enumerate(median, 1)) for kind, median in medians.items()}
        logger.experiment.log({"init/spectra": line_chart(spectra, title, "i")})
    log_plots(logger, plots)
    if adapter is not None:
        _log_adapter(logger, record, adapter)


def spectrum_table(layers: Layers) -> tuple[list[str], list[list[Any]]]:
    """Return columns and rows of the singular values of each layer's one-step gradient."""
    rows = [
        [name, i + 1, value, values["captured_energy"]]
        for name, values in layers.items()
        for i, value in enumerate(values["singular_values"])
    ]
    return ["layer", "index", "singular_value", "captured_energy"], rows


def log_plots(logger: WandbLogger, plots: Sequence[Path]) -> None:
    """Log PNG files as images of their name."""
    for plot in plots:
        logger.log_image(f"plots/{plot.stem}", [str(plot)])


def log_answers(logger: WandbLogger, tables: Tables) -> None:
    """Log tables of answers beside their references."""
    for name, (columns, rows) in tables.items():
        logger.log_table(f"answers/{name}", columns=columns, data=rows)


def line_chart(lines: Mapping[str, Mapping[int, float]], title: str, xname: str) -> Any:
    """Return W&B's own line chart of values over x, by label."""
    import wandb  # slow, and of no use to a run without it

    xs = [list(line) for line in lines.values()]
    ys = [[float(y) for y in line.values()] for line in lines.values()]
    return wandb.plot.line_series(xs=xs, ys=ys, keys=list(lines), title=title, xname=xname)


def keep_wandb_run(logger: WandbLogger, folder: RunFolder) -> None:
    """Write into the run folder which W&B run it is, with what W&B was given of its settings."""
    run = logger.experiment
    about = {
        name: getattr(run, name) or None for name in ("entity", "project", "id", "name", "group")
    }
    write_json(folder.wandb, {**about, "tags": list(run.tags or ()), "config": dict(run.config)})


def log_test_scores(folder: RunFolder, settings: OutputSettings, tables: Tables) -> None:
    """Add a test's scores to the summary of the W&B run that has trained what was tested.

    The history stays as it is. A W&B that cannot be reached is a warning: the scores are in the folder.

    Args:
        folder: The run folder, with the scores in its summary. Nothing is logged if its training was not.
        settings: Whether W&B is used, and how.
        tables: Answers beside their references.
    """
    if settings.wandb == "disabled" or not folder.wandb.is_file():
        return
    import wandb  # slow, and of no use to a run without it

    try:
        record, mode = RunRecord.read(folder.summary), wandb_mode(settings.wandb)
        if mode == "disabled":
            return
        with wandb.init(
            # All of it once more: nothing is lost if `wandb sync` takes this part for the whole run.
            **json.loads(folder.wandb.read_text()),
            dir=str(folder),
            mode=mode,
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
            for name, (columns, rows) in tables.items():
                run.summary[f"answers/{name}"] = wandb.Table([*columns], rows)
    except Exception as error:  # of the network, of the key, of the server: all in their own words
        rank_zero_warn(
            f"the scores of this test did not reach the W&B run of {folder} ({error}); they are in "
            f"{folder.summary}. --output.wandb disabled keeps a test from W&B"
        )


def summary_of(record: RunRecord) -> dict[str, Any]:
    """Return one number or word for each column by which the table of runs can be sorted."""
    columns: dict[str, Any] = {
        "method": record.method,
        "task": record.data.name,
        "seed": record.seed,
        "parameters": record.model.parameters,
        "trainable_parameters": record.model.trainable_parameters,
    }
    for moment, scores in record.metrics.items():
        columns |= {f"{moment}/{name}": value for name, value in scores.items()}
    for section, values in (("train", record.train), ("init", record.init)):
        columns |= {
            f"{section}/{name}": value
            for name, value in values.model_dump(exclude_unset=True).items()
            if isinstance(value, int | float)
        }
    if record.init.captured_energy:
        columns["init/captured_energy"] = record.init.captured_energy["mean"]
    return {name: value for name, value in columns.items() if value is not None}


def _log_adapter(logger: WandbLogger, record: RunRecord, folder: Path) -> None:
    """Make the adapter an artifact that names its base model; online that is its input, too."""
    import wandb  # slow, and of no use to a run without it

    run = logger.experiment
    base = {"name": record.model.name, "fingerprint": record.model.fingerprint}
    about = {"base": base, "method": record.method, "seed": record.seed, "scores": record.metrics}
    adapter = wandb.Artifact(f"adapter-{run.id}", type="adapter", metadata=about)
    adapter.add_dir(str(folder))
    if not run.offline:  # an offline run cannot name its inputs
        name = f"base-{str(record.model.fingerprint)[:16]}"
        run.use_artifact(wandb.Artifact(name, type="model", metadata=base))
    run.log_artifact(adapter)
