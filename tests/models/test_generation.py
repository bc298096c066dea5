"""Outputs of batches against transformers' own `generate`, one prompt at a time."""

import json

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM

from app.models.decoding import Decoding
from app.models.generation import generate
from app.models.loading import load_model, load_tokenizer
from app.models.lora import base_model
from app.models.source import resolve_model
from app.utils.errors import InputError
from tests.support.generation import ENDS, batch_sizes, in_training, mistral, modes, one_at_a_time
from tests.support.paths import DATA, ROOT, needs_data

NEW = 16


def draw_prompts(count, longest=12):
    lengths = torch.randint(1, longest + 1, (count,)).tolist()
    return [torch.randint(4, 100, (length,)).tolist() for length in lengths]


@pytest.fixture
def build(tiny_llama, tiny_gpt2, tiny_t5):
    """Return `build(kind)`: a model whose greedy outputs change from token to token."""
    kinds = {"llama": tiny_llama, "gpt2": tiny_gpt2, "t5": tiny_t5, "mistral": mistral}

    def make(kind, **config):
        wide = {"initializer_factor": 8.0} if kind == "t5" else {"initializer_range": 1.0}
        model = kinds[kind](**{**wide, **config})
        model.generation_config.eos_token_id = list(ENDS)
        model.generation_config.pad_token_id = 0
        return model

    return make


def in_batches(model, tokenizer, prompts, size, decoding=None):
    found = []
    for start in range(0, len(prompts), size):
        batch = prompts[start : start + size]
        keys = [f"row {start + i}" for i in range(len(batch))]
        decoding = decoding or Decoding(NEW)
        found += generate(model, base_model(model), tokenizer, batch, keys, decoding)
    return found


def greedy(*arguments):
    """Return what `one_at_a_time` returns."""
    return [(o.text, o.num_tokens, o.finished) for (o,) in in_batches(*arguments)]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "mistral"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_every_output_is_that_of_its_prompt_alone(kind, attention, build, tiny_tokenizer):
    model = build(kind, attn_implementation=attention)
    prompts = draw_prompts(16, longest=20)
    expected = one_at_a_time(model, tiny_tokenizer, prompts, NEW)
    lengths = [length for _, length, _ in expected]
    assert len(set(lengths)) > 3
    for size in (1, 7, 16):
        assert greedy(model, tiny_tokenizer, prompts, size) == expected


@pytest.mark.smollm2
@needs_data("gsm8k")
def test_fifty_questions_of_gsm8k(smollm2_dir):
    """The oracle, by benchmarks/generation.py, holds what `generate` writes to each question alone."""
    new = 20
    oracle = json.loads((ROOT / "tests" / "oracles" / "gsm8k_greedy.json").read_text())
    source = resolve_model(str(smollm2_dir))
    model, tokenizer = load_model(source), load_tokenizer(source)
    lines = (DATA / "gsm8k" / "test.jsonl").read_text().splitlines()
    pairs = []
    for row in oracle:
        question = json.loads(lines[row["row"]])["question"]
        pairs.append((tokenizer(f"Question: {question}\nAnswer:")["input_ids"], row["tokens"]))
    pairs.sort(key=lambda pair: -len(pair[0]))
    prompts = [prompt for prompt, _ in pairs]
    assert len(prompts) == 50
    assert len(set(map(len, prompts))) > 10
    ended = [len(tokens) <= new and tokens[-1] == 2 for _, tokens in pairs]
    assert 5 < sum(ended) < 45
    texts = [tokenizer.decode(tokens[:new], skip_special_tokens=True) for _, tokens in pairs]
    lengths = [min(len(tokens), new) for _, tokens in pairs]
    expected = list(zip(texts, lengths, ended, strict=True))
    assert greedy(model, tokenizer, prompts, 25, Decoding(new)) == expected
    assert one_at_a_time(model, tokenizer, prompts[-1:], new) == expected[-1:]


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_a_row_leaves_the_batch_when_it_ends(kind, build, tiny_tokenizer):
    model, prompts = build(kind), draw_prompts(9)
    lengths = [n for _, n, _ in one_at_a_time(model, tiny_tokenizer, prompts, NEW)]
    sizes = batch_sizes(model)
    greedy(model, tiny_tokenizer, prompts, 9)
    first = (9, 1 if kind == "t5" else max(map(len, prompts)))
    unfinished = [sum(n > step for n in lengths) for step in range(1, max(lengths))]
    assert sizes == [first, *((rows, 1) for rows in unfinished)]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_an_adapted_model_in_the_middle_of_training(kind, build, tiny_tokenizer):
    """Dropout is off meanwhile, checkpointing leaves the cache alone, and every mode comes back."""
    plain, prompts = build(kind), draw_prompts(6)
    before = one_at_a_time(plain, tiny_tokenizer, prompts, NEW)
    model = in_training(plain, std=0.5)
    before_modes = modes(model)
    sizes = batch_sizes(plain)
    found = greedy(model, tiny_tokenizer, prompts, 4)
    assert modes(model) == before_modes
    read_at_once = [tokens for _, tokens in sizes if tokens > 1]
    assert len(read_at_once) == (0 if kind == "t5" else 2), "one for each batch, with a cache"
    assert all(p.grad is None for p in model.parameters())
    model.eval()
    assert found == one_at_a_time(model, tiny_tokenizer, prompts, NEW)
    assert found != before


@torch.inference_mode()
def test_under_inference_mode_and_autocast(build, tiny_tokenizer):
    model, prompts = build("llama"), draw_prompts(6)
    expected = one_at_a_time(model, tiny_tokenizer, prompts, NEW)
    assert greedy(model, tiny_tokenizer, prompts, 3) == expected
    with torch.autocast("cpu", torch.bfloat16):
        assert len(greedy(model, tiny_tokenizer, prompts, 3)) == 6


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_bfloat16_alone(kind, build, tiny_tokenizer):
    """Of rows of one length, which have no padding to change the rounding."""
    model = build(kind).bfloat16()
    prompts = [row[:5] for row in draw_prompts(20) if len(row) >= 5]
    assert len(prompts) > 5
    expected = one_at_a_time(model, tiny_tokenizer, prompts, NEW)
    assert greedy(model, tiny_tokenizer, prompts, 1) == expected
    assert len(greedy(model, tiny_tokenizer, prompts, 8)) == len(prompts)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_an_output_stops_where_the_context_is_full(kind, build, tiny_tokenizer):
    place = {"n_positions": 20} if kind == "gpt2" else {"max_position_embeddings": 20}
    model = build(kind, **place)
    model.generation_config.eos_token_id = None
    prompts = [[5] * 19, [6] * 12, [7] * 3]
    found = in_batches(model, tiny_tokenizer, prompts, 3, Decoding(10))
    assert [(o.num_tokens, o.finished) for (o,) in found] == [(1, False), (8, False), (10, False)]
    texts = [
        one_at_a_time(model, tiny_tokenizer, [p], n)[0][0]
        for p, n in zip(prompts, (1, 8, 10), strict=True)
    ]
    assert [o.text for (o,) in found] == texts


@pytest.mark.parametrize("decoding", [Decoding(4), Decoding(4, temperature=1.0, top_p=0.9)])
def test_a_diverged_model_is_named(decoding, build, tiny_tokenizer):
    model = build("llama")
    model.get_output_embeddings().weight.data[7] = float("nan")
    message = r"not finite 0 tokens into its answer to 'row 0'.*diverged"
    with pytest.raises(InputError, match=message):
        in_batches(model, tiny_tokenizer, [[5, 6]], 1, decoding)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [([], "a prompt has no tokens"), ([5] * 20, "20 tokens, but the model's context 20")],
)
def test_prompts_that_do_not_fit(prompt, message, build, tiny_tokenizer):
    model = build("llama", max_position_embeddings=20)
    with pytest.raises(InputError, match=message):
        in_batches(model, tiny_tokenizer, [[5], prompt], 2)


def test_a_model_without_an_end(build, tiny_tokenizer):
    model = build("llama")
    model.generation_config.eos_token_id = tiny_tokenizer.eos_token = None
    with pytest.raises(InputError, match=r"model\.name has an end-of-text token .*decoding.stop"):
        in_batches(model, tiny_tokenizer, [[5]], 1)
    ((found,),) = in_batches(model, tiny_tokenizer, [[5]], 1, Decoding(NEW, stop=["no such"]))
    assert (found.num_tokens, found.finished) == (NEW, False)
    assert generate(model, model, tiny_tokenizer, [], [], Decoding(4)) == []


def test_the_tokenizer_ends_outputs_too(build, tiny_tokenizer):
    """Fine-tuned answers end with its EOS, whatever the model's settings name."""
    model = build("llama")
    model.generation_config.eos_token_id = 127
    model.get_output_embeddings().weight.data.zero_()
    model.get_output_embeddings().weight.data[1] = 1e4 * torch.ones(16)
    found = in_batches(model, tiny_tokenizer, [[5], [6]], 2)
    logits = model(torch.tensor([[5], [6]])).logits[:, -1]
    ended = (logits.argmax(dim=-1) == 1).tolist()
    assert [o.finished and o.num_tokens == 1 for (o,) in found] == ended
    assert any(ended)


def test_a_model_whose_state_is_no_cache_of_keys(tiny_tokenizer):
    sizes = {"vocab_size": 128, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}
    model = MambaForCausalLM(MambaConfig(**sizes))
    with pytest.raises(
        InputError, match=r"model\.name names a MambaForCausalLM, which keeps no cache"
    ):
        in_batches(model, tiny_tokenizer, [[5], [6]], 2)
