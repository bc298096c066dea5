"""`python train.py dashboard`: a W&B workspace that compares methods, from what every run logs."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from app.commands.compare.settings import RANK, RATE
from app.utils.command_parser import CommandParser
from app.utils.errors import InputError

STEP = "trainer/global_step"


def dashboard_command(arguments: Sequence[str]) -> int:
    """Parse the arguments of `dashboard` and run it."""
    parser = CommandParser("dashboard", "Make a W&B workspace for a project's runs.")
    add = parser.add_argument
    add("--entity", required=True, help="W&B user or team")
    add("--project", default="lora-one", help="W&B project; default lora-one")
    add("--name", default="LoRA-One", help="name of the workspace")
    scores = "accuracy, mcc, gsm8k/strict, humaneval/pass@1"
    add("--score", default="accuracy", help=f"the score to compare, such as {scores}")
    add("--task", help="show the runs of this task or W&B group alone, such as glue/sst2")
    add("--output", type=Path, help="write the specification to this JSON file; no network")
    given = parser.parse_args(arguments)
    made = workspace(given.entity, given.project, given.name, given.score, given.task)
    if given.output is not None:
        # Private: the library has no public way to see a workspace without saving it. A `Workspace.to_json`,
        # or a `save` to a file, would replace it.
        specification = json.loads(made._to_model().model_dump_json(by_alias=True))
        try:
            given.output.write_text(json.dumps(specification, indent=2) + "\n")
        except OSError as error:
            raise InputError(
                f"--output is {str(given.output)!r}, which cannot be written ({error.strerror}): expected a "
                "JSON file in a folder that is there"
            ) from error
        print(f"wrote {given.output}")
        return 0
    try:
        made.save()
    except Exception as error:  # of the network, of the key, of the server: all in their own words
        raise InputError(
            f"the workspace could not be saved to W&B project {given.entity}/{given.project} ({error}): "
            "log in with `wandb login`, check --entity and --project, or give --output FILE to write "
            "its specification"
        ) from error
    print(made.url)
    return 0


def workspace(entity: str, project: str, name: str, score: str, task: str | None = None) -> Any:
    """Describe the workspace: scores, training, initialization, alignment metrics, cost.

    Bars and lines are means over the runs of a cell, which differ in their seed alone. A task is that of the
    runs, or their W&B group.

    Returns:
        A `wandb_workspaces.workspaces.Workspace`, not saved yet.

    Raises:
        InputError: The library cannot look for the task's name.
    """
    if task is not None and not re.fullmatch(r"[^'\\=<>\n]+", task):  # it quotes nothing
        expected = (
            "the name of a task or of a W&B group, such as glue/sst2, without any of ' \\ = < >"
        )
        raise InputError(f"--task is {task!r}: expected {expected}")
    import wandb_workspaces.workspaces as ws  # slow, as pandas and matplotlib below are

    from app.commands.compare.scores import Score

    shown: Any = []
    if task is not None:  # a group of another name is known from the start, the task at the end
        shown = ws.Or(ws.Metric("Group") == task, ws.Summary("task") == task)
    return ws.Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=[
            ws.Section(name=title, panels=panels, is_open=title != "Alignment metrics")
            for title, panels in _panels(score).items()
        ],
        settings=ws.WorkspaceSettings(x_axis=STEP, max_runs=100),
        runset_settings=ws.RunsetSettings(
            filters=shown,
            groupby=[
                *(ws.Metric("Group"), ws.Config("model.method")),
                *(ws.Config(RANK), ws.Config(RATE)),
            ],
            order=[
                ws.Ordering(ws.Summary(f"final/{score}"), ascending=Score(score).less_is_better)
            ],
            pinned_columns=[
                *("summary:method", "summary:task", "summary:seed"),
                *(f"summary:final/{score}", f"summary:test/{score}"),
                "summary:trainable_parameters",
            ],
        ),
    )


def _panels(score: str) -> dict[str, list[Any]]:
    """Return the panels by the title of their section."""
    import wandb_workspaces.reports.v2 as wr

    from app.tracking.alignment_plots import MAPS

    mean: dict[str, Any] = {"groupby_aggfunc": "mean", "groupby_rangefunc": "stddev"}
    mean["groupby"] = wr.Config("cell")

    def lines(title: str, key: str, x: str = STEP, **options: Any) -> Any:
        return wr.LinePlot(title=title, x=x, y=[key], **mean, **options)

    def bars(title: str, key: str) -> Any:
        return wr.BarPlot(title=title, metrics=[wr.SummaryMetric(key)], **mean)

    def images(title: str, keys: Sequence[str]) -> Any:
        return wr.MediaBrowser(title=title, media_keys=list(keys), num_columns=2)

    scores = [
        bars(f"test {score}", f"test/{score}"),
        bars(f"final validation {score}", f"final/{score}"),
        bars(f"{score} after initialization, before training", f"after_init/{score}"),
        wr.ScatterPlot(
            title=f"final validation {score} against the learning rate",
            x=wr.Config(RATE),
            y=wr.SummaryMetric(f"final/{score}"),
            log_x=True,
        ),
        lines(f"validation {score}", f"val/{score}"),
    ]
    if score != "loss":
        scores.append(bars("final validation loss", "final/loss"))
        scores.append(lines("validation loss", "val/loss"))
    return {
        "Scores": scores,
        "Training": [
            lines("training loss against steps", "train/loss", log_y=True),
            lines("training loss against seconds", "train/loss", x="Relative Time", log_y=True),
        ],
        "Initialization": [
            bars("gradient energy that the initialization captures", "init/captured_energy"),
            images("one-step gradient", ["plots/spectrum", "plots/captured_energy"]),
        ],
        "Alignment metrics": [
            *(lines(MAPS[key][0], f"alignment/{key}") for key in MAPS),
            images("over layers and steps", [f"plots/alignment_{key}" for key in MAPS]),
        ],
        "Cost": [
            bars("trainable parameters", "trainable_parameters"),
            bars("seconds of the initialization", "init/seconds"),
            bars("seconds of training", "train/seconds"),
            bars("samples a second", "train/samples_per_second"),
            bars("peak memory of training, bytes", "train/peak_bytes"),
        ],
    }
