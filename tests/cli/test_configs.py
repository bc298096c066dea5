"""Every shipped configuration against the real signatures, without running it."""

import pytest
import yaml

from app.tracking.config_files import CONFIGS

THEORY = CONFIGS / "theory"  # another command's, see tests/commands/theory/test_command.py
FILES = sorted(f for f in CONFIGS.rglob("*.yaml") if f.parent != THEORY)
PAPER_OVERLAY = CONFIGS / "paper.yaml"
COMPLETE = [file for file in FILES if file.parent == CONFIGS and file != PAPER_OVERLAY]
OWN_ROWS = CONFIGS / "eval" / "free_answers.yaml"  # asks the rows of a run's own data
BENCHMARKS = [file for file in FILES if file.parent.name == "eval" and file != OWN_ROWS]
TUNED = ("quickstart", "table")  # with what did best on SST-2, see RESULTS.md
ONE_OF_A_KIND = [PAPER_OVERLAY, OWN_ROWS]
OVERLAYS = [file for file in FILES if file not in [*COMPLETE, *BENCHMARKS, *ONE_OF_A_KIND]]


def name_of(file):
    return str(file.relative_to(CONFIGS))


def test_all_are_here():
    assert len(FILES) == len(COMPLETE) + len(BENCHMARKS) + len(OVERLAYS) + 2 == 50
    assert len(COMPLETE) == 17
    assert len(BENCHMARKS) == 6


@pytest.mark.parametrize("file", COMPLETE, ids=name_of)
def test_complete_configs(file, parsed):
    """A complete file runs by itself: nothing is required beside it, and its first line says how."""
    first = file.read_text().splitlines()[0]
    assert first == f"# python train.py fit --config {file.name}"
    config = parsed("--config", file)
    assert config.output.name == file.stem
    assert config.trainer.max_steps > 0 or config.trainer.max_epochs > 0
    assert config.model.method == ("lora_one_adamw" if file.stem in TUNED else "lora_one")
    assert config.init.class_path == "callbacks.lora_one_init.LoraOneInit"
    if file.stem.startswith("glue_"):
        assert config.data.init_args.task == file.stem.removeprefix("glue_")


COMMONSENSE = CONFIGS / "commonsense_llama2_7b.yaml"
LLAMA2 = [file for file in COMPLETE if file.stem.endswith("_llama2_7b")]
PAPER = [file for file in LLAMA2 if file != COMMONSENSE]


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


def test_hyperparameters_of_the_authors_commonsense_example(parsed):
    """Those of the command line in their README."""
    config = parsed("--config", COMMONSENSE)
    model, data, init = config.model, config.data.init_args, config.init.init_args
    assert (model.name, model.dtype) == ("meta-llama/Llama-2-7b-hf", "bfloat16")
    assert (model.adapter.r, model.adapter.lora_alpha, model.adapter.use_rslora) == (16, 16, True)
    assert model.adapter.lora_dropout == 0.05
    assert model.adapter.target_modules == ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
    assert model.optimizer.init_args.lr == 5e-5
    assert (model.lr_scheduler_type, model.warmup_steps) == ("linear", 100)
    assert data.batch_size * config.trainer.accumulate_grad_batches == 16
    assert (data.max_length, data.validation_size) == (256, 120)
    assert (config.trainer.max_epochs, config.seed_everything) == (3, 42)
    assert (init.gamma, init.num_samples) == (128, 8)


def test_hyperparameters_of_pefts_method_comparison(parsed):
    """Those of default_training_params.json and of experiments/lora/llama-3.2-3B-rank32."""
    config = parsed("--config", "peft_benchmark_llama32_3b")
    model, data, optimizer = config.model, config.data.init_args, config.model.optimizer.init_args
    assert (model.name, model.dtype) == ("meta-llama/Llama-3.2-3B", "bfloat16")
    adapter = model.adapter
    assert (adapter.r, adapter.lora_alpha, adapter.use_rslora) == (32, 64, False)
    assert (adapter.lora_dropout, adapter.target_modules) == (0, ["q_proj", "v_proj"])
    assert (optimizer.lr, optimizer.weight_decay) == (1e-4, 0.1)
    assert (model.lr_scheduler_type, model.warmup_steps) == ("cosine", 0.1)
    assert (config.trainer.max_steps, config.trainer.gradient_clip_val) == (5000, 1)
    assert data.batch_size * config.trainer.accumulate_grad_batches == 4
    assert data.max_rows == 4 * config.trainer.max_steps
    assert (data.max_length, data.prompt, data.completion_only_loss) == (768, "peft", False)
    (asked,) = data.evals
    assert (asked.init_args.prompt, asked.init_args.limit) == ("peft", None)
    lora = parsed("--config", "peft_benchmark_llama32_3b", "--config", "methods/lora.yaml").model
    assert (lora.optimizer.class_path, lora.adapter) == ("torch.optim.AdamW", adapter)


def flat(config, prefix=""):
    found = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        found |= flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return found


@pytest.mark.parametrize("file", COMPLETE, ids=name_of)
def test_the_papers_overlay(file, parsed):
    """It sets the authors' procedure over any run, and leaves the model, the rows and the rate alone."""
    before = flat(parsed("--config", file).as_dict())
    after = flat(parsed("--config", file, "--config", PAPER_OVERLAY).as_dict())
    init, optimizer = "init.init_args", "model.optimizer"
    wanted = {
        "trainer.gradient_clip_val": 1.0,
        "model.method": "lora_one_adamw",
        "model.loss_weighting": "rows",
        f"{optimizer}.class_path": "torch.optim.AdamW",
        f"{optimizer}.init_args.weight_decay": 0.0,
        "data.init_args.length_grouping": False,
        f"{init}.gamma": 128,
        f"{init}.scale": "layer",
        f"{init}.num_samples": 8,
        f"{init}.weighting": "rows",
        f"{init}.samples": "first",
        f"{init}.train_mode": True,
        f"{init}.estimator.kind": "exact",
    }
    assert {name: after[name] for name in wanted} == wanted
    changed = {name for name in before if name in after and before[name] != after[name]}
    assert changed - {"config"} <= set(wanted)
    assert after[f"{optimizer}.init_args.lr"] == before[f"{optimizer}.init_args.lr"]


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


def test_the_overlay_that_asks_a_runs_own_rows(parsed):
    """It adds the benchmark to the run's data, and changes nothing else."""
    before = flat(parsed("--config", "code_alpaca_smollm2.yaml").as_dict())
    after = flat(parsed("--config", "code_alpaca_smollm2.yaml", "--config", OWN_ROWS).as_dict())
    assert {k for k in before if before[k] != after.get(k)} == {"config", "data.init_args.evals"}
    (asked,) = after["data.init_args.evals"]
    assert asked["class_path"] == "data_modules.evals.free_answers.FreeAnswers"


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
