"""The authors' training in a few lines of torch and PEFT: the oracle of configs/paper.yaml.

Rows are passed one by one, as in micro-batches of one, and each one's mean over its tokens is averaged.
"""

import copy
from typing import NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from torch import nn


class Settings(NamedTuple):
    """Of the training; `gamma` is the authors' `stable_gamma`."""

    r: int
    lora_alpha: int
    gamma: float
    lr: float
    warmup_steps: int
    num_samples: int = 8
    clip: float = 1.0


def rows_by_number(batches):
    """Return each row of a causal model's batches as input_ids (1, T) and labels (1, T), without padding."""
    rows = {}
    for batch in batches:
        for i, number in enumerate(batch["index"].tolist()):
            read = batch["attention_mask"][i].bool()
            rows[number] = batch["input_ids"][i][None, read], batch["labels"][i][None, read]
    return rows


def row_loss(model, row):
    """Return the mean over the supervised tokens of one row, in the model's own precision."""
    input_ids, labels = row
    logits = model(input_ids=input_ids, use_cache=False).logits
    return nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:])


def authors_factors(G, r, gamma):
    """Return lora_A (r, n) and lora_B (m, r) of G (m, n) by their formula and their decomposition."""
    U, S, V = torch.svd_lowrank(-G, q=min(512, *G.shape), niter=16)
    root = (S[:r] / S[0]).sqrt() / gamma**0.5
    return root[:, None] * V[:, :r].T, U[:, :r] * root


def mean_gradients(model, rows):
    """Return dL/dW of every linear layer, L the mean of the rows' losses, in training mode."""
    model = copy.deepcopy(model).requires_grad_(True).train()
    for row in rows:
        (row_loss(model, row) / len(rows)).backward()
    layers = model.named_modules()
    return {name: m.weight.grad for name, m in layers if isinstance(m, nn.Linear)}


def paper_loop(base, rows, order, settings):
    """Train a copy of a causal model; return each step's loss, and the norms of the gradients before clipping.

    Args:
        base: The model without an adapter.
        rows: From `rows_by_number`.
        order: Numbers of the rows of each step.
        settings: See `Settings`.
    """
    r, lora_alpha, gamma = settings.r, settings.lora_alpha, settings.gamma
    gradients = mean_gradients(base, [rows[i] for i in range(settings.num_samples)])
    config = LoraConfig(r=r, lora_alpha=lora_alpha, use_rslora=True, target_modules="all-linear")
    model = get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=False).train()
    for name, module in model.get_base_model().named_modules():
        if hasattr(module, "lora_A"):
            A, B = authors_factors(gradients[name], r, gamma)
            module.lora_A["default"].weight.data = A.contiguous()
            module.lora_B["default"].weight.data = B.contiguous()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings.lr, weight_decay=0.0)
    losses, norms, warmup = [], [], settings.warmup_steps
    for step, numbers in enumerate(order):
        left = (len(order) - step) / (len(order) - warmup)
        optimizer.param_groups[0]["lr"] = settings.lr * min(step / warmup, left)
        optimizer.zero_grad()
        total = 0.0
        for number in numbers:
            loss = row_loss(model, rows[number]) / len(numbers)
            loss.backward()
            total += float(loss.detach())
        norms.append(float(nn.utils.clip_grad_norm_(trained, settings.clip)))
        optimizer.step()
        losses.append(total)
    return losses, norms
