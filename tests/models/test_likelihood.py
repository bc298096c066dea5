"""Likelihoods of choices against one full forward pass for each prompt and choice, in float64."""

from functools import partial

import pytest
import torch

from app.models.likelihood import SHORTEST_PREFIX, choice_log_likelihoods
from app.models.lora import base_model
from app.utils.errors import InputError
from tests.support.generation import in_training, likelihoods_by_hand, mistral, modes

SINGLE = [[5], [17], [99], [6]]
SEVERAL = [[5], [40, 41, 42], [40, 41, 43], [40, 7], [6, 7], [6, 8]]
LONG = list(range(4, 4 + SHORTEST_PREFIX + 30))
PROMPTS = {
    "of all lengths": [[9], [50, 51, 52, 53], [50, 51], [60, 61, 62, 63, 64, 65, 66]],
    "with a long beginning in common": [[*LONG, 5], [*LONG, 6, 7, 8], LONG, [*LONG, 6, 7]],
    "of two families and strangers": [
        [*LONG, 5],
        [7, *LONG],
        [9, 8],
        [*LONG, 6, 7, 8],
        [50],
        [7, *LONG, 9, 9],
        [*LONG, 6],
    ],
    "all the same": [LONG, LONG],
    "alone": [LONG],
}


@pytest.fixture
def build(tiny_llama, tiny_gpt2, tiny_t5):
    eager = partial(tiny_llama, attn_implementation="eager")
    kinds = {"llama": tiny_llama, "gpt2": tiny_gpt2, "t5": tiny_t5, "mistral": mistral}
    return {**kinds, "eager llama": eager}


@pytest.mark.parametrize("prompts", PROMPTS.values(), ids=PROMPTS)
@pytest.mark.parametrize("choices", [SINGLE, SEVERAL], ids=["single tokens", "several tokens"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "mistral", "eager llama"])
def test_sums_are_those_of_full_passes(kind, choices, prompts, build):
    wide = {"initializer_factor": 3.0} if kind == "t5" else {"initializer_range": 0.3}
    model = build[kind](**wide)
    by_hand = likelihoods_by_hand(model, prompts, choices)
    assert by_hand.std() > 0.1
    found = choice_log_likelihoods(model, model, prompts, choices)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, by_hand, rtol=1e-5, atol=1e-5)


def watched(model):
    """Return a list that fills with the shape of each pass's tokens, and of each pass's logits."""
    passes = []
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    embeddings.register_forward_hook(lambda _, args, out: passes.append(tuple(args[0].shape)))
    head.register_forward_hook(lambda _, args, out: passes.append(tuple(out.shape)))
    return passes


SHORT = LONG[: SHORTEST_PREFIX - 1]
# The last token of the beginning is left to the rests where one prompt is no more than the beginning.
BEGINNING = [(1, len(LONG) - 1), (1, 1, 128), (4, 4), (1, 4, 128)]
STARTS = [(4, 6), (1, 12, 128), (4, 5), (1, 8, 128), (4, 5), (1, 8, 128)]


@pytest.mark.parametrize(
    ("prompts", "choices", "expected_passes"),
    [
        (PROMPTS["with a long beginning in common"], SINGLE, BEGINNING),
        (PROMPTS["with a long beginning in common"], SEVERAL, BEGINNING + STARTS),
        ([[*SHORT, 5], [*SHORT, 6, 7]], SINGLE, [(2, len(SHORT) + 2), (1, 2, 128)]),
    ],
)
def test_what_is_shared_runs_once(prompts, choices, expected_passes, tiny_llama):
    """Beginning once if worth it, the rests once for each start of a choice, and the head where a choice is."""
    model = tiny_llama()
    passes = watched(model)
    choice_log_likelihoods(model, model, prompts, choices)
    assert passes == expected_passes


def test_each_family_of_prompts_runs_its_beginning_once(tiny_llama):
    model = tiny_llama()
    passes = watched(model)
    choice_log_likelihoods(model, model, PROMPTS["of two families and strangers"], SINGLE)
    beginnings = [shape for shape in passes[::2] if shape[0] == 1]
    rests = [shape for shape in passes[::2] if shape[0] > 1]
    assert beginnings == [(1, len(LONG)), (1, len(LONG))]
    assert sorted(rests) == [(2, 2), (2, 3), (3, 3)]


def test_an_encoder_reads_its_prompts_once(tiny_t5):
    model = tiny_t5()
    read = []
    model.encoder.register_forward_hook(lambda *_: read.append(1))
    choice_log_likelihoods(model, model, PROMPTS["of all lengths"], SEVERAL)
    assert read == [1]
    assert choice_log_likelihoods(model, model, [], SINGLE).shape == (0, 4)


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_an_adapted_model_in_training_mode(kind, build):
    wide = {"initializer_factor": 3.0} if kind == "t5" else {"initializer_range": 0.3}
    plain, prompts = build[kind](**wide), PROMPTS["with a long beginning in common"]
    before = likelihoods_by_hand(plain, prompts, SEVERAL)
    model = in_training(plain, std=0.3)
    before_modes = modes(model)
    found = choice_log_likelihoods(model, base_model(model), prompts, SEVERAL)
    assert not found.requires_grad
    assert modes(model) == before_modes
    model.eval()
    by_hand = likelihoods_by_hand(base_model(model), prompts, SEVERAL)
    torch.testing.assert_close(found, by_hand, rtol=1e-4, atol=1e-4)
    assert (by_hand - before).abs().max() > 0.1


def test_bfloat16_is_near(tiny_llama):
    model = tiny_llama(initializer_range=0.3)
    by_hand = likelihoods_by_hand(model, PROMPTS["of all lengths"], SEVERAL)
    found = choice_log_likelihoods(model.bfloat16(), model, PROMPTS["of all lengths"], SEVERAL)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, by_hand, rtol=0.05, atol=0.2)


@pytest.mark.parametrize(
    ("prompts", "choices", "message"),
    [
        ([[5]], [[5], []], r"choices=\[\[5\], \[\]\]: expected at least one token in each"),
        ([[5] * 9], [[5], [6, 7]], "9 tokens and a choice 2, .* --data.long_prompts=cut"),
        ([[5], []], SINGLE, "a prompt has no tokens"),
    ],
)
def test_what_cannot_be_scored(prompts, choices, message, tiny_llama):
    model = tiny_llama(max_position_embeddings=10)
    with pytest.raises(InputError, match=message):
        choice_log_likelihoods(model, model, prompts, choices)
