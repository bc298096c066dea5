"""Tasks of lm-evaluation-harness on the model in memory: its own numbers, to the last digit."""

import importlib.util
import json

import pytest
import torch
import yaml
from transformers import AutoTokenizer

from app.training.checks import check_sharded_benchmarks
from app.utils.errors import InputError
from data_modules.benchmark_data import BenchmarkDataModule
from data_modules.evals.lm_eval import LmEval
from tests.support.lm_eval_tasks import CHOOSING, NAMES, TASK, TASKS, WRITING, write_tasks
from tests.support.run_folders import losses, summary

needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None,
    reason="lm-evaluation-harness is not installed: pip install -r requirements-lm-eval.txt",
)


@pytest.fixture(autouse=True)
def _no_processes(monkeypatch):
    """Keep the harness's own bootstrap from forking a process that has threads."""
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")


@pytest.fixture(scope="session")
def tasks(tmp_path_factory):
    """Return a folder with two tasks, a group of both, and their data."""
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture
def asking(tasks, run_models, tmp_path):
    """Return `asking(model="llama", **options)`, a configuration that asks both tasks."""

    def write(model="llama", **options):
        given = {"tasks": NAMES, "include_path": str(tasks), **options}
        evals = [{"class_path": "LmEval", "init_args": given}]
        config = {
            "trainer": {"accelerator": "cpu"},
            "model": {"name": str(run_models / model), "adapter": None},
            "data": {"class_path": "BenchmarkDataModule", "init_args": {"evals": evals}},
            "output": {"name": "own", "root": str(tmp_path / "runs"), "wandb": "disabled"},
        }
        file = tmp_path / "own_tasks.yaml"
        file.write_text(yaml.safe_dump(config))
        return file

    return write


def on_its_own(tasks, names, **options):
    """Return what the harness finds by itself, `lm_eval --model hf --model_args ...`."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    arguments = {"dtype": "float32", **options.pop("model_args")}
    own, samples = set(names) <= set(TASKS), options.pop("samples_to", [])
    found = simple_evaluate(
        "hf",
        ",".join(f"{name}={value}" for name, value in arguments.items()),
        tasks=names,
        device="cpu",
        batch_size=options.pop("batch_size", 1),
        task_manager=TaskManager(include_path=str(tasks), include_defaults=not own),
        **options,
    )
    samples.append(found["samples"])
    return {
        f"{task}/{name}": value
        for task, metrics in found["results"].items()
        for name, value in metrics.items()
        if "," in name and not isinstance(value, str)
    }


def asked(folder):
    """Return the entry of a test's results, and its answers."""
    (result,) = json.loads((folder / "benchmarks.json").read_text()).values()
    (file,) = (folder / "answers" / "test").glob("lm_eval-*.jsonl")
    return result, [json.loads(line) for line in file.read_text().splitlines()]


@needs_harness
@pytest.mark.slow
@pytest.mark.parametrize("model", ["llama", "t5"])
def test_scores_are_the_harness_own(model, asking, command, tasks, run_models, tmp_path):
    assert command("test", "--config", asking(model, num_fewshot=2, batch_size=3)) == 0
    given = {"pretrained": run_models / model}
    wanted = on_its_own(tasks, NAMES, model_args=given, num_fewshot=2, batch_size=3)
    result, answers = asked(tmp_path / "runs" / "own")
    assert result["scores"] == wanted
    assert len(wanted) == 12
    assert [row["key"] for row in answers] == NAMES
    samples = answers[0]["samples"]["own_choosing"]
    assert sum(row["acc"] for row in samples) / 11 == wanted["own_choosing/acc,none"]
    assert result["questions"] == 2


@needs_harness
@pytest.mark.slow
def test_a_run_is_asked_while_it_trains_and_afterwards(
    asking, fit, command, tasks, run_models, fitted, tiny_llama, tmp_path
):
    """Of the same rows the final scores are those of the saved adapter, which the harness loads itself."""
    tokenizer = AutoTokenizer.from_pretrained(run_models / "llama")
    # Beside an adapter the harness cuts the embedding to the tokenizer's tokens.
    tiny_llama(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    file = asking(validation_size=7)
    overlay = yaml.safe_load(file.read_text())["data"]["init_args"]
    file.with_name("overlay.yaml").write_text(yaml.safe_dump({"data": {"init_args": overlay}}))
    options = ("--trainer.val_check_interval=1", f"--model.name={tmp_path / 'model'}")
    folder = fit("--config", file.with_name("overlay.yaml"), *options)
    assert losses(folder) == losses(fitted(*options)), "asking changes no random number"
    given = {"pretrained": tmp_path / "model", "peft": folder / "adapter"}
    wanted = on_its_own(tasks, NAMES, model_args=given, limit=7)
    final = summary(folder)["metrics"]["final"]
    logged = {k.removeprefix("lm_eval/"): v for k, v in final.items() if "lm_eval/" in k}
    assert logged == pytest.approx(wanted, rel=1e-6)  # float32
    only = yaml.safe_load(file.read_text())
    only["data"]["init_args"]["evals"][0]["init_args"]["limit"] = 7
    file.write_text(yaml.safe_dump({"data": only["data"]}))
    assert command("test", "--run", folder, "--config", file) == 0
    result, _ = asked(folder)
    assert result["scores"] == wanted


@needs_harness
@pytest.mark.slow
def test_groups_and_names(asking, command, tasks, run_models, tmp_path):
    """A group's own score is there beside its tasks', and all names are known before the model is asked."""
    assert command("test", "--config", asking(tasks=["own"], limit=5)) == 0
    wanted = on_its_own(tasks, ["own"], model_args={"pretrained": run_models / "llama"}, limit=5)
    result, _ = asked(tmp_path / "runs" / "own")
    assert result["scores"] == wanted
    assert wanted["own/acc,none"] == wanted["own_choosing/acc,none"]
    benchmark = LmEval(["own"], include_path=str(tasks))
    assert sorted(benchmark.score_names(benchmark.load())) == sorted(wanted)
    text = TASK.format(name="less", folder=tasks) + WRITING.replace("better: true", "better: false")
    (tmp_path / "less.yaml").write_text(text)
    (benchmark := LmEval(["less"], include_path=str(tmp_path))).load()
    assert benchmark.lower_is_better == {f"less/exact_match,{r}" for r in ("strict", "whole")}


@needs_harness
@pytest.mark.slow
def test_a_finished_task_is_not_asked_again_and_a_changed_one_is(
    asking, command, monkeypatch, tasks, tmp_path
):
    ran = []
    run = LmEval.run
    monkeypatch.setattr(LmEval, "run", lambda *a: ran.append(a[2].key) or run(*a))
    assert command("test", "--config", asking(tasks=NAMES[:1], limit=3)) == 0
    assert command("test", "--config", asking(limit=3)) == 0
    assert ran == NAMES
    assert asked(tmp_path / "runs" / "own")[0]["answered_before"] == 1
    file = tasks / "own_writing.yaml"
    before = file.read_text()
    file.write_text(before.replace("max_gen_toks: 9", "max_gen_toks: 4"))
    try:
        assert command("test", "--config", asking(limit=3)) == 0
    finally:
        file.write_text(before)
    assert ran == [*NAMES, "own_writing"]
    assert command("test", "--config", asking(limit=4)) == 0
    assert ran == [*NAMES, "own_writing", *NAMES]


@needs_harness
@pytest.mark.slow
def test_a_task_with_functions_is_the_same_in_every_process(tasks, tmp_path):
    """Where a function is in memory does not count, what it says does."""
    task = f"{TASK.format(name='own_code', folder=tasks)}{CHOOSING}process_docs: !function own_functions.docs\n"
    (tmp_path / "own_code.yaml").write_text(task)

    def reference(body):
        (tmp_path / "own_functions.py").write_text(f"def docs(rows):\n    return {body}\n")
        (question,) = LmEval(["own_code"], include_path=str(tmp_path)).load()
        return question.reference

    first = reference("rows")
    assert reference("rows") == first
    assert reference("rows.select(range(len(rows)))") != first


@needs_harness
@pytest.mark.smollm2
def test_the_real_model_with_its_chat_template(
    asking, command, tasks, smollm2_dir, smollm2_name, tmp_path
):
    file = asking(limit=3)
    config = yaml.safe_load(file.read_text())
    config["model"]["name"] = smollm2_name
    config["data"]["init_args"]["chat_template"] = True
    file.write_text(yaml.safe_dump(config))
    assert command("test", "--config", file) == 0
    given = {"pretrained": smollm2_dir}
    samples = []
    options = {"limit": 3, "apply_chat_template": True, "samples_to": samples}
    wanted = on_its_own(tasks, NAMES, model_args=given, **options)
    result, answers = asked(tmp_path / "runs" / "own")
    assert result["scores"] == wanted
    likelihoods = [row["filtered_resps"] for row in samples[0]["own_choosing"]]
    found = [row["filtered_resps"] for row in answers[0]["samples"]["own_choosing"]]
    assert found == json.loads(json.dumps(likelihoods))
    plain = "".join(row["arguments"][0][0] for row in samples[0]["own_choosing"])
    assert "<|im_start|>user" in plain


@needs_harness
@pytest.mark.slow
def test_precision_of_the_trainer_is_kept(asking, command, monkeypatch):
    from lm_eval.models.huggingface import HFLM

    seen = set()
    call = HFLM._model_call

    def watched(lm, *args, **kwargs):
        seen.add(lm.mixed_precision_dtype)
        return call(lm, *args, **kwargs)

    monkeypatch.setattr(HFLM, "_model_call", watched)
    file = asking(tasks=NAMES[:1], limit=1)
    assert command("test", "--config", file, "--trainer.precision=bf16-mixed") == 0
    assert command("test", "--config", file, "--output.name=plain") == 0
    assert seen == {torch.bfloat16, None}


WRONG = {
    "name": (
        {"tasks": ["own_choosin"]},
        "has 'own_choosin': expected names of tasks.*; did you mean own_choosing",
    ),
    "data": (
        {"tasks": ["lost"]},
        "cannot load the task 'lost' .FileNotFoundError: .*: get its data",
    ),
    "unsafe": (
        {"tasks": ["unsafe"]},
        "runs code that the model writes without a sandbox: leave it out",
    ),
    "evaluated": (
        {"tasks": ["prompt_robustness_math_own"]},
        "'prompt_robustness_math_own', which runs code that the model writes without a sandbox",
    ),
    "none": (
        {"tasks": []},
        r"tasks of the benchmark lm_eval is \[\]: expected names of tasks, each once",
    ),
    "folder": ({"include_path": "/nowhere"}, "include_path of the benchmark lm_eval is '/nowhere'"),
    "batch": ({"batch_size": 0}, "batch_size=0 of lm_eval: expected at least 1"),
}


@needs_harness
@pytest.mark.parametrize(
    "case", [pytest.param(name, marks=pytest.mark.slow if name == "name" else ()) for name in WRONG]
)
def test_what_cannot_be_asked(case, tasks, tiny_tokenizer, tmp_path):
    own = {"unsafe": "unsafe_code: true\n", "lost": "", "prompt_robustness_math_own": ""}
    for name, more in own.items():
        folder = "/nowhere" if name == "lost" else tasks
        text = TASK.format(name=name, folder=folder) + CHOOSING + more
        (tmp_path / f"{name}.yaml").write_text(text)
    options, message = WRONG[case]
    if own.keys() & set(options.get("tasks", ())):
        options = {**options, "include_path": str(tmp_path)}
    options = {"tasks": NAMES, "include_path": str(tasks), **options}

    def prepare():
        data = BenchmarkDataModule([LmEval(**options)])
        data.attach(tiny_tokenizer, is_encoder_decoder=False)
        data.prepare_benchmarks("test")

    with pytest.raises(InputError, match=message):
        prepare()


def test_without_the_harness_one_line_says_what_to_install(asking, error_of, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "data_modules.evals.lm_eval.find_spec",
        lambda name: None if name == "lm_eval" else find(name),
    )
    told = error_of("test", "--config", asking())
    assert told.endswith("not installed: pip install -r requirements-lm-eval.txt")


def test_sharded_weights_are_refused():
    from app.evaluation.benchmark import PreparedBenchmark

    with pytest.raises(InputError, match=r"this strategy shards its weights: use --config strat"):
        check_sharded_benchmarks([PreparedBenchmark(LmEval(["x"]), (), ())])
