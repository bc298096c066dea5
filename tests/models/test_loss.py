import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
)

from app.models import chunked_loss
from app.models.adapter_config import LoraSettings
from app.models.lora import add_lora, base_model, lora_pairs
from app.models.loss import summed_loss, supervised_logits, supervised_loss
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


@pytest.fixture
def chunk_rows(monkeypatch):
    """Set the number of positions of a chunk for a vocabulary of 128, whatever the head's size."""

    def set_rows(rows):
        monkeypatch.setattr(chunked_loss, "chunk_size", lambda *_: rows)

    return set_rows


def loss_and_gradients(model, batch, chunked, weighting="tokens"):
    model.zero_grad()
    if chunked:
        loss, number = supervised_loss(model, base_model(model), batch, weighting)
    else:
        found = supervised_logits(model, base_model(model), batch)
        loss, number = summed_loss(found, weighting), len(found.labels)
        number = number if weighting == "tokens" else len(found.rows.unique())
    (loss * 0.7).backward()
    named = model.named_parameters()
    return loss.item(), number, {n: p.grad.clone() for n, p in named if p.grad is not None}


def assert_chunks_change_nothing(model, batch, weighting="tokens"):
    loss, number, gradients = loss_and_gradients(model, batch, True, weighting)
    wanted, their_number, theirs = loss_and_gradients(model, batch, False, weighting)
    assert loss == pytest.approx(wanted, rel=1e-6)
    assert number == their_number
    assert gradients.keys() == theirs.keys()
    assert gradients
    for name, gradient in gradients.items():
        assert (gradient - theirs[name]).norm() <= 1e-6 * theirs[name].norm() + 1e-9, name


@pytest.mark.parametrize("rows", [1, 5, 1000])
@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("trained", ["all", "lora", "head"])
def test_chunks_change_neither_loss_nor_gradients(trained, build, rows, chunk_rows, request):
    model = request.getfixturevalue(build)()
    batch = make_batches(model.config.is_encoder_decoder)[0]
    if trained != "all":
        # GPT-2's head is its embedding: PEFT's wrapper of it shares the frozen weight.
        targets = ["lm_head"] if trained == "head" else "all-linear"
        model = add_lora(model, LoraSettings(r=4, target_modules=targets))
        for pair in lora_pairs(model):
            nn.init.normal_(pair.lora_B, std=0.1)
    chunk_rows(rows)
    for weighting in ("tokens", "rows"):
        assert_chunks_change_nothing(model.double(), batch, weighting)


def mean_of_row_means(model, batch):
    """Return transformers' own loss of each row alone, averaged over the rows that are supervised."""
    rows = [i for i, labels in enumerate(batch["labels"]) if bool((labels != -100).any())]
    inputs = model_inputs(batch)
    losses = [model(**{k: v[i : i + 1] for k, v in inputs.items()}).loss for i in rows]
    return torch.stack(losses).mean()


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("build", BUILDERS)
def test_rows_count_alike_whatever_their_number_of_tokens(build, chunked, request):
    """One row has no supervised token, as the padding rows of several processes, and does not count."""
    model = request.getfixturevalue(build)().double()
    plain = copy.deepcopy(model)
    batch = dict(make_batches(model.config.is_encoder_decoder)[0])
    batch["labels"] = batch["labels"].clone()
    batch["labels"][2] = -100
    loss, number, gradients = loss_and_gradients(model, batch, chunked, "rows")
    wanted = mean_of_row_means(plain, batch)
    (wanted * 0.7).backward()
    assert number == 5
    assert loss / number == pytest.approx(wanted.item(), rel=1e-6)
    tokens, count, _ = loss_and_gradients(model, batch, chunked, "tokens")
    assert tokens / count != pytest.approx(wanted.item(), rel=1e-5)
    for name, p in plain.named_parameters():
        error = (gradients[name] / number - p.grad).norm()
        assert error <= 1e-6 * p.grad.norm(), name


def test_without_supervised_positions_all_gradients_are_zero(tiny_llama):
    batch = dict(make_batches(False)[0])
    batch["labels"] = torch.full_like(batch["labels"], -100)
    for weighting in ("tokens", "rows"):
        assert_chunks_change_nothing(tiny_llama(), batch, weighting)


def seen_by(head, call):
    sizes = []
    handle = head.register_forward_hook(lambda _, args, out: sizes.append(out.shape[-2]))
    call()
    handle.remove()
    return sizes


def test_a_chunk_outweighs_the_weights_that_it_reads():
    def head(n, trained):
        return nn.Linear(n, 1000, bias=False, device="meta", dtype=torch.bfloat16).requires_grad_(
            trained
        )

    at_least = chunked_loss.CHUNK_BYTES // (4 * 1000)
    assert chunked_loss.chunk_size(head(64, trained=False), 1000) == at_least
    # A quarter of the weights' bytes, and all of the float32 gradient.
    assert chunked_loss.chunk_size(head(2**20, trained=False), 1000) == 2**20 * 2 // 4 // 4
    assert chunked_loss.chunk_size(head(2**20, trained=True), 1000) == 2**20
    assert chunked_loss.chunk_size(head(1, trained=False), 2**40) == 1


def test_chunks_are_computed_while_fsdp2_has_the_heads_weights(tiny_llama, chunk_rows):
    model = add_lora(tiny_llama(), LoraSettings(r=4))
    for pair in lora_pairs(model):
        nn.init.normal_(pair.lora_B, std=0.1)
    batch = make_batches(False)[0]
    wanted, _, theirs = loss_and_gradients(model, batch, chunked=False)
    chunk_rows(4)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        trained = {p for p in model.parameters() if p.requires_grad}
        mesh = init_device_mesh("cpu", (1,))
        fully_shard(model, mesh=mesh, ignored_params=trained, reshard_after_forward=True)
        loss, _, gradients = loss_and_gradients(model, batch, chunked=True)
    finally:
        dist.destroy_process_group()
    assert loss == pytest.approx(wanted, rel=1e-6)
    for name, gradient in gradients.items():
        assert (gradient - theirs[name]).norm() <= 1e-5 * theirs[name].norm(), name


def test_no_more_positions_at_once_than_a_chunk_has(tiny_llama, chunk_rows):
    model = add_lora(tiny_llama(), LoraSettings(r=4))
    batch = make_batches(False)[0]
    chunk_rows(4)
    supervised = int((batch["labels"][:, 1:] != -100).sum())
    assert supervised % 4
    head = base_model(model).get_output_embeddings()
    sizes = seen_by(head, lambda: supervised_loss(model, base_model(model), batch))
    assert sizes == [0] + [4] * (supervised // 4) + [supervised % 4]
    assert not head._forward_pre_hooks
    assert not head._forward_hooks
    assert not model._forward_hooks


CAPPED = {
    "soft-capped": (Gemma2Config, Gemma2ForCausalLM, {"final_logit_softcapping": 0.5}),
    "divided": (GraniteConfig, GraniteForCausalLM, {"logits_scaling": 0.3}),
    "multiplied": (CohereConfig, CohereForCausalLM, {"logit_scale": 4.0}),
}


@pytest.mark.parametrize("name", CAPPED)
def test_what_an_architecture_does_with_logits_is_done_with_each_chunk(name, chunk_rows):
    config, architecture, settings = CAPPED[name]
    torch.manual_seed(0)
    model = architecture(
        config(
            **{"vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8},
            **{"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2},
            **{"pad_token_id": 0, "initializer_range": 0.3, **settings},
        )
    )
    chunk_rows(4)
    batch = make_batches(False)[0]
    assert_chunks_change_nothing(model.double(), batch)
    loss, number = supervised_loss(model, model, batch)
    wanted = model(**model_inputs(batch)).loss
    assert loss.item() / number == pytest.approx(wanted.item(), rel=1e-5)


def test_logits_that_are_not_made_of_the_heads_output_are_refused(tiny_llama, monkeypatch):
    model = tiny_llama()
    original = type(model).forward

    def forward(self, *args, **kwargs):
        output = original(self, *args, **kwargs)
        return type(output)(logits=torch.zeros(output.logits.shape))

    monkeypatch.setattr(type(model), "forward", forward)
    with pytest.raises(RuntimeError, match="not a chain of functions"):
        supervised_loss(model, model, make_batches(False)[0])


@pytest.mark.parametrize(("dtype", "autocast"), [(torch.bfloat16, False), (torch.float32, True)])
def test_chunks_in_16_bits_are_as_near_to_the_exact_gradients(
    dtype, autocast, tiny_llama, chunk_rows
):
    model = tiny_llama()
    exact = copy.deepcopy(model).double()
    batch = make_batches(False)[0]
    *_, wanted = loss_and_gradients(exact, batch, chunked=False)
    chunk_rows(4)
    errors = []
    for chunked in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            *_, found = loss_and_gradients(copy.deepcopy(model).to(dtype), batch, chunked)
        errors.append(sum((found[n].double() - g).norm() ** 2 for n, g in wanted.items()) ** 0.5)
    assert errors[0] < 1.5 * errors[1]
