"""Features of Lightning work with an adapter, or are refused in one line before the weights are loaded."""

import importlib
from types import SimpleNamespace

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateMonitor,
    ModelCheckpoint,
)
from lightning.pytorch.strategies import ModelParallelStrategy

from app.training.lightning_internals import total_steps
from app.training.trainer_checks import (
    KNOWN,
    REFUSED,
    check_callbacks,
    check_monitors,
    check_strategy,
    check_trainer_settings,
)
from app.utils.errors import InputError
from callbacks.adalora_pruning import AdaLoraPruning
from tests.support.paths import ROOT
from tests.support.run_folders import same_weights, summary, table

FILES = sorted((ROOT / "callbacks").glob("[a-z]*.py"))
EARLY_STOPPING = "--trainer.callbacks=EarlyStopping", "--trainer.callbacks.monitor={}"


@pytest.fixture
def told_early(error_of, tiny_run, tmp_path, monkeypatch):
    """Return `told_early(*options)`: the error of a fit that loads no weights and leaves no folder."""
    monkeypatch.setattr("app.training.model_building.load_model", None)

    def run(*options):
        told = error_of("fit", "--config", tiny_run, *options)
        assert not list(tmp_path.glob("runs/tiny/*"))
        return told

    return run


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--trainer.callbacks=LearningRateFinder"],
            "has LearningRateFinder, which trains before the adapter is initialized: compare learning",
        ),
        (
            ["--trainer.val_check_interval=6"],
            "val_check_interval is 6, but an epoch has 5 training batches: set trainer.check_val_every_n_epoch",
        ),
        (
            ["--trainer.limit_train_batches=0.1"],
            "limit_train_batches (or trainer.overfit_batches) is 0.1, which is less than one of 5 batches: set "
            "a whole number, or at least 0.2",
        ),
        (
            ["--trainer.limit_val_batches=0.1"],
            "is 0.1, which is less than one of 3 batches: set a whole number, or at least 0.333",
        ),
        (
            [text.format("val/acuracy") for text in EARLY_STOPPING],
            "EarlyStopping.monitor is 'val/acuracy', which nothing logs; did you mean val/accuracy? There are "
            "train/loss, train/seconds, val/loss, val/accuracy, val/f1, val/mcc, val/task_loss",
        ),
        (
            ["--trainer.strategy=ddp_spawn", "--trainer.devices=2"],
            "starts processes from within Python (DDPStrategy with spawn or fork)",
        ),
        (["--trainer.devices=-1"], "`devices` selected with `CPUAccelerator` should be an int > 0"),
    ],
)
def test_what_cannot_work_is_told_early(options, message, told_early):
    assert message in told_early(*options)


def test_a_class_that_needs_another_package_names_it(told_early, tmp_path):
    """Also as one of a list, of which the parser tries other types."""
    file = tmp_path / "loggers.yaml"
    csv = f"{{class_path: CSVLogger, init_args: {{save_dir: {tmp_path}}}}}"
    for text in ("{class_path: CometLogger}", f"[{csv}, {{class_path: CometLogger}}]"):
        file.write_text(f"trainer: {{logger: {text}}}\n")
        told = told_early("--config", file)
        assert told.startswith(
            "lightning.pytorch.loggers.CometLogger cannot be made, which may need"
        )
        assert "Requirement 'comet-ml" in told
    mode = ("--trainer.callbacks=EarlyStopping", "--trainer.callbacks.mode=mni")
    told = told_early(*mode, "--trainer.callbacks.monitor=val/loss")
    assert "callbacks.EarlyStopping cannot be made: `mode` can be min, max, got mni" in told


@pytest.mark.parametrize("kind", REFUSED, ids=lambda kind: kind.__name__)
def test_callbacks_that_are_refused(kind):
    """Also where a user's class is one of them."""
    own = type("Own", (kind,), {"__init__": lambda self: None})()
    with pytest.raises(InputError, match=r"^trainer\.callbacks has Own, which "):
        check_callbacks([own], accumulates=False)


def test_two_ways_to_accumulate():
    scheduler = GradientAccumulationScheduler({0: 2})
    check_callbacks([scheduler], accumulates=False)
    with pytest.raises(InputError, match="is set, too: leave one of them out"):
        check_callbacks([scheduler], accumulates=True)


SETTINGS = {
    "strategy": "auto",
    "use_distributed_sampler": False,
    "barebones": None,
    "accumulate_grad_batches": 1,
    "log_every_n_steps": 0,
}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"use_distributed_sampler": True}, "use_distributed_sampler is true, but the data module"),
        ({"barebones": True}, "barebones is true, which turns off what a run folder is made of"),
        ({"accumulate_grad_batches": 0}, "accumulate_grad_batches must be at least 1, got 0"),
        ({"log_every_n_steps": -1}, "log_every_n_steps must be at least 0, got -1"),
    ],
)
def test_settings_that_are_refused(changed, message):
    check_trainer_settings(SETTINGS, "test")
    with pytest.raises(InputError, match=message):
        check_trainer_settings({**SETTINGS, **changed}, "test")


def test_other_strategies():
    strategy = ModelParallelStrategy()
    with pytest.raises(InputError, match="is ModelParallelStrategy: expected auto, ddp, --config"):
        check_strategy(SimpleNamespace(strategy=strategy))


class Silent(Callback):
    """A callback of a user's own, which might log anything."""


def test_the_known_callbacks_are_those_of_the_project():
    """Each with a Callback of that name; base classes and what `init` alone has are left out."""
    made = set()
    for module in map(importlib.import_module, [f"callbacks.{p.stem}" for p in FILES]):
        kinds = [kind for kind in vars(module).values() if isinstance(kind, type)]
        own = [kind for kind in kinds if kind.__module__ == module.__name__]
        made |= {f"{k.__module__}.{k.__name__}" for k in own if issubclass(k, Callback)}
    bases = {f"callbacks.initialization.{kind}Init" for kind in ("Adapter", "Weight", "Gradient")}
    assert made - bases - {"callbacks.write_init.WriteInit"} == KNOWN


@pytest.mark.parametrize(
    ("callbacks", "ok"),
    [
        ([EarlyStopping("val/loss"), ModelCheckpoint(monitor="train/loss")], True),
        ([ModelCheckpoint(monitor="step"), ModelCheckpoint()], True),
        ([EarlyStopping("val/los")], False),
        ([EarlyStopping("val/los", strict=False)], True),
        ([EarlyStopping("lr-AdamW"), LearningRateMonitor()], True),
        ([EarlyStopping("lr-AdamW")], False),
        ([EarlyStopping("val/los"), Silent()], True),
        ([EarlyStopping("val/los"), AdaLoraPruning()], False),
    ],
)
def test_monitors(callbacks, ok):
    trainer = SimpleNamespace(callbacks=callbacks)
    if ok:
        check_monitors(trainer, ["train/loss", "val/loss"])
    else:
        with pytest.raises(InputError, match="There are train/loss, val/loss"):
            check_monitors(trainer, ["train/loss", "val/loss"])


def test_a_callback_that_a_user_has_put_beside_those_of_the_project(monkeypatch):
    monkeypatch.setattr(Silent, "__module__", "callbacks.silent")
    check_monitors(SimpleNamespace(callbacks=[EarlyStopping("val/los"), Silent()]), ["val/loss"])


def test_a_metric_that_is_missing_in_the_first_validation_ends_a_run_that_is_saved(
    error_of, tiny_run, tmp_path
):
    file = tmp_path / "callbacks.yaml"
    silent = f"{{class_path: {__name__}.Silent}}"
    stopping = "{class_path: EarlyStopping, init_args: {monitor: val/bleu}}"
    file.write_text(f"trainer: {{val_check_interval: 2, callbacks: [{silent}, {stopping}]}}\n")
    told = error_of("fit", "--config", tiny_run, "--config", file)
    assert "conditioned on metric `val/bleu` which is not available" in told
    assert "`train/loss`, `train/seconds`, `val/loss`" in told
    [checkpoint] = tmp_path.glob("runs/tiny/version_0/checkpoints/*")
    assert checkpoint.name.endswith("step=2.ckpt")


@pytest.mark.parametrize(
    ("scheduling", "epochs", "max_steps", "steps"),
    [
        ({0: 1}, 3, -1, 15),
        ({0: 2}, 3, -1, 3 + 3 + 3),
        ({1: 2, 2: 5}, 4, -1, 5 + 3 + 1 + 1),
        ({1: 2, 2: 5}, 4, 7, 7),
        ({0: 2}, -1, 20, 20),
    ],
)
def test_steps_of_a_schedule_of_accumulation(scheduling, epochs, max_steps, steps):
    """Five batches an epoch; the last ones of an epoch make a step of their own."""
    trainer = SimpleNamespace(
        callbacks=[GradientAccumulationScheduler(scheduling)],
        estimated_stepping_batches=max_steps if epochs == -1 else 5 * epochs,
        num_training_batches=5,
        max_epochs=epochs,
        max_steps=max_steps,
    )
    assert total_steps(trainer) == steps


ACCUMULATED = "--trainer.max_epochs=2", "--trainer.max_steps=-1", "--model.lr_scheduler_type=linear"


@pytest.mark.slow
def test_features_of_lightning_beside_each_other(fit, tmp_path):
    """Those that only look on change nothing; the scheduler accumulates as the trainer's own setting does."""
    plain = fit(*ACCUMULATED, "--trainer.accumulate_grad_batches=2")
    file = tmp_path / "callbacks.yaml"
    file.write_text(
        f"""
trainer:
  callbacks:
  - {{class_path: GradientAccumulationScheduler, init_args: {{scheduling: {{0: 2}}}}}}
  - {{class_path: Timer, init_args: {{duration: "00:01:00:00"}}}}
  - {{class_path: RichProgressBar}}
  - {{class_path: LearningRateMonitor}}
  - {{class_path: DeviceStatsMonitor}}
  - {{class_path: RichModelSummary}}
  - {{class_path: EarlyStopping, init_args: {{monitor: val/accuracy, mode: max, patience: 9}}}}
  logger: {{class_path: CSVLogger, init_args: {{save_dir: {tmp_path / "own"}}}}}
  log_every_n_steps: 0
  num_sanity_val_steps: 1
  min_steps: 1
  min_epochs: 1
  profiler: simple
  detect_anomaly: true
  inference_mode: false
  reload_dataloaders_every_n_epochs: 1
"""
    )
    folder = fit(*ACCUMULATED, "--config", file)
    assert same_weights(folder, plain)
    assert summary(folder)["metrics"]["final"] == summary(plain)["metrics"]["final"]
    assert "val/accuracy" in table(folder)[0]
    assert list(tmp_path.glob("own/lightning_logs/version_0/metrics.csv"))
