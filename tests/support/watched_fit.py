"""What a fit shows of itself, for comparison with PEFT's own model in a plain loop."""

import pytest
import torch
from peft import get_peft_model


@torch.no_grad()
def logits(model):
    """Return a model's logits of three rows of all kinds of tokens."""
    ids = torch.arange(3, 60).reshape(3, 19)
    decoder = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    return model.eval()(input_ids=ids, **decoder).logits


def plain_loop(model, batches, lr=1e-3, after_step=lambda model, step: None):
    """Train with AdamW in a few lines of torch; return each step's loss."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    losses = []
    torch.manual_seed(1)  # of dropout
    for step, batch in enumerate(batches, 1):
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "labels")}
        optimizer.zero_grad()
        loss = model.train()(**inputs).loss
        loss.backward()
        optimizer.step()
        after_step(model, step)
        losses.append(float(loss.detach()))
    return losses


def trained_weights(model):
    named = model.named_parameters()
    return {name: p.detach().clone() for name, p in named if p.requires_grad}


@pytest.fixture
def watched_fit(monkeypatch):
    """Return a dict that the next fit fills: batches, losses, trained weights before and after, logits."""
    from app.training.module import LoraModule  # slow to import, which most tests do without

    seen = {"batches": [], "losses": []}
    training_step = LoraModule.training_step

    def watched_step(module, batch, batch_idx):
        if not seen["batches"]:
            seen["first"] = trained_weights(module.model)
            seen["pairs"] = {pair.name: (pair.rank, pair.scaling) for pair in module.lora_pairs()}
        seen["batches"].append(batch)
        loss = training_step(module, batch, batch_idx)
        seen["losses"].append(float(loss.detach()))
        return loss

    def on_fit_end(module):
        seen["logits"] = logits(module.model)
        seen["last"] = trained_weights(module.model)

    monkeypatch.setattr(LoraModule, "training_step", watched_step)
    monkeypatch.setattr(LoraModule, "on_fit_end", on_fit_end, raising=False)
    return seen


def train_pefts_own(watched, base, config, **options):
    """Train PEFT's own model from the fit's first weights on its batches; return it."""
    model = get_peft_model(base, config)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained.keys() == watched["first"].keys()
    with torch.no_grad():
        for name, value in watched["first"].items():
            trained[name].copy_(value)
    plain_loop(model, watched["batches"], **options)
    return model
