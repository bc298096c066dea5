"""Generate outputs to prompts in batches, each row until its own end.

transformers has two engines of its own. On 50 GSM8K questions and SmolLM2-135M on a CPU, `generate`, whose
batch waits for its longest row, takes 1.6 times the CPU time of this one. `generate_batch` (continuous
batching) takes 1.2 times, and knows neither encoder-decoder models, nor stop strings, nor sharded weights.

    OMP_NUM_THREADS=1 python benchmarks/generation.py gsm8k/test.jsonl
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from app.distributed.collectives import any_rank
from app.models.decoding import Decoding, Sampler
from app.models.kv_cache import PAD, CachedModel, evaluation_mode, remaining_context
from app.models.outputs import Generated, Output, StopStrings
from app.utils.errors import InputError


@torch.no_grad()
def generate(
    model: nn.Module,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    keys: Sequence[str],
    decoding: Decoding,
    together: bool = False,
) -> list[list[Generated]]:
    """Generate `decoding.num_samples` outputs to each prompt.

    All prompts are read at once, and once for all their samples; a row that has ended leaves the batch.
    A row ends with EOS (the model's or the tokenizer's), as soon as its text holds a stop string, after
    `max_new_tokens`, or where the model's context is full.

    Greedy takes the likeliest token. Else token t of a sample is drawn from
    p = softmax(logits / temperature), cut to the likeliest tokens of probability top_p, by

        the first token whose p, added up in the order of the vocabulary, exceeds u_t

    with u_t uniform in [0, 1) from a generator of the sample's own, so that neither the batch nor the
    number of processes changes it.

    Args:
        model: What is called: the model itself or a wrapper around it.
        base: The transformers model inside, for its configuration.
        tokenizer: The model's.
        prompts: Token ids of each row, with BOS where the model expects one.
        keys: Name of each row, which with `decoding.seed` and the sample's number seeds the sample.
        decoding: How outputs are generated.
        together: Whether the processes run the model in step because it is sharded. All call this
            function then, also those without a prompt, and run until the last has finished.

    Returns:
        The outputs of each prompt, in the rows' order.

    Raises:
        InputError: A prompt does not fit into the model's context, nothing would ever end an output, the model
            keeps no usable cache, or its logits are not finite.

    Source: text, for greedy decoding, is that of transformers' `generate` for each row alone.
    Differs: what else `generation_config` holds, such as a repetition penalty or top_k, is not applied;
        EOS is the tokenizer's too, with which fine-tuned answers end; the text is decoded behind the
        prompt, so that SentencePiece keeps its first space, and its spaces are not cleaned up.
    """
    if not prompts and not together:
        return []
    stop = StopStrings(tokenizer, decoding.stop, _end_token_ids(base, tokenizer, decoding))
    outputs = _new_outputs(base, prompts, keys, decoding)
    rows = [output for samples in outputs for output in samples]
    with evaluation_mode(model):
        cached = CachedModel(model, base)
        logits = cached.prefill(prompts or [[PAD]])
        if decoding.num_samples > 1 and rows:
            copies = torch.arange(len(prompts)).repeat_interleave(decoding.num_samples)
            cached.select_rows(copies.to(cached.device))
            logits = logits[copies.to(cached.device)]
        sampler = Sampler(keys, decoding, cached.device)
        _decode(rows, logits, cached, sampler, stop, together)
    return [[stop.cut(output) for output in samples] for samples in outputs]


def _decode(
    rows: list[Output],
    logits: Tensor,
    cached: CachedModel,
    sampler: Sampler,
    stop: StopStrings,
    together: bool,
) -> None:
    """Add tokens to all rows until each has ended; `logits` (B, vocabulary) are those of the first."""
    while True:
        if rows:
            tokens = sampler.next_tokens(logits)
            for output, token in zip(rows, tokens.tolist(), strict=True):
                output.add(token, stop)
            kept = [number for number, output in enumerate(rows) if not output.ended]
            if 0 < len(kept) < len(rows):
                index = torch.tensor(kept, device=cached.device)
                cached.select_rows(index)
                sampler.select_rows(index)
                tokens = tokens[index]
            rows = [rows[number] for number in kept]
        if not (any_rank(bool(rows), cached.device) if together else rows):
            return
        if rows:
            logits = cached.step(tokens)
        else:
            cached.idle()


def _new_outputs(
    base: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    keys: Sequence[str],
    decoding: Decoding,
) -> list[list[Output]]:
    outputs = []
    for prompt, key in zip(prompts, keys, strict=True):
        remaining = remaining_context(base, prompt)
        limit = min(remaining or decoding.max_new_tokens, decoding.max_new_tokens)
        before = None if base.config.is_encoder_decoder else prompt[-1]
        outputs.append([Output(key, before, limit) for _ in range(decoding.num_samples)])
    return outputs


def _end_token_ids(
    base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, decoding: Decoding
) -> set[int]:
    named = getattr(base.generation_config, "eos_token_id", None)
    several = named if isinstance(named, (list, tuple)) else [named]
    ends = {token for token in (*several, tokenizer.eos_token_id) if token is not None}
    if not ends and not decoding.stop:
        raise InputError(
            "neither the model nor the tokenizer of model.name has an end-of-text token (eos_token_id), and "
            "decoding.stop is empty, so that no output would end: name a model that has one, or give the "
            "benchmark stop strings"
        )
    return ends
