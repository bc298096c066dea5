"""Make the fixtures of lm-evaluation-harness 0.4.13 that the tests compare ours with.

Run in an environment of its own, `pip install "lm_eval[hf]==0.4.13"`; its Hub data sets are replaced
by the local files, its tasks, prompts, filters and metrics are the package's own:

    python tests/oracles/make_lm_eval.py prompts DATA tests/oracles/prompts.json
    python tests/oracles/make_lm_eval.py mmlu DATA tests/oracles/mmlu_scores.json MODEL
    python tests/oracles/make_lm_eval.py gsm8k_outputs DATA tests/oracles/gsm8k_outputs.json MODEL
    python tests/oracles/make_lm_eval.py gsm8k_verdicts DATA tests/oracles/gsm8k_verdicts.json

DATA is the folder with `mmlu/` and `gsm8k/`, MODEL a transformers directory, loaded in float32.
"""

import csv
import gzip
import hashlib
import io
import json
import pathlib
import re
import sys
import tarfile
import tempfile

import lm_eval
import lm_eval.tasks
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks._yaml_loader import load_yaml

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
from gsm8k_table import all_cases

HERE = pathlib.Path(__file__).resolve().parent
TASKS = pathlib.Path(lm_eval.tasks.__file__).parent
LETTERS = "ABCD"
# About a thousand short questions, of all four categories.
SCORED = (
    "world_religions",
    "management",
    "abstract_algebra",
    "conceptual_physics",
    "electrical_engineering",
    "anatomy",
    "human_sexuality",
)
SHOWN = ("abstract_algebra", "moral_scenarios", "us_foreign_policy")
NUM_GENERATED = 14
NUM_BARE = 6
MAX_NEW_TOKENS = 160


def local_task(yaml_file, data_files):
    """Build the package's own task on JSON lines instead of the Hub's data set."""
    config = load_yaml(yaml_file)
    config = {name: value for name, value in config.items() if name not in ("tag", "task_alias")}
    config |= {"dataset_path": "json", "dataset_name": None}
    return ConfigurableTask(config=config | {"dataset_kwargs": {"data_files": data_files}})


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def mmlu_rows(text):
    """Rows in the form of the Hub's cais/mmlu."""
    return [
        {"question": row[0], "choices": row[1:5], "answer": LETTERS.index(row[5])}
        for row in csv.reader(io.StringIO(text, newline=""))
    ]


def mmlu_tasks(data, folder, subjects):
    tests = {}
    with tarfile.open(data / "mmlu" / "test.tar.gz") as archive:
        for member in archive:
            if member.isfile():
                subject = pathlib.PurePath(member.name).name.removesuffix("_test.csv")
                tests[subject] = mmlu_rows(archive.extractfile(member).read().decode())
    for subject in subjects or sorted(tests):
        dev = (data / "mmlu" / "dev" / f"{subject}_dev.csv").read_bytes().decode()
        files = {
            "dev": write_jsonl(folder / f"{subject}_dev.jsonl", mmlu_rows(dev)),
            "test": write_jsonl(folder / f"{subject}_test.jsonl", tests[subject]),
        }
        yield subject, local_task(TASKS / "mmlu" / "default" / f"mmlu_{subject}.yaml", files)


def prompts(data, folder):
    """Some prompts as they are, a hash of all prompts and right choices of each task, MMLU's groups."""
    shown, hashes, categories = {}, {}, {}
    for subject, task in mmlu_tasks(data, folder, None):
        task.set_config("num_fewshot", 5)
        task.build_all_requests(rank=0, world_size=1)
        asked = sorted((i.doc_id, i.idx, i.args) for i in task.instances)
        assert [args[1] for _, _, args in asked[:4]] == [" A", " B", " C", " D"]
        texts = [args[0] for _, idx, args in asked if idx == 0]
        right = [f" {LETTERS[task.doc_to_target(doc)]}" for doc in task.test_docs()]
        if subject in SHOWN:
            shown[f"{subject}/0"] = texts[0]
        hashes[subject] = [len(texts), digest([texts, right])]
        raw = load_yaml(TASKS / "mmlu" / "default" / f"mmlu_{subject}.yaml")
        categories[subject] = raw["tag"].removeprefix("mmlu_").removesuffix("_tasks")
    task = dict(gsm8k_tasks(data, folder))["gsm8k_cot"]
    task.build_all_requests(rank=0, world_size=1)
    texts = [i.args[0] for i in sorted(task.instances, key=lambda i: i.doc_id)]
    shown["gsm8k_cot/0"] = texts[0]
    hashes["gsm8k_cot"] = [len(texts), digest(texts)]
    stop = task.instances[0].args[1]["until"]
    return {
        "lm_eval": lm_eval.__version__,
        "prompts": shown,
        "sha256": hashes,
        "categories": categories,
        "gsm8k_cot_until": stop,
    }


def digest(texts):
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


def mmlu(data, folder, model):
    """Log-likelihoods of the four letters of every question of the subjects `SCORED`."""
    from lm_eval.models.huggingface import HFLM

    tasks = dict(mmlu_tasks(data, folder, SCORED))
    lm = HFLM(pretrained=model, dtype="float32", device="cpu", batch_size=1)
    for task in tasks.values():
        task.set_config("num_fewshot", 5)
    accuracies, subjects = {}, {}
    for subject, task in tasks.items():
        asked = {"tasks": {f"mmlu_{subject}": task}, "groups": {}, "group_map": {}}
        results = lm_eval.evaluate(lm, asked, log_samples=True)
        samples = results["samples"][f"mmlu_{subject}"]
        accuracies[subject] = results["results"][f"mmlu_{subject}"]["acc,none"]
        subjects[subject] = [
            [round(float(answer[0]), 5) for answer in sample["filtered_resps"]]
            for sample in sorted(samples, key=lambda sample: sample["doc_id"])
        ]
        print(subject, accuracies[subject], len(samples), flush=True)
    versions = {"lm_eval": lm_eval.__version__, "model": "SmolLM2-135M-Instruct.Q4_1"}
    return versions | {"accuracies": accuracies, "subjects": subjects}


def gsm8k_tasks(data, folder):
    train = folder / "train.jsonl"
    train.write_bytes(gzip.decompress((data / "gsm8k" / "train.jsonl.gz").read_bytes()))
    files = {"train": str(train), "test": str(data / "gsm8k" / "test.jsonl")}
    for name in ("gsm8k", "gsm8k-cot"):
        task = local_task(TASKS / "gsm8k" / f"{name}.yaml", files)
        task.set_fewshot_seed(1234)
        yield name.replace("-", "_"), task


def gsm8k_outputs(data, folder, model_path):
    """Greedy outputs of a real model: with each task's own prompt, and with none but the question."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    made = []
    for name, task in gsm8k_tasks(data, folder):
        task.build_all_requests(limit=NUM_GENERATED, rank=0, world_size=1)
        for instance in task.instances:
            question, gold = instance.doc["question"], instance.doc["answer"]
            prompts = [(name, instance.args[0], instance.args[1]["until"])]
            if name == "gsm8k" and instance.doc_id < NUM_BARE:
                prompts.append(("bare", f"Q: {question}\nA:", []))
            for form, prompt, until in prompts:
                ids = tokenizer(prompt, return_tensors="pt")
                output = model.generate(**ids, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
                new = output[0, ids["input_ids"].shape[1] :]
                text = tokenizer.decode(new, skip_special_tokens=True)
                for stop in until:
                    text = text.partition(stop)[0]
                made.append({"form": form, "row": instance.doc_id, "gold": gold, "output": text})
                print(form, instance.doc_id, repr(text[-60:]), flush=True)
    return made


def gsm8k_verdicts(data, folder):
    """What each filter reads in an output, and its verdict, for the table and the real outputs."""
    tasks = dict(gsm8k_tasks(data, folder))
    verdicts = []
    for case in all_cases(json.loads((HERE / "gsm8k_outputs.json").read_text())):
        task = tasks["gsm8k_cot" if case.form == "cot" else "gsm8k"]
        doc = {"question": "?", "answer": f"#### {case.gold}"}
        instance = Instance("generate_until", doc, ("?", {}), 0)
        instance.resps = [case.output]
        task._instances = [instance]
        task.apply_filters()
        read_by = {}
        for way in ("strict-match", "flexible-extract"):
            read = instance.filtered_resps[way]
            verdict = task.process_results(doc, [read])["exact_match"]
            read_by[way] = [read, int(verdict)]
        verdicts.append({"gold": case.gold, **read_by})
    return {"lm_eval": lm_eval.__version__, "verdicts": verdicts}


def main():
    what, data, target, *model = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        made = globals()[what](pathlib.Path(data), pathlib.Path(folder), *model)
    text = json.dumps(made, indent=1)
    # Numbers of one question on one line.
    text = re.sub(r"\[([-0-9.,\s]+)\]", lambda match: f"[{' '.join(match[1].split())}]", text)
    pathlib.Path(target).write_text(text + "\n")


if __name__ == "__main__":
    main()
