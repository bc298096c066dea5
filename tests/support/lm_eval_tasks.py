"""Two tasks of lm-evaluation-harness on local data, one of each kind, and a group of both."""

import json
import random
from pathlib import Path

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{train: {folder}/train.jsonl, test: {folder}/test.jsonl}}}}
training_split: train
test_split: test
fewshot_split: train
doc_to_text: "Q: {{{{question}}}}\\nA:"
metadata: {{version: 1.0}}
"""
CHOOSING = """
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
WRITING = """
output_type: generate_until
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["\\n", "7"], max_gen_toks: 9, do_sample: false}
filter_list:
  - {name: strict, filter: [{function: regex, regex_pattern: "([a-e]+)"}, {function: take_first}]}
  - {name: whole, filter: [{function: take_first}]}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}, {metric: bleu}]
"""
GROUP = """
group: own
task: [own_choosing, own_writing]
aggregate_metric_list: [{metric: acc, filter_list: none, weight_by_size: true}]
"""
NAMES = ["own_choosing", "own_writing"]
TASKS = {"own_choosing": CHOOSING, "own_writing": WRITING}


def write_tasks(folder: Path) -> Path:
    """Write task files and data into a folder; return it."""
    drawn = random.Random(0)
    for split, size in (("train", 6), ("test", 11)):
        rows = [
            {
                "question": f"{drawn.choice('abcde') * drawn.randint(1, 9)} {i}?",
                "choices": drawn.sample(["a", "bb", "ccc d", "12"], 3),
                "answer": drawn.randrange(3),
            }
            for i in range(size)
        ]
        lines = [json.dumps(row) + "\n" for row in rows]
        (folder / f"{split}.jsonl").write_text("".join(lines))
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, folder=folder) + text)
    (folder / "own.yaml").write_text(GROUP)
    return folder
