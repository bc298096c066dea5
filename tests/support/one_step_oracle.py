"""The oracle of the one-step gradient, plain autograd, and what its tests share."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from app.initialization.one_step_gradient import Estimator, one_step_gradients
from app.models.lora import base_model, lora_pairs

EXACT = Estimator("exact")
BUILDERS = ["tiny_llama", "tiny_gpt2", "tiny_t5"]
"""Fixtures of the three kinds of models."""


def make_batches(is_encoder_decoder, rows=6, size=6, seed=0):
    """Return prompts and answers of unequal lengths, padded per micro-batch, as the data modules do."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 12, (rows,), generator=g).tolist()
    answers = torch.randint(1, 4, (rows,), generator=g).tolist()
    ids = [
        torch.randint(4, 128, (n + a,), generator=g) for n, a in zip(lengths, answers, strict=True)
    ]
    batches = []
    for start in range(0, rows, size):
        chosen = range(start, min(start + size, rows))
        if is_encoder_decoder:
            inputs = [ids[i][: lengths[i]] for i in chosen]
            labels = [ids[i][lengths[i] :] for i in chosen]
        else:
            inputs = [ids[i] for i in chosen]
            labels = [
                torch.cat([torch.full((lengths[i],), -100), ids[i][lengths[i] :]]) for i in chosen
            ]
        pad = nn.utils.rnn.pad_sequence
        mask = [torch.ones_like(row) for row in inputs]
        batches.append(
            {
                "input_ids": pad(inputs, batch_first=True),
                "attention_mask": pad(mask, batch_first=True),
                "labels": pad(labels, batch_first=True, padding_value=-100),
                "index": torch.tensor(list(chosen)),
            }
        )
    return batches


def model_inputs(batch):
    """Return what of a batch transformers' own forward pass takes."""
    return {key: batch[key] for key in ("input_ids", "attention_mask", "labels")}


def oracle(model, batch, train_mode=False):
    """Return transformers' own loss and each weight's gradient, (out_features, in_features)."""
    plain = copy.deepcopy(model).requires_grad_(True).train(train_mode)
    loss = plain(**model_inputs(batch), use_cache=False).loss
    loss.backward()
    gradients = {}
    for name, module in plain.named_modules():
        if isinstance(module, nn.Linear):
            gradients[name] = module.weight.grad
        elif type(module).__name__ == "Conv1D":
            gradients[name] = module.weight.grad.T
    return float(loss), gradients


def untouched_gradients(folder, batches):
    """Return autograd's gradient of the token mean over all batches in every weight of the saved model."""
    model = AutoModelForCausalLM.from_pretrained(folder).double()
    tokens = [int((batch["labels"][:, 1:] != -100).sum()) for batch in batches]
    parts = [oracle(model, batch)[1] for batch in batches]
    return {
        name: sum(n * part[name] for n, part in zip(tokens, parts, strict=True)) / sum(tokens)
        for name in parts[0]
    }


def run(model, batches, estimator=EXACT, rank=4, pairs=None, **options):
    pairs = lora_pairs(model) if pairs is None else pairs
    return one_step_gradients(model, base_model(model), pairs, batches, rank, estimator, **options)


def run_whole(model, batches, estimator=EXACT, **options):
    """Keep every triplet: one run for each size of layer, put together."""
    by_size = {}
    for pair in lora_pairs(model):
        by_size.setdefault(min(pair.lora_B.shape[0], pair.lora_A.shape[1]), []).append(pair)
    results = [run(model, batches, estimator, r, pairs, **options) for r, pairs in by_size.items()]
    for result in results[1:]:
        assert result.loss == results[0].loss
        results[0].estimates.update(result.estimates)
    return results[0]


def matrix(estimate, rank=None):
    """Return the matrix that an estimate stands for, or its best approximation of a rank."""
    U, S, V = estimate.svd
    return U[:, :rank] * S[:rank] @ V[:, :rank].T


def assert_same(result, loss, gradients, tolerance=1e-5):
    assert result.loss == pytest.approx(loss, rel=tolerance)
    assert result.estimates
    for name, estimate in result.estimates.items():
        error = (matrix(estimate) - gradients[name]).norm() / gradients[name].norm()
        assert float(error) <= tolerance, (name, float(error))


def checkpointed(model, reentrant=False):
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    return model


def snapshot(model):
    return (
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        {name: p.requires_grad for name, p in model.named_parameters()},
        {name: p.grad for name, p in model.named_parameters()},
        {name: module.training for name, module in model.named_modules()},
        {
            name: len(m._forward_hooks) + len(m._forward_pre_hooks)
            for name, m in model.named_modules()
        },
        {name: p.data_ptr() for name, p in model.named_parameters()},
        {pair.name: pair.layer.disable_adapters for pair in lora_pairs(model)},
        torch.get_rng_state(),
    )


def assert_untouched(model, before):
    after = snapshot(model)
    for name, tensor in before[0].items():
        assert torch.equal(after[0][name], tensor), name
    assert all(gradient is None for gradient in after[2].values())
    assert after[1:7] == before[1:7]
    assert torch.equal(after[7], before[7])
