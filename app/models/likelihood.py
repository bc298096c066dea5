"""Compute how likely a model finds each of a few continuations of a prompt."""

import copy
from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from app.distributed.collectives import any_rank
from app.models.kv_cache import (
    PAD,
    compute_device,
    decoder_start,
    evaluation_mode,
    padded,
    remaining_context,
)
from app.models.loss import select_positions_for_lm_head
from app.utils.errors import InputError

SHORTEST_PREFIX = 64  # tokens from which on a pass of its own over a common beginning is worth it
LogitsAfter = Callable[[Sequence[int]], Tensor]
"""From the L first tokens of a choice to the logits (B, L + 1, vocabulary) that predict them and the next."""


@torch.no_grad()
def choice_log_likelihoods(
    model: nn.Module,
    base: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    choices: Sequence[Sequence[int]],
    together: bool = False,
) -> Tensor:
    """Compute the log-likelihood of every choice after every prompt.

        log p(choice | prompt) = sum over t of log softmax(logits)[choice_t],    given prompt and choice_<t

    Choices that differ in their last token alone share a forward pass, so that single tokens take one;
    only the positions that predict a choice reach the LM head of a causal model. What several of its
    prompts begin with, such as solved examples, runs once, and its keys and values serve all of them
    (of a sharded model, only what all prompts begin with: every pass gathers the weights).

    Args:
        model: What is called: the model itself or a wrapper around it.
        base: The transformers model inside, for its head, its kind and its configuration.
        prompts: Token ids of each row.
        choices: Token ids of each choice, at least one; an encoder-decoder model's decoder begins with them.
        together: Whether the processes run the model in step because it is sharded. All call this
            function then, with the same choices, also those without a prompt.

    Returns:
        Log-likelihoods (B, C) in nats, float32, on the model's device.

    Raises:
        InputError: A choice is empty, or a prompt and a choice do not fit into the model's context.

    Source: the sums that EleutherAI/lm-evaluation-harness compares for multiple choice.
    """
    device = compute_device(model)
    likelihoods = torch.zeros(len(prompts), len(choices), device=device)
    if not prompts and not together:
        return likelihoods
    _check_lengths(base, prompts, choices)
    encodes = base.config.is_encoder_decoder
    families = [list(range(len(prompts)))] if encodes or together else _families(prompts)
    with evaluation_mode(model):
        for rows in families:
            family = [prompts[row] for row in rows] or [[PAD]]
            if encodes:
                logits_after = _decoder_logits(model, base, family, device)
            else:
                logits_after = _causal_logits(model, base, family, device, together)
            for fed in dict.fromkeys(tuple(choice[:-1]) for choice in choices):
                own = [number for number, choice in enumerate(choices) if tuple(choice[:-1]) == fed]
                logs = logits_after(fed).float().log_softmax(dim=-1)[: len(rows)]
                tokens = torch.tensor([list(choices[number]) for number in own], device=device)
                places = torch.arange(len(fed) + 1, device=device)
                sums = logs[:, places, tokens].sum(dim=-1)
                places_of_rows = torch.tensor(rows, dtype=torch.int64)[:, None]
                likelihoods[places_of_rows, torch.tensor(own)] = sums
    return likelihoods


def _check_lengths(
    base: PreTrainedModel, prompts: Sequence[Sequence[int]], choices: Sequence[Sequence[int]]
) -> None:
    if not all(choices):
        raise InputError(
            f"choices={[list(c) for c in choices]}: expected at least one token in each"
        )
    longest = max(map(len, choices))
    for prompt in prompts:
        remaining = remaining_context(base, prompt)
        if remaining is not None and remaining < longest:
            raise InputError(
                f"a prompt has {len(prompt)} tokens and a choice {longest}, which do not fit into the "
                "model's context: set --data.long_prompts=cut, or change model.name"
            )


def _causal_logits(
    model: nn.Module,
    base: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    device: torch.device,
    together: bool,
) -> LogitsAfter:
    """Run what all prompts begin with once; return what runs the rest of them with a beginning of a choice."""
    head: Any = base.get_output_embeddings()
    shared = _shared_length(prompts)

    def run(rows: Sequence[Sequence[int]], scored: int, **options: Any) -> Any:
        # Padded on the right, where no token sees it, so that neither mask nor positions need to know.
        ids, _ = padded(rows, left=False, device=device)
        last = torch.tensor([[len(row)] for row in rows], device=device)
        places = torch.arange(ids.shape[1], device=device)
        chosen = (places < last) & (places >= last - scored)
        with select_positions_for_lm_head(head, chosen):
            return model(input_ids=ids, **options)

    beginning: Any = None
    # Processes that run in step take the same number of passes.
    if any_rank(shared > 0, device) if together else shared > 0:
        out = run([prompts[0][: shared or 1]], 1, use_cache=True)
        beginning = out.past_key_values if shared else None

    def logits_after(fed: Sequence[int]) -> Tensor:
        rows = [[*prompt[shared:], *fed] for prompt in prompts]
        cache = copy.deepcopy(beginning)
        if cache is not None:
            cache.reorder_cache(torch.zeros(len(rows), dtype=torch.int64, device=device))
        scored = len(fed) + 1
        out = run(rows, scored, past_key_values=cache, use_cache=cache is not None)
        return out.logits[0].unflatten(0, (len(rows), scored))

    return logits_after


def _decoder_logits(
    model: nn.Module,
    base: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    device: torch.device,
) -> LogitsAfter:
    """Return what runs the decoder on a beginning of a choice; the first time encodes the prompts."""
    ids, mask = padded(prompts, left=False, device=device)
    inputs: dict[str, Any] = {"input_ids": ids}

    def logits_after(fed: Sequence[int]) -> Tensor:
        nonlocal inputs
        row = torch.tensor([decoder_start(base), *fed], device=device)
        decoded = row.expand(len(mask), -1)
        out = model(**inputs, attention_mask=mask, decoder_input_ids=decoded, use_cache=False)
        inputs = {"encoder_outputs": (out.encoder_last_hidden_state,)}
        return out.logits

    return logits_after


def _families(prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Group the rows whose prompts begin alike; those that are like no other form one group."""
    families: list[list[int]] = []
    for row in sorted(range(len(prompts)), key=lambda row: tuple(prompts[row])):
        if families and _common([prompts[families[-1][-1]], prompts[row]]) >= SHORTEST_PREFIX:
            families[-1].append(row)
        else:
            families.append([row])
    alone = [rows[0] for rows in families if len(rows) == 1]
    return [rows for rows in families if len(rows) > 1] + ([alone] if alone else [])


def _shared_length(prompts: Sequence[Sequence[int]]) -> int:
    """Return how many tokens all prompts begin with, short of a whole prompt; 0 if too few to count."""
    shared = min(_common(prompts), min(map(len, prompts)) - 1)
    return shared if len(prompts) > 1 and shared >= SHORTEST_PREFIX else 0


def _common(prompts: Sequence[Sequence[int]]) -> int:
    """Return how many tokens all prompts begin with."""
    # What the first and the last in the order of a dictionary share, all those between them share.
    pairs = zip(min(map(tuple, prompts)), max(map(tuple, prompts)), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
