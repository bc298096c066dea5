"""Every shipped configuration against the real signatures, without running it."""

import pytest
import yaml

from app.tracking.config_files import CONFIGS

THEORY = CONFIGS / "theory"  # another command's, see tests/commands/theory/test_command.py
FILES = sorted(f for f in CONFIGS.rglob("*.yaml") if f.parent != THEORY)
COMPLETE = [file for file in FILES if file.parent == CONFIGS]
BENCHMARKS = [file for file in FILES if file.parent.name == "eval"]
OVERLAYS = [file for file in FILES if file not in COMPLETE + BENCHMARKS]


def name_of(file):
    return str(file.relative_to(CONFIGS))


def test_all_are_here():
    assert len(FILES) == len(COMPLETE) + len(BENCHMARKS) + len(OVERLAYS) == 37
    assert len(COMPLETE) == 12
    assert len(BENCHMARKS) == 5


@pytest.mark.parametrize("file", COMPLETE, ids=name_of)
def test_complete_configs(file, parsed):
    """A complete file runs by itself: nothing is required beside it, and its first line says how."""
    first = file.read_text().splitlines()[0]
    assert first == f"# python train.py fit --config {file.name}"
    config = parsed("--config", file)
    assert config.output.name == file.stem
    assert config.trainer.max_steps > 0 or config.trainer.max_epochs > 0
    assert config.model.method == "lora_one"
    assert config.init.class_path == "callbacks.lora_one_init.LoraOneInit"
    if file.stem.startswith("glue_"):
        assert config.data.init_args.task == file.stem.removeprefix("glue_")


PAPER = [file for file in COMPLETE if file.stem.endswith("_llama2_7b")]


@pytest.mark.parametrize("file", PAPER, ids=name_of)
def test_hyperparameters_of_the_paper(file, parsed):
    """What the authors publish for LLaMA-2-7B, as the options come out."""
    config = parsed("--config", file)
    model, data, start = config.model, config.data.init_args, config.init.init_args
    assert (model.name, model.dtype) == ("meta-llama/Llama-2-7b-hf", "bfloat16")
    assert (model.adapter.r, model.adapter.lora_alpha) == (8, 16)
    assert (model.adapter.use_rslora, model.adapter.target_modules) == (True, "all-linear")
    assert model.optimizer.init_args.lr == 2e-4
    assert model.optimizer.init_args.weight_decay == 0
    assert (model.lr_scheduler_type, model.warmup_steps) == ("linear", 100)
    assert data.batch_size * config.trainer.accumulate_grad_batches == 32
    assert (data.max_length, data.chat_template) == (1024, False)
    assert (start.gamma, start.num_samples) == (128, 8)
    rules = {
        "metamath_llama2_7b": ("Gsm8k", 1, 512, 100_000, 10_000),
        "metamath_full_llama2_7b": ("Gsm8k", 4, 512, None, 1000),
        "code_feedback_llama2_7b": ("HumanEval", 1, 1024, 100_000, 10_000),
        "alpaca_llama2_7b": ("Mmlu", 1, None, None, 1000),
    }
    (asked,) = data.evals
    found = (data.keep_below, data.max_rows, data.validation_size)
    assert (asked.class_path.split(".")[-1], config.trainer.max_epochs, *found) == rules[file.stem]


@pytest.mark.parametrize("name", ["gsm8k_smollm2", "code_alpaca_smollm2"])
def test_rows_come_from_a_file_or_the_hub(name, parsed):
    """Both paths of a small run are options of the command line."""
    config = parsed("--config", name, "--data.path", "a.json", "--data.evals.path", "b.jsonl")
    assert config.data.init_args.path == "a.json"
    (asked,) = config.data.init_args.evals
    assert asked.init_args.path == "b.jsonl"
    assert asked.init_args.validation_size <= 16


@pytest.mark.parametrize("file", BENCHMARKS, ids=name_of)
def test_benchmarks(file, parsed):
    """Each asks one benchmark, in a run that is named after it."""
    assert file.read_text().splitlines()[0].startswith("# Overlay")
    config = parsed("--config", "quickstart.yaml", "--config", file, subcommand="test")
    assert config.data.class_path == "data_modules.benchmark_data.BenchmarkDataModule"
    (asked,) = config.data.init_args.evals
    assert asked.class_path.startswith(f"data_modules.evals.{file.stem}.")
    assert config.output.name == file.stem
    assert config.model.adapter is None


WITHOUT_OVERLAY = {}  # parsed once


@pytest.mark.parametrize("file", OVERLAYS, ids=name_of)
def test_overlays(file, parsed):
    """An overlay changes what it names, and nothing else, in a complete configuration."""
    assert file.read_text().splitlines()[0].startswith("# Overlay")
    if not WITHOUT_OVERLAY:
        WITHOUT_OVERLAY.update(parsed("--config", "glue_sst2.yaml").as_dict())
    before = dict(WITHOUT_OVERLAY)
    after = parsed("--config", "glue_sst2.yaml", "--config", file).as_dict()
    content = yaml.safe_load(file.read_text())
    only = {"strategies": "strategy", "callbacks": "callbacks"}.get(file.parent.name)
    assert set(content) <= ({"model", "init"} if only is None else {"trainer"})
    if only is not None:
        assert [key.removesuffix("+") for key in content["trainer"]] == [only]
        before["trainer"] = {**before["trainer"], only: after["trainer"][only]}
        assert after["trainer"] == before["trainer"]
    for section in set(before) - {"config", *content}:
        assert after[section] == before[section]
    own = content.get("model", {}).get("adapter", {})
    if own is None:
        assert after["model"]["adapter"] is None
    else:
        assert after["model"]["adapter"] == {**before["model"]["adapter"], **own}
    if file.parent.name == "methods":
        assert after["model"]["method"] == file.stem
        assert after["model"]["name"] == before["model"]["name"]


METHODS = [file.stem for file in OVERLAYS if file.parent.name == "methods"]
SWITCHED = (  # what other methods leave, each switch in both positions
    {"use_rslora": False, "use_dora": True},
    {"use_rslora": True, "adalora": {"init_r": 9}},
)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_method_does_not_depend_on_what_came_before(method, parsed, tiny_run, tmp_path):
    """Another method's overlay, or its switches in a file of the user's own."""

    def found(*before):
        files = [tiny_run, *before, f"methods/{method}.yaml"]
        config = parsed(*(f"--config={file}" for file in files)).as_dict()
        return config["model"], config["init"]

    alone = found()
    assert alone[0]["method"] == method
    others = [other for other in ("full", "adalora", "lora") if other != method]
    for other in others[:2]:
        assert found(f"methods/{other}.yaml") == alone, other
    for switches in SWITCHED:
        file = tmp_path / "switched.yaml"
        file.write_text(yaml.safe_dump({"model": {"adapter": switches}}))
        assert found(file) == alone, switches
