"""Which settings a run that goes on may change, which ones its checkpoint overrules, and which are refused."""

import copy
import warnings
from pathlib import Path

import pytest
from lightning.pytorch import Trainer

from app.training.resume import ResumePoint
from app.training.resume_checks import (
    ADAPTER,
    PRECISIONS,
    TRAINING,
    check_rows,
    check_rows_per_step,
    check_settings,
    rows_digest,
)
from app.utils.errors import InputError
from data_modules.rows import TextRow

SETTINGS = {
    "seed_everything": 0,
    "trainer": {
        "max_steps": 4,
        "accumulate_grad_batches": 2,
        "callbacks": None,
        **dict.fromkeys(("precision", "gradient_clip_val", "gradient_clip_algorithm")),
        "limit_train_batches": None,
        "overfit_batches": 0.0,
    },
    "model": {
        "adapter_path": "there",
        "name": "a/b",
        "dtype": "float32",
        "adapter": {"lora_alpha": 8.0, "lora_dropout": 0.0, "adalora": None, "rank_pattern": {}},
        "optimizer": {
            "class_path": "app.optim.lora_plus.LoraPlusAdamW",
            "init_args": {"lr": 1e-3, "lr_ratio": 4.0},
        },
        "lr_scheduler_type": "linear",
    },
    "data": {
        "class_path": "GlueDataModule",
        "init_args": {"path": "here", "batch_size": 4, "max_length": 128, "num_workers": 0},
    },
    "init": {"class_path": "LoraOneInit", "init_args": {"gamma": 128.0, "micro_batch_size": 8}},
    "output": {"name": "x"},
}


def point(**values):
    """Return the resume point of a run with `SETTINGS`."""
    known = {"settings": SETTINGS, "rows": None, "processes": 2, "restored": frozenset({"lr"})}
    return ResumePoint(Path("x.ckpt"), None, None, **{**known, **values})


def changed(setting, value):
    """Return `SETTINGS` with another value of one."""
    settings = copy.deepcopy(SETTINGS)
    *sections, name = setting.split(".")
    section = settings
    for key in sections:
        section = section[key]
    section[name] = value
    return settings


@pytest.mark.parametrize(
    ("setting", "value", "told"),
    [
        ("model.adapter.lora_alpha", 64.0, "model.adapter.lora_alpha 8.0 (now 64.0)"),
        (
            "model.adapter.adalora",
            {"init_r": 12},
            "model.adapter.adalora null (now {'init_r': 12})",
        ),
        ("model.adapter.rank_pattern", {"k": 4}, "model.adapter.rank_pattern {} (now {'k': 4})"),
        ("model.dtype", "bfloat16", "model.dtype float32 (now bfloat16)"),
        ("model.lr_scheduler_type", "cosine", "model.lr_scheduler_type linear (now cosine)"),
        (
            "model.optimizer.class_path",
            "torch.optim.SGD",
            "model.optimizer LoraPlusAdamW (now torch.optim.SGD)",
        ),
        ("model.optimizer.init_args.lr_ratio", 8.0, "model.optimizer.lr_ratio 4.0 (now 8.0)"),
        ("data.class_path", "own.Rows", "data GlueDataModule (now own.Rows)"),
        ("data.init_args.max_length", 64, "data.max_length 128 (now 64)"),
        ("init", None, "init LoraOneInit (now null)"),
        ("init.init_args.gamma", 64.0, "init.gamma 128.0 (now 64.0)"),
        ("seed_everything", 1, "seed_everything 0 (now 1)"),
        ("trainer.precision", "bf16-mixed", "trainer.precision null (now bf16-mixed)"),
        ("trainer.gradient_clip_val", 1.0, "trainer.gradient_clip_val null (now 1.0)"),
        ("trainer.limit_train_batches", 1, "trainer.limit_train_batches null (now 1)"),  # one batch
        ("trainer.overfit_batches", 1, "trainer.overfit_batches 0.0 (now 1)"),
        ("model.adapter_path", "elsewhere", "model.adapter_path there (now elsewhere)"),
        ("model.adapter_path", None, "model.adapter_path there (now null)"),
    ],
)
def test_what_changes_the_computation_is_refused(setting, value, told):
    with pytest.raises(InputError) as error:
        check_settings(point(), changed(setting, value), TRAINING)
    assert f"of a run with other settings: {told}. Give those of that run" in str(error.value)


def test_all_that_differ_are_named_at_once():
    settings = changed("model.dtype", "float16") | {"seed_everything": 3}
    told = r"model.dtype float32 \(now float16\), seed_everything 0 \(now 3\)"
    with pytest.raises(InputError, match=told):
        check_settings(point(), settings, TRAINING)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("trainer.max_steps", 8),
        ("trainer.callbacks", ["EarlyStopping"]),
        ("output.name", "y"),
        ("model.name", "/models/b"),
        ("data.init_args.path", "there"),
        ("data.init_args.num_workers", 2),
        ("data.init_args.batch_size", 8),  # counted with the processes
        ("data.init_args.of_another_version", 1),
        ("model.adapter_path", Path("there").absolute()),
        ("init.init_args.micro_batch_size", 2),
        # bare names and full paths of the project's classes
        ("model.optimizer.class_path", "LoraPlusAdamW"),
    ],
)
def test_the_rest_may_change(setting, value):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_settings(point(), changed(setting, value), TRAINING)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        *(("precision", each) for each in ("32-true", "32", 32)),
        *(("gradient_clip_val", each) for each in (0, 0.0)),
        ("gradient_clip_algorithm", "norm"),
        ("limit_train_batches", 1.0),
        ("overfit_batches", 0),
    ],
)
def test_values_that_lightning_takes_for_the_same(setting, value):
    check_settings(point(), changed(f"trainer.{setting}", value), TRAINING)


def test_one_batch_is_not_all_of_them():
    with pytest.raises(InputError, match=r"limit_train_batches 1 \(now 1\.0\)"):
        check_settings(
            point(settings=changed("trainer.limit_train_batches", 1)),
            changed("trainer.limit_train_batches", 1.0),
            TRAINING,
        )


@pytest.mark.filterwarnings("ignore:.*AMP with fp16")
@pytest.mark.parametrize(("short", "whole"), [(None, "32-true"), *PRECISIONS.items()])
def test_short_names_of_a_precision_are_those_of_lightning(short, whole):
    made = [
        Trainer(accelerator="cpu", precision=each, logger=False, enable_checkpointing=False)
        for each in (short, whole)
    ]
    assert made[0].precision == made[1].precision


def test_what_the_optimizers_state_brings_back_is_told():
    told = r"holds: model.optimizer.lr 0.001 \(now 1e-05\)"
    with pytest.warns(UserWarning, match=told):
        check_settings(point(), changed("model.optimizer.init_args.lr", 1e-5), TRAINING)


def test_a_checkpoint_that_is_only_scored_must_have_the_adapter_alone():
    check_settings(point(), changed("model.dtype", "bfloat16"), ADAPTER)
    with pytest.raises(InputError, match=r"lora_alpha 8\.0"):
        check_settings(point(), changed("model.adapter.lora_alpha", 4.0), ADAPTER)


@pytest.mark.parametrize("settings", [SETTINGS, None])
def test_rows_of_a_step(settings):
    """Four rows times two batches times two processes."""
    alone = changed("data.init_args.batch_size", 8)
    check_rows_per_step(point(), alone, 1)
    check_rows_per_step(point(settings=settings), SETTINGS, 2)
    message = "checkpoint's run has 16 rows, this one {}"
    with pytest.warns(UserWarning, match=message.format(32)):
        check_rows_per_step(point(settings=settings), SETTINGS, 4)
    with pytest.raises(InputError, match=message.format(32)):
        check_rows_per_step(point(), alone, 2)


def test_other_rows_are_refused():
    rows = [TextRow("a", "b"), TextRow("c", "d\ud800")]
    digest = rows_digest(rows)
    check_rows(point(rows=digest), rows_digest(list(rows)))
    check_rows(point(rows=None), digest)
    for other in (rows[::-1], rows[:1], [TextRow("ab", ""), rows[1]]):
        with pytest.raises(InputError, match="the training rows are not those of the run"):
            check_rows(point(rows=digest), rows_digest(other))
