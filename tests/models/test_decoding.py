"""Sampled outputs: their distribution, and that nothing but seed, question and number changes them."""

import itertools
from collections import Counter
from dataclasses import replace

import pytest
import torch

from app.models.decoding import Decoding, uniform
from app.models.generation import generate
from tests.support.generation import batch_sizes

SAMPLING = Decoding(12, temperature=0.9, top_p=0.95, seed=3)
PROMPTS = [[5, 6, 7], [8], [9] * 11, [10, 11], [12] * 6, [13, 14], [15], [16, 5, 6, 7, 8]]
KEYS = [f"question {number}" for number in range(8)]


def ask(model, tokenizer, rows, decoding):
    prompts, keys = [PROMPTS[row] for row in rows], [KEYS[row] for row in rows]
    return generate(model, model, tokenizer, prompts, keys, decoding)


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_neither_batch_nor_order_changes_a_sample_but_seed_and_question_do(
    kind, tiny_llama, tiny_t5, tiny_tokenizer
):
    model = {"llama": tiny_llama, "t5": tiny_t5}[kind]()
    model.generation_config.eos_token_id = list(range(20, 28))
    alone = [ask(model, tiny_tokenizer, [row], SAMPLING)[0] for row in range(8)]
    assert ask(model, tiny_tokenizer, range(8), SAMPLING) == alone
    assert ask(model, tiny_tokenizer, range(7, -1, -1), SAMPLING) == alone[::-1]
    halves = [ask(model, tiny_tokenizer, rows, SAMPLING) for rows in ((0, 2, 4, 6), (1, 3, 5, 7))]
    assert [text for pair in zip(*halves, strict=True) for text in pair] == alone
    assert len({sample.num_tokens for (sample,) in alone}) > 2
    assert len({sample.text for (sample,) in alone}) == 8
    assert ask(model, tiny_tokenizer, [0], replace(SAMPLING, seed=4)) != alone[:1]
    other = generate(model, model, tiny_tokenizer, PROMPTS[:1], ["other question"], SAMPLING)
    assert other != alone[:1]


def test_samples_of_a_question_read_it_once_and_differ(tiny_llama, tiny_tokenizer):
    model = tiny_llama()
    model.generation_config.eos_token_id = list(range(20, 28))
    several = replace(SAMPLING, num_samples=5)
    sizes = batch_sizes(model)
    found = ask(model, tiny_tokenizer, range(3), several)
    longest = max(map(len, PROMPTS[:3]))
    assert sizes[0] == (3, longest)
    unfinished = [
        sum(sample.num_tokens > step for samples in found for sample in samples)
        for step in range(1, max(sample.num_tokens for samples in found for sample in samples))
    ]
    assert sizes[1:] == [(rows, 1) for rows in unfinished]
    assert all(len({sample.text for sample in samples}) == 5 for samples in found)
    # The first of five is the one of one.
    assert [samples[:1] for samples in found] == ask(model, tiny_tokenizer, range(3), SAMPLING)


def test_draws_are_uniform_and_unrelated():
    decoding = Decoding(200, num_samples=20, temperature=1.0)
    draws = torch.stack([uniform(decoding, key, n) for key in KEYS for n in range(20)])
    assert draws.dtype == torch.float64
    assert draws.min() >= 0
    assert draws.max() < 1
    parts = torch.histc(draws, 50, 0, 1)
    expected = draws.numel() / 50
    assert ((parts - expected) ** 2 / expected).sum() < 49 + 5 * (2 * 49) ** 0.5
    assert torch.corrcoef(draws).fill_diagonal_(0).abs().max() < 0.4
    assert torch.corrcoef(draws.T).fill_diagonal_(0).abs().max() < 0.5


@pytest.mark.parametrize("draw", [0.0, 1 - 2.0**-53])
def test_the_extreme_draws_take_possible_tokens(draw, tiny_llama, tiny_tokenizer, monkeypatch):
    """The first and the last token of the vocabulary that top_p leaves."""
    monkeypatch.setattr(
        "app.models.decoding.uniform", lambda *_: torch.tensor([draw], dtype=torch.float64)
    )
    model = tiny_llama(vocab_size=len(tiny_tokenizer), initializer_range=0.3)
    decoding = Decoding(1, temperature=1.0, top_p=0.5)
    with torch.no_grad():
        possible = nucleus(model(torch.tensor([[5, 6]])).logits[0, -1], 1.0, 0.5).nonzero()
    token = int(possible[0] if draw == 0 else possible[-1])
    assert 3 < token < len(tiny_tokenizer) - 1
    ((output,),) = generate(model, model, tiny_tokenizer, [[5, 6]], ["q"], decoding)
    assert output.text == tiny_tokenizer.decode([token])


def nucleus(logits, temperature, top_p):
    """Return the distribution of a token by the definition, in float64."""
    p = torch.softmax(logits.double() / temperature, dim=-1)
    kept, total = torch.zeros_like(p), 0.0
    for token in p.argsort(descending=True):
        if total >= top_p:
            break
        kept[token] = p[token]
        total += float(p[token])
    return kept / kept.sum()


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 1.0), (1.5, 0.8), (1.2, 0.6)])
def test_two_tokens_have_the_joint_distribution(temperature, top_p, tiny_llama, tiny_tokenizer):
    """Against p(first) p(second | first), by a chi-square over all pairs."""
    model = tiny_llama(vocab_size=12, initializer_range=0.5)  # four special tokens, 0 to 7
    samples = 12000
    decoding = Decoding(2, num_samples=samples, temperature=temperature, top_p=top_p)
    (found,) = generate(model, model, tiny_tokenizer, [[4, 9]], ["q"], decoding)
    seen = Counter((sample.text, sample.num_tokens) for sample in found)
    expected = Counter()
    with torch.no_grad():
        first = nucleus(model(torch.tensor([[4, 9]])).logits[0, -1], temperature, top_p)
        pairs = model(torch.tensor([[4, 9, token] for token in range(12)])).logits[:, -1]
    text = [tiny_tokenizer.decode([token], skip_special_tokens=True) for token in range(12)]
    for a, b in itertools.product(range(12), range(12)):
        if a == 1:  # EOS
            expected["", 1] += float(first[a]) / 12
        else:
            second = nucleus(pairs[a], temperature, top_p)
            expected[text[a] + text[b], 2] += float(first[a] * second[b])
    assert sum(expected.values()) == pytest.approx(1.0)
    possible = {key: samples * p for key, p in expected.items() if p > 0}
    assert seen.keys() <= possible.keys()
    square = sum((seen[key] - mean) ** 2 / mean for key, mean in possible.items() if mean >= 5)
    degrees = sum(mean >= 5 for mean in possible.values()) - 1
    assert degrees >= 3
    assert square < degrees + 5 * (2 * degrees) ** 0.5
    rare = sum(seen[key] for key, mean in possible.items() if mean < 5)
    assert rare < 2 * sum(mean for mean in possible.values() if mean < 5) + 20
