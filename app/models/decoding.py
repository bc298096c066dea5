"""How outputs are generated, and which token comes next."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from app.utils.errors import InputError

NOT_FINITE = -1  # in the place of a token: the model gave no probabilities


@dataclass(frozen=True)
class Decoding:
    """How outputs are generated."""

    max_new_tokens: int = 512  # most tokens of an output
    stop: Sequence[str] = ()  # strings that end an output, which does not hold them
    num_samples: int = 1  # outputs of each question
    temperature: float = 0.0  # divides the logits; 0 takes the most likely token (greedy)
    top_p: float = 1.0  # sample among the most likely tokens that together have this probability
    seed: int = 0  # fixes the samples of each question, whatever batch or process it is in

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


class Sampler:
    """Choose the next token of each row: the likeliest, or one drawn by the sample's own random numbers.

    `keys` are the names of the prompts, which seed their samples.
    """

    def __init__(self, keys: Sequence[str], decoding: Decoding, device: torch.device) -> None:
        self.draws: Tensor | None = None  # (B, max_new_tokens)
        self.step = 0
        if decoding.temperature and keys:
            numbers = range(decoding.num_samples)
            draws = [uniform(decoding, key, number) for key in keys for number in numbers]
            self.draws = torch.stack(draws).to(device)
            self.warpers = LogitsProcessorList(
                [TemperatureLogitsWarper(float(decoding.temperature))]
            )
            if decoding.top_p < 1:
                self.warpers.append(TopPLogitsWarper(decoding.top_p))

    def next_tokens(self, logits: Tensor) -> Tensor:
        """Return the token (B,) of each row of logits (B, vocabulary), or NOT_FINITE."""
        if self.draws is None:
            largest, tokens = logits.float().max(dim=-1)
            return tokens.where(largest.isfinite(), NOT_FINITE)
        scores = self.warpers(None, logits.float())  # type: ignore[arg-type]
        below = scores.double().softmax(dim=-1).cumsum(dim=-1)
        total = below[:, -1:]
        drawn = self.draws[:, self.step, None] * total
        self.step += 1
        tokens = torch.searchsorted(below, drawn, right=True)
        return tokens.where(total.isfinite(), NOT_FINITE)[:, 0]

    def select_rows(self, rows: Tensor) -> None:
        """Go on with these rows alone."""
        if self.draws is not None:
            self.draws = self.draws[rows]


def uniform(decoding: Decoding, key: str, number: int) -> Tensor:
    """Return the draws of one sample, (max_new_tokens,) in [0, 1), float64, the same on every device."""
    name = f"{decoding.seed}/{number}/{key}"
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big", signed=True)
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(decoding.max_new_tokens, generator=generator, dtype=torch.float64)
