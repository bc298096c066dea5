"""Compare our MMLU with lm-evaluation-harness's on the same questions and the same model.

    python -m benchmarks.mmlu_agreement DATA     DATA: the folder with mmlu/

Prints accuracy of both, and how many questions they answer differently, for each subject of
mmlu_scores.json; twenty minutes of one core.
"""

import json
import pathlib
import sys

import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from app.models.likelihood import choice_log_likelihoods
from app.models.loading import local_directory
from app.models.source import resolve_model
from data_modules.evals.mmlu import Mmlu

ROOT = pathlib.Path(__file__).resolve().parents[1]

BATCH_SIZE = 16


def our_log_likelihoods(evaluation, questions, directory):
    """Log-likelihoods (Q, 4) of the letters, as a test run computes them."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    choices = [tokenizer(choice)["input_ids"] for choice in evaluation.choices]
    prompts = [tokenizer(question.prompt)["input_ids"] for question in questions]
    scores = []
    with torch.inference_mode():
        for start in range(0, len(prompts), BATCH_SIZE):
            batch = prompts[start : start + BATCH_SIZE]
            scores.append(choice_log_likelihoods(model, model, batch, choices))
            print(f"\r{start + len(batch)} of {len(prompts)}", end="", file=sys.stderr, flush=True)
    return torch.cat(scores).cpu().double()


def main() -> None:
    """Compare, and print a line for each subject."""
    oracle = json.loads((ROOT / "tests" / "oracles" / "mmlu_scores.json").read_text())
    smollm2 = yaml.safe_load((ROOT / "configs" / "models" / "smollm2.yaml").read_text())
    directory = local_directory(resolve_model(smollm2["model"]["name"]))
    evaluation = Mmlu(str(pathlib.Path(sys.argv[1]) / "mmlu"), list(oracle["subjects"]))
    questions = evaluation.load()
    ours = our_log_likelihoods(evaluation, questions, directory)
    theirs = torch.tensor([row for part in oracle["subjects"].values() for row in part]).double()
    right = [evaluation.choices.index(q.reference["choice"]) for q in questions]
    gold = torch.tensor(right)
    print("\nsubject  questions  ours  lm-eval  answered differently  largest difference of logs")
    place = 0
    for subject, part in [*oracle["subjects"].items(), ("all", theirs)]:
        rows = slice(0, len(gold)) if subject == "all" else slice(place, place + len(part))
        a, b = ours[rows], theirs[rows]
        score = [(x.argmax(1) == gold[rows]).double().mean().item() for x in (a, b)]
        differ = int((a.argmax(1) != b.argmax(1)).sum())
        gap = (a - b).abs().max().item()
        print(f"{subject}  {len(a)}  {score[0]:.4f}  {score[1]:.4f}  {differ}  {gap:.1e}")
        place += len(part)


if __name__ == "__main__":
    main()
