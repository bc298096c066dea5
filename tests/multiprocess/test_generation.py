"""Outputs and likelihoods of models sharded over two processes are those of the whole model."""

import json

import pytest
from transformers import AutoTokenizer

from tests.support.sharded_generation import KINDS, PROMPTS, adapted, outputs_and_likelihoods

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]


def test_sharded_models_write_and_choose_what_whole_ones_do(
    tmp_path, tiny_llama, tiny_gpt2, tiny_t5, run_models, finished
):
    tokenizer = AutoTokenizer.from_pretrained(run_models / "llama")
    size = len(tokenizer)
    wide = {"llama": 0.5, "gpt2": 0.5}
    for kind, build in (("llama", tiny_llama), ("gpt2", tiny_gpt2), ("t5", tiny_t5)):
        range_ = {"initializer_range": wide[kind]} if kind in wide else {"initializer_factor": 4.0}
        build(vocab_size=size + 1, **range_).save_pretrained(tmp_path / kind)
        tokenizer.save_pretrained(tmp_path / kind)
    finished({"part": "sharded_generation", "options": {"folder": str(tmp_path)}})
    lengths = set()
    for rank in range(2):
        sharded = json.loads((tmp_path / f"results_{rank}.json").read_text())
        for kind in KINDS:
            model = adapted(kind, tmp_path)
            for pair, (texts, likely) in zip(PROMPTS, sharded[kind], strict=True):
                whole_texts, whole_likely = outputs_and_likelihoods(
                    model, tokenizer, pair[rank], together=False
                )
                assert texts == whole_texts
                assert len(likely) == len(whole_likely)
                for ours, theirs in zip(likely, whole_likely, strict=True):
                    assert len(ours) == len(theirs) == len(pair[rank])
                    for row, expected in zip(ours, theirs, strict=True):
                        assert row == pytest.approx(expected, abs=1e-5)
                lengths |= {o["num_tokens"] for rows in texts for row in rows for o in row}
    assert len(lengths) > 5
