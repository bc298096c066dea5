"""Write outputs to prompts in batches: greedy or sampled, each row until its own end."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import (
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from app.distributed.collectives import any_rank
from app.models.kv_cache import PAD, CachedModel, evaluation_mode, room
from app.utils.errors import InputError


@dataclass(frozen=True)
class Decoding:
    """How outputs are generated.

    Args:
        max_new_tokens: Most tokens of an output.
        stop: Strings that end an output, which does not hold them.
        num_samples: Outputs of each question.
        temperature: Divides the logits; 0 takes the most likely token (greedy).
        top_p: Sample among the most likely tokens that together have this probability.
        seed: Fixes the samples of each question, whatever batch or process it is in.
    """

    max_new_tokens: int = 512
    stop: Sequence[str] = ()
    num_samples: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, holds, expected in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("num_samples", self.num_samples >= 1, "at least 1"),
            ("temperature", self.temperature >= 0, "0 (greedy) or more"),
            ("top_p", 0 < self.top_p <= 1, "more than 0, at most 1"),
            ("stop", not isinstance(self.stop, str) and all(self.stop), "a list of strings"),
        ):
            if not holds:
                raise InputError(f"decoding.{name}={getattr(self, name)!r}: expected {expected}")
        if self.num_samples > 1 and self.temperature == 0:
            raise InputError(
                f"decoding.num_samples={self.num_samples} with decoding.temperature=0: greedy outputs are all "
                "the same; raise the temperature or ask for one sample"
            )


NOT_FINITE = -1  # in the place of a token: the model gave no probabilities


@dataclass(frozen=True)
class Generated:
    """One output.

    Attributes:
        text: What follows the prompt, without special tokens, EOS, and the stop string that ended it.
        num_tokens: Tokens generated, those that ended it among them.
        finished: Whether EOS or a stop string ended it, and not the lack of room.
    """

    text: str
    num_tokens: int
    finished: bool


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
    """Write `decoding.num_samples` outputs to each prompt.

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
    ends = _end_token_ids(base, tokenizer, decoding)
    stop = _StopStrings(tokenizer, decoding.stop)
    outputs = []
    for prompt, key in zip(prompts, keys, strict=True):
        free = room(base, prompt)
        limit = decoding.max_new_tokens if free is None else min(free, decoding.max_new_tokens)
        before = None if base.config.is_encoder_decoder else prompt[-1]
        outputs.append([_Output(key, before, limit) for _ in range(decoding.num_samples)])
    with evaluation_mode(model):
        reader = CachedModel(model, base)
        logits = reader.prefill(prompts or [[PAD]])
        rows = [output for samples in outputs for output in samples]
        if decoding.num_samples > 1 and rows:
            repeated = torch.arange(len(prompts)).repeat_interleave(decoding.num_samples)
            repeated = repeated.to(reader.device)
            reader.take(repeated)
            logits = logits[repeated]
        choose = _Sampled(keys, decoding, reader.device) if decoding.temperature else _Greedy()
        while True:
            if rows:
                tokens = choose(logits)
                for output, token in zip(rows, tokens.tolist(), strict=True):
                    output.add(token, ends, stop)
                kept = [number for number, output in enumerate(rows) if not output.ended]
                if 0 < len(kept) < len(rows):
                    index = torch.tensor(kept, device=reader.device)
                    reader.take(index)
                    choose.take(index)
                    tokens = tokens[index]
                rows = [rows[number] for number in kept]
            unfinished = bool(rows)
            if not (any_rank(unfinished, reader.device) if together else unfinished):
                break
            if rows:
                logits = reader.step(tokens)
            else:
                reader.idle()
    return [[stop.cut(output) for output in samples] for samples in outputs]


def _end_token_ids(
    base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, decoding: Decoding
) -> set[int]:
    named = getattr(base.generation_config, "eos_token_id", None)
    several = named if isinstance(named, (list, tuple)) else [named]
    found = {token for token in (*several, tokenizer.eos_token_id) if token is not None}
    if not found and not decoding.stop:
        raise InputError(
            "neither the model nor the tokenizer of model.name has an end-of-text token (eos_token_id), and "
            "decoding.stop is empty, so that no output would end: name a model that has one, or give the "
            "benchmark stop strings"
        )
    return found


class _Output:
    """One output as it grows.

    Args:
        key: The question's name.
        before: The prompt's last token; None where the output is a text of its own.
        limit: Most tokens.
    """

    def __init__(self, key: str, before: int | None, limit: int) -> None:
        self.key, self.before, self.limit = key, before, limit
        self.tokens: list[int] = []
        self.has_end_token = False
        self.finished = False

    @property
    def ended(self) -> bool:
        return self.finished or len(self.tokens) == self.limit

    def add(self, token: int, ends: set[int], stop: "_StopStrings") -> None:
        if token == NOT_FINITE:
            raise InputError(
                f"the model's logits are not finite {len(self.tokens)} tokens into its answer to "
                f"{self.key!r}: its weights have diverged, or need a wider precision (model.dtype, "
                "trainer.precision)"
            )
        self.tokens.append(token)
        self.has_end_token = token in ends
        self.finished = self.has_end_token or stop.just_came(self)


class _StopStrings:
    """Finds stop strings in outputs that grow by a token, in time that does not depend on their length."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, strings: Sequence[str]) -> None:
        self.tokenizer, self.strings = tokenizer, strings
        # A token is at least one byte of text.
        self.window = max((len(string.encode()) for string in strings), default=0)

    def just_came(self, output: _Output) -> bool:
        """Return whether the newest token completes a stop string; special tokens count by their names."""
        if not self.strings:
            return False
        tokens = output.tokens
        before = tokens[-self.window - 1] if len(tokens) > self.window else output.before
        text = self._text(before, tokens[-self.window :], skip_special_tokens=False)
        return any(string in text for string in self.strings)

    def cut(self, output: _Output) -> Generated:
        """Return what came before the first stop string."""
        tokens = output.tokens[:-1] if output.has_end_token else output.tokens
        text = self._text(output.before, tokens, skip_special_tokens=True)
        places = [place for place in map(text.find, self.strings) if place >= 0]
        return Generated(
            text[: min(places, default=len(text))],
            num_tokens=len(output.tokens),
            finished=output.finished or bool(places),
        )

    def _text(self, before: int | None, tokens: list[int], skip_special_tokens: bool) -> str:
        """Decode tokens behind another, since SentencePiece drops a space where a text begins."""

        def decode(ids: list[int]) -> str:
            return self.tokenizer.decode(  # type: ignore[return-value]
                ids,
                skip_special_tokens=skip_special_tokens,
                clean_up_tokenization_spaces=False,
            )

        if before is None:
            return decode(tokens)
        return decode([before, *tokens]).removeprefix(decode([before]))


class _Greedy:
    """Takes the likeliest token."""

    def __call__(self, logits: Tensor) -> Tensor:
        """Return the token of each row of logits (B, vocabulary), or NOT_FINITE."""
        largest, tokens = logits.float().max(dim=-1)
        return tokens.where(largest.isfinite(), NOT_FINITE)

    def take(self, rows: Tensor) -> None:
        """Go on with these rows alone."""


class _Sampled:
    """Draws tokens, with randomness that belongs to the sample.

    Args:
        keys: Name of each prompt.
        decoding: Temperature, top_p, samples and seed.
        device: Where the logits are.
    """

    def __init__(self, keys: Sequence[str], decoding: Decoding, device: torch.device) -> None:
        self.warpers = LogitsProcessorList([TemperatureLogitsWarper(float(decoding.temperature))])
        if decoding.top_p < 1:
            self.warpers.append(TopPLogitsWarper(decoding.top_p))
        numbers = range(decoding.num_samples)
        draws = [uniform(decoding, key, number) for key in keys for number in numbers]
        self.draws = torch.stack(draws).to(device) if draws else torch.empty(0)
        self.step = 0

    def __call__(self, logits: Tensor) -> Tensor:
        """Return a token for each row of logits (B, vocabulary), or NOT_FINITE."""
        scores = self.warpers(None, logits.float())  # type: ignore[arg-type]
        below = scores.double().softmax(dim=-1).cumsum(dim=-1)
        total = below[:, -1:]
        drawn = self.draws[:, self.step, None] * total
        self.step += 1
        tokens = torch.searchsorted(below, drawn, right=True)
        return tokens.where(total.isfinite(), NOT_FINITE)[:, 0]

    def take(self, rows: Tensor) -> None:
        """Go on with these rows alone."""
        self.draws = self.draws[rows]


def uniform(decoding: Decoding, key: str, number: int) -> Tensor:
    """Return the draws of one sample, (max_new_tokens,) in [0, 1), float64, the same on every device."""
    name = f"{decoding.seed}/{number}/{key}"
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big", signed=True)
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(decoding.max_new_tokens, generator=generator, dtype=torch.float64)
