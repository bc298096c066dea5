"""Parts that two processes run together; each function is one start of them."""

import os
import re
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

from app.distributed.collectives import (
    from_first_process,
    largest_over_processes,
    raise_on_all_ranks,
)
from app.distributed.processes import global_rank
from app.distributed.shutdown import shutdown
from app.initialization import gradient_exchange
from app.initialization.gradient_exchange import Layer
from app.initialization.gradient_hooks import frozen, observe
from app.initialization.gradient_store import ExactStore
from app.initialization.one_step_gradient import Estimator
from app.models.adapter_config import LoraSettings
from app.models.lora import LoraPair, add_lora, base_model, lora_pairs
from app.models.loss import summed_loss, supervised_logits
from app.utils.errors import InputError
from tests.support.mixtures import build_mixture
from tests.support.one_step_oracle import EXACT, make_batches, matrix, run
from tests.support.sharded_generation import sharded_generation  # noqa: F401 (a part)

CPU = torch.device("cpu")


def meet() -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))


def verdicts() -> None:
    """What fails on one process fails on all, and they stay in step."""
    meet()

    def fails_on(number, error):
        def make():
            if global_rank() == number:
                raise error
            return global_rank()

        return make

    assert raise_on_all_ranks(global_rank) == global_rank()
    assert from_first_process(lambda: global_rank() + 7) == 7
    for ask in (raise_on_all_ranks, from_first_process):
        with pytest.raises(InputError, match=r"^no such folder$"):
            ask(fails_on(0, InputError("no such folder")))
    own, theirs = (OSError, "^full$"), (InputError, "^process 1 failed: OSError: full$")
    kind, message = own if global_rank() == 1 else theirs
    with pytest.raises(kind, match=message):
        raise_on_all_ranks(fails_on(1, OSError("full")))
    assert largest_over_processes(5 - global_rank(), CPU) == 5
    shutdown()


def out_of_step() -> None:
    """Layers are reached in any order, more than once, on one process only, or in the last batch only."""
    meet()
    gradient_exchange.BUCKET_NUMBERS = 100
    layers = [Layer(name, 6, 5) for name in "abcdefg"]
    visits = (("gfedcba", "gfe", "abc", "cc"), ("acbgg", "", "dcbaa", "aab"))
    store = ExactStore(layers, CPU)
    assert len(store.buckets) > 2
    wanted = {name: torch.zeros(6, 5) for name in "abcdefg"}
    g = torch.Generator().manual_seed(0)
    for i in range(4):
        for process in range(2):
            for name in visits[process][i]:
                x, delta = torch.randn(9, 5, generator=g), torch.randn(9, 6, generator=g)
                wanted[name] += delta.T @ x
                if process == global_rank():
                    store.update(name, x, delta, [name])
        store.end_batch()
    store.end_pass()
    estimates = store.estimates(dict.fromkeys("abcdefg", 5), 0.5)
    for name, gradient in wanted.items():
        assert float((matrix(estimates[name]) - gradient / 2).norm() / gradient.norm()) < 1e-5, name
    # Only the owner of a sum sees that it is not finite.
    store = ExactStore(layers, CPU)
    for name in "abcdefg":
        huge = 1e20 if name == "d" else 1.0
        x, delta = torch.full((3, 5), huge), torch.full((3, 6), huge)
        reported = store.update(name, x, delta, [name])
        assert bool(reported.isfinite().all())
    store.end_batch()
    store.end_pass()
    with pytest.raises(InputError, match="gradient at d cannot be decomposed"):
        store.estimates(dict.fromkeys("abcdefg", 5), 1.0)
    shutdown()


def reached_layers(model, batches) -> set[str]:
    seen = set()
    layers = {pair.name: pair.layer for pair in lora_pairs(model)}
    listeners = {name: lambda *_, name=name: seen.add(name) for name in layers}
    with frozen(model), observe(layers, listeners):
        for batch in batches:
            summed_loss(supervised_logits(model, base_model(model), batch)).backward()
    return seen


def experts() -> None:
    """Each process reaches its own experts of a mixture; the result is that of one process."""
    config = SwitchTransformersConfig(
        vocab_size=128,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_decoder_layers=2,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=0,
        num_heads=2,
        num_experts=16,
        expert_capacity=4096,
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    torch.manual_seed(0)
    model = add_lora(SwitchTransformersForConditionalGeneration(config).eval(), LoraSettings(r=4))
    batches = make_batches(True, rows=4, size=1)
    shares = batches[:2], batches[2:]
    number = int(os.environ["RANK"])
    reached = [reached_layers(model, share) for share in shares]
    pairs = lora_pairs(model)
    idle = {pair.name for pair in pairs} - reached[0] - reached[1]
    assert idle
    only = [reached[0] - reached[1], reached[1] - reached[0]]
    assert all(only)
    broken = max(name for name in only[1] if name.endswith("wi"))
    full = Estimator(oversampling=64, passes=2)
    fused = (
        add_lora(build_mixture("mixtral"), LoraSettings(r=4)),
        make_batches(False, rows=4, size=1),
    )
    wanted = [run(*mixture, full) for mixture in ((model, batches), fused)]
    assert {name for name, e in wanted[0].estimates.items() if e.norm == 0} >= idle

    meet()
    share = shares[number]
    for (mixture, rows), whole in zip(((model, batches), fused), wanted, strict=True):
        for kind in (EXACT, full):
            result = run(mixture, rows[2 * number : 2 * number + 2], kind)
            assert result.loss == pytest.approx(whole.loss, rel=1e-5)
            for name, estimate in whole.estimates.items():
                error = (matrix(result.estimates[name], 4) - matrix(estimate, 4)).norm()
                assert float(error) <= 1e-4 * estimate.norm, (name, float(error))

    unused = LoraPair("unused", torch.nn.Linear(16, 16), pairs[0].lora_A, pairs[0].lora_B, 1.0)
    message = f"did not reach 1 of {len(pairs) + 1} layers, first unused"
    with pytest.raises(RuntimeError, match=message):
        run(model, share, pairs=[*pairs, unused])

    def poison(module, inputs):
        inputs[0].register_hook(lambda gradient: gradient * float("nan"))

    if number == 1:  # where the first process never comes
        behind = broken.removesuffix("wi") + "wo"
        next(p.layer for p in pairs if p.name == behind).register_forward_pre_hook(poison)
    for estimator in (EXACT, Estimator()):
        with pytest.raises(InputError, match=re.escape(f"gradient at {broken} is not finite")):
            run(model, share, estimator, pairs=pairs)
    shutdown()
