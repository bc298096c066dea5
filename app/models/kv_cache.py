"""Run a language model with its key-value cache: prompts once, then one token of each row at a time."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils.rnn import pad_sequence
from transformers import Cache, PreTrainedModel

from app.models.text_limits import context_length
from app.utils.errors import InputError

PAD = 0  # what fills short rows is masked, so any token will do


class CachedModel:
    """Runs a causal or encoder-decoder model on a batch of rows that grow, shrink and multiply.

    A causal model's prompts are padded on the left, with positions that do not count the padding; an
    encoder's on the right, and its decoder has no padding at all. Caches are transformers' own. `model` is what
    is called: `base` itself or a wrapper around it.
    """

    def __init__(self, model: nn.Module, base: PreTrainedModel) -> None:
        self.model, self.base = model, base
        self.device = compute_device(model)
        accepted = inspect.signature(base.forward).parameters
        self._options: dict[str, Any] = {}
        if "logits_to_keep" in accepted:  # else the LM head would see every token of the prompts
            self._options["logits_to_keep"] = 1
        self._takes_positions = "position_ids" in accepted
        self._mask: Tensor | None = None  # of the prompts, and of a causal model's outputs too
        self._position: Tensor  # (B, 1) of the next token, for a causal model
        self._encoded: Tensor  # (B, T, d) what the encoder made of the prompts
        self._cache: Cache

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Read the prompts, at least one and one token in each.

        Returns:
            Logits (B, vocabulary) of the first token after each prompt.

        Raises:
            InputError: The model keeps no cache whose rows can be selected.
        """
        encodes = self.base.config.is_encoder_decoder
        ids, mask = padded(prompts, left=not encodes, device=self.device)
        # Without a mask the library takes its fastest attention.
        self._mask = None if len(set(map(len, prompts))) == 1 else mask
        if encodes:
            start = torch.full((len(prompts), 1), decoder_start(self.base), device=self.device)
            inputs = {"input_ids": ids, "decoder_input_ids": start}
        else:
            inputs = {"input_ids": ids}
            if self._takes_positions:
                inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
            self._position = mask.sum(1, keepdim=True)
        out = self._run(inputs)
        cache = out.get("past_key_values")
        if not isinstance(cache, Cache):
            raise InputError(
                f"model.name names a {type(self.base).__name__}, which keeps no cache of transformers "
                "between tokens: outputs can be generated with models that do, such as Llama, GPT-2 or T5"
            )
        self._cache = cache
        if encodes:
            self._encoded = out.encoder_last_hidden_state
        return out.logits[:, -1]

    def step(self, tokens: Tensor) -> Tensor:
        """Take the next token (B,) of each row; return the logits (B, vocabulary) of the token after it."""
        inputs: dict[str, Any] = {"past_key_values": self._cache}
        if self.base.config.is_encoder_decoder:
            inputs |= {"decoder_input_ids": tokens[:, None], "encoder_outputs": (self._encoded,)}
        else:
            inputs["input_ids"] = tokens[:, None]
            if self._takes_positions:
                inputs["position_ids"] = self._position
            self._position = self._position + 1
            if self._mask is not None:
                self._mask = torch.cat([self._mask, self._mask.new_ones(len(tokens), 1)], dim=1)
        return self._run(inputs).logits[:, -1]

    def select_rows(self, rows: Tensor) -> None:
        """Go on with these rows of the batch so far alone, in any order and any number of times."""
        self._cache.reorder_cache(rows)  # type: ignore[arg-type]
        if self._mask is not None:
            self._mask = self._mask[rows]
        if self.base.config.is_encoder_decoder:
            self._encoded = self._encoded[rows]
        else:
            self._position = self._position[rows]

    def idle(self) -> None:
        """Run the modules that `step` runs, for nothing: other processes wait for this one's shards."""
        token = torch.full((1, 1), PAD, device=self.device)
        inputs: dict[str, Any] = {"input_ids": token}
        if self.base.config.is_encoder_decoder:
            inputs = {"decoder_input_ids": token, "encoder_outputs": (self._encoded[:1, :1],)}
        self.model(**inputs, use_cache=False, **self._options)

    def _run(self, inputs: dict[str, Any]) -> Any:
        return self.model(
            **inputs, attention_mask=self._mask, use_cache=True, return_dict=True, **self._options
        )


def padded(
    rows: Sequence[Sequence[int]], left: bool, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return token ids and mask (B, T) of rows, padded to the longest on the left or on the right."""
    side = "left" if left else "right"
    ids = pad_sequence([torch.tensor(row) for row in rows], True, PAD, side)
    mask = pad_sequence([torch.ones(len(row), dtype=torch.int64) for row in rows], True, 0, side)
    return ids.to(device), mask.to(device)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switch dropout off, and put every module's mode back.

    Gradient checkpointing goes with it: it works in training mode alone, where it forbids the cache.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def compute_device(model: nn.Module) -> torch.device:
    """Return where the model computes, which is not where its shards lie if the host keeps them."""
    first = next(model.parameters())
    if isinstance(first, DTensor):
        return torch.device(first.device_mesh.device_type)
    return first.device


def decoder_start(base: PreTrainedModel) -> int:
    """Return the token with which a decoder's output begins."""
    for config in (base.generation_config, base.config):
        start = getattr(config, "decoder_start_token_id", None)
        if start is not None:
            return start
    raise InputError(
        "model.name names an encoder-decoder model whose configuration has no decoder_start_token_id: "
        "expected the token with which its outputs begin; add it to config.json"
    )


def remaining_context(base: PreTrainedModel, prompt: Sequence[int]) -> int | None:
    """Return how many tokens fit into the model's context after a prompt; None if there is no limit.

    A decoder beside an encoder has the whole context for its output.

    Raises:
        InputError: The prompt is empty, or leaves no token for an output.
    """
    if not prompt:
        raise InputError(
            "a prompt has no tokens: expected at least one; mend the benchmark's prompt"
        )
    context = context_length(base.config)
    if context is None:
        return None
    encodes = base.config.is_encoder_decoder
    left = context - len(prompt)
    if left < (0 if encodes else 1):
        raise InputError(
            f"a prompt has {len(prompt)} tokens, but the model's context {context}, of which an output "
            "needs some: ask shorter questions, set --data.long_prompts=cut, or change model.name"
        )
    return context if encodes else left
