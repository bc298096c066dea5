import copy

import pytest
import torch
from torch import nn

from app.models.adapter_config import LoraSettings
from app.models.lora import add_lora
from app.models.loss import summed_loss, supervised_logits
from tests.support.one_step_oracle import BUILDERS, make_batches, model_inputs


@pytest.mark.parametrize("build", BUILDERS)
def test_loss_and_gradients_are_transformers_own(build, request):
    model = request.getfixturevalue(build)()
    plain = copy.deepcopy(model)
    batch = make_batches(model.config.is_encoder_decoder)[0]
    found = supervised_logits(model, model, batch)
    loss = summed_loss(found) / found.labels.numel()
    loss.backward()
    wanted = plain(**model_inputs(batch)).loss
    wanted.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    for (name, a), b in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=1e-4, atol=1e-7), name


@pytest.mark.parametrize("build", BUILDERS)
def test_logits_are_those_of_the_supervised_positions(build, request):
    model = request.getfixturevalue(build)()
    shift = 0 if model.config.is_encoder_decoder else 1
    batch = make_batches(model.config.is_encoder_decoder)[0]
    found = supervised_logits(model, model, batch)
    with torch.no_grad():
        whole = model(**model_inputs(batch)).logits
    row = 0
    for b, labels in enumerate(batch["labels"].tolist()):
        assert found.first[b] == row
        for t, label in enumerate(labels):
            if label == -100:
                continue
            assert torch.allclose(found.logits[row], whole[b, t - shift], atol=1e-6)
            assert found.labels[row] == label
            row += 1
    assert row == len(found.logits) == len(found.labels)


def test_the_head_sees_supervised_positions_alone_and_keeps_no_hook(tiny_llama):
    model = tiny_llama()
    seen = []
    head = model.get_output_embeddings()
    handle = head.register_forward_hook(lambda _, args, out: seen.append(args[0].shape[:-1]))
    batch = make_batches(False)[0]
    wrapped = add_lora(model, LoraSettings(r=4))
    supervised_logits(wrapped, model, batch)
    assert [shape.numel() for shape in seen] == [int((batch["labels"] != -100).sum())]
    handle.remove()
    model.model.forward = None  # any failure inside
    with pytest.raises(TypeError):
        supervised_logits(wrapped, model, batch)
    assert not head._forward_pre_hooks


def test_a_label_at_the_first_position_has_nothing_that_predicts_it(tiny_llama):
    model = tiny_llama()
    batch = dict(make_batches(False)[0])
    found = supervised_logits(model, model, batch)
    batch["labels"] = batch["labels"].clone()
    batch["labels"][:, 0] = batch["input_ids"][:, 0]
    assert torch.equal(supervised_logits(model, model, batch).labels, found.labels)


def test_sum_is_taken_in_float32():
    logits, labels = 30 * torch.randn(64, 50), torch.randint(50, (64,))
    model = type("Found", (), {"logits": logits.bfloat16(), "labels": labels})
    wanted = nn.functional.cross_entropy(logits.bfloat16().double(), labels, reduction="sum")
    loss = summed_loss(model)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
