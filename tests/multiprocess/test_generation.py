"""Outputs and likelihoods of models sharded over two processes, against those of the whole model.

torchrun --nproc_per_node 2 test_generate_sharded.py FOLDER     what a process of the test does
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedModel,
)

from app.models.adapter_config import LoraSettings
from app.models.decoding import Decoding
from app.models.generation import generate
from app.models.likelihood import SHORTEST_PREFIX, choice_log_likelihoods
from app.models.lora import add_lora, base_model, lora_pairs

KINDS = ("llama", "gpt2", "t5")
ENDS = [1, *range(20, 32)]
LONG = list(range(4, 4 + SHORTEST_PREFIX))
# Prompts of each process: many steps and few, a shared beginning and none, nobody on either side.
PROMPTS = [
    ([[5, 6], [7], [8] * 9, [9, 10], [33, 34, 35]], [[40, 41]]),
    ([[*LONG, 5], [*LONG, 6, 7]], [[5], [6, 7, 8], [50]]),
    ([], [[5, 6], [7]]),
    ([[5, 6], [7]], []),
    ([], []),
]
DECODINGS = [
    Decoding(16),
    Decoding(9, stop=["a", "7"], num_samples=3, temperature=0.9, top_p=0.9, seed=1),
]
CHOICES = [[[5], [6]], [[5], [6, 7], [6, 8], [9, 10, 11]]]


def adapted(kind: str, folder: Path) -> torch.nn.Module:
    """Return a model with an adapter that does something; of one kind the whole model, as trained."""
    auto = AutoModelForSeq2SeqLM if kind == "t5" else AutoModelForCausalLM
    model: PreTrainedModel = auto.from_pretrained(folder / kind)
    model.generation_config.eos_token_id = ENDS
    if kind == "gpt2":
        return model.requires_grad_(False)
    torch.manual_seed(0)
    model = add_lora(model, LoraSettings(r=2))
    for pair in lora_pairs(model):
        torch.nn.init.normal_(pair.lora_B.data, std=0.3)
    return model


def found(model: torch.nn.Module, tokenizer, prompts, together: bool) -> list:
    """Return texts of every decoding and likelihoods of every set of choices, as JSON data."""
    base, keys = base_model(model), [str(prompt) for prompt in prompts]
    written = [
        generate(model, base, tokenizer, prompts, keys, decoding, together=together)
        for decoding in DECODINGS
    ]
    texts = [[[vars(o) for o in outputs] for outputs in rows] for rows in written]
    likely = [
        choice_log_likelihoods(model, base, prompts, choices, together=together).tolist()
        for choices in CHOICES
    ]
    return [texts, likely]


def run(folder: Path) -> None:
    """Shard each model as app/distributed/fsdp.py does and write down what this process found."""
    from app.distributed.fsdp import blocks

    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    results = {}
    for kind in KINDS:
        model = adapted(kind, folder)
        whole = {parameter for parameter in model.parameters() if parameter.requires_grad}
        for block in blocks(model):
            fully_shard(block, mesh=mesh, ignored_params=whole)
        fully_shard(model, mesh=mesh, ignored_params=whole)
        tokenizer = AutoTokenizer.from_pretrained(folder / kind)
        results[kind] = [
            found(model, tokenizer, pair[dist.get_rank()], together=True) for pair in PROMPTS
        ]
    (folder / f"found_{dist.get_rank()}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


def test_sharded_models_write_and_choose_what_whole_ones_do(
    tmp_path, tiny_llama, tiny_gpt2, tiny_t5, run_models
):
    tokenizer = AutoTokenizer.from_pretrained(run_models / "llama")
    size = len(tokenizer)
    wide = {"llama": 0.5, "gpt2": 0.5}
    for kind, build in (("llama", tiny_llama), ("gpt2", tiny_gpt2), ("t5", tiny_t5)):
        range_ = {"initializer_range": wide[kind]} if kind in wide else {"initializer_factor": 4.0}
        build(vocab_size=size + 1, **range_).save_pretrained(tmp_path / kind)
        tokenizer.save_pretrained(tmp_path / kind)
    root = Path(__file__).resolve().parents[2]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*launcher, "--nproc_per_node", "2", __file__, str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lengths = set()
    for rank in range(2):
        sharded = json.loads((tmp_path / f"found_{rank}.json").read_text())
        for kind in KINDS:
            model = adapted(kind, tmp_path)
            for pair, (texts, likely) in zip(PROMPTS, sharded[kind], strict=True):
                whole_texts, whole_likely = found(model, tokenizer, pair[rank], together=False)
                assert texts == whole_texts
                assert len(likely) == len(whole_likely)
                for ours, theirs in zip(likely, whole_likely, strict=True):
                    assert len(ours) == len(theirs) == len(pair[rank])
                    for row, expected in zip(ours, theirs, strict=True):
                        assert row == pytest.approx(expected, abs=1e-5)
                lengths |= {o["num_tokens"] for rows in texts for row in rows for o in row}
    assert len(lengths) > 5


if __name__ == "__main__":
    run(Path(sys.argv[1]))
