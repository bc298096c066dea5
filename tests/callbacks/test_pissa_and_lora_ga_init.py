"""PiSSA and LoRA-GA: the factors against PEFT and float64, the offset, the exported adapter."""

import copy
import json
import shutil

import pytest
import torch
from peft import LoraConfig, LoraGAConfig, PeftModel, get_peft_model
from peft.tuners.lora.loraga import preprocess_loraga
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM

from app.initialization.factors import SVD, lora_ga_factors, pissa_factors
from app.initialization.one_step_gradient import Estimator, one_step_gradients
from app.models.adapter_config import LoraSettings
from app.models.adapter_io import save_adapter
from app.models.lora import add_lora, base_weight, install, lora_pairs, subtract_from_base
from app.training.module import LoraModule
from app.utils.errors import InputError
from callbacks.initialization import GradientInit
from tests.support.one_step_oracle import make_batches
from tests.support.run_folders import summary, weights

BUILDERS = ["tiny_llama", "tiny_gpt2", "tiny_t5"]
R = 4


def initialized(base, settings, factors):
    """Return a wrapped copy with factors in it and subtracted from its base, and the factors."""
    model = add_lora(copy.deepcopy(base), settings)
    installed = {}
    for pair in lora_pairs(model):
        installed[pair.name] = factors(pair)
        subtract_from_base(pair, *installed[pair.name])
        install(pair, *installed[pair.name])
    return model, installed


def pissa(pair):
    return pissa_factors(base_weight(pair).float(), R, pair.scaling)


def inputs(base):
    ids = torch.arange(3, 60).reshape(3, 19)
    more = {"decoder_input_ids": ids} if base.config.is_encoder_decoder else {}
    return {"input_ids": ids, **more}


def peft_config(build, **options):
    return LoraConfig(
        r=R,
        lora_alpha=16,
        use_rslora=True,
        target_modules="all-linear",
        fan_in_fan_out=build == "tiny_gpt2",
        **options,
    )


@pytest.mark.parametrize("build", ["tiny_llama", "tiny_gpt2"])
def test_pissa_and_ten_steps_of_it_are_pefts(build, request):
    base = without_dropout(request.getfixturevalue(build)())
    ours, _ = initialized(base, LoraSettings(r=R), pissa)
    theirs = get_peft_model(copy.deepcopy(base), peft_config(build, init_lora_weights="pissa"))
    for mine, other in zip(lora_pairs(ours), lora_pairs(theirs), strict=True):
        assert mine.name == other.name
        product, wanted = (p.lora_B @ p.lora_A for p in (mine, other))
        assert torch.allclose(product, wanted, atol=1e-5 * float(wanted.abs().max()))
        for factor in ("lora_A", "lora_B"):  # the same up to a sign for each triplet
            a, b = getattr(mine, factor).abs(), getattr(other, factor).abs()
            assert torch.allclose(a, b, atol=1e-4)
        assert torch.allclose(base_weight(mine), base_weight(other), atol=1e-6)
    assert ten_losses(ours) == pytest.approx(ten_losses(theirs), rel=1e-5)


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def test_the_randomised_pissa_is_nearly_the_best_of_its_rank():
    W = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    best = torch.linalg.svdvals(W)[R:].norm()
    A, B = pissa_factors(W, R, 2.0, niter=16)
    again = pissa_factors(W, R, 2.0, niter=16)
    assert torch.equal(A, again[0])
    assert torch.equal(B, again[1])
    assert float((W - 2 * B @ A).norm()) == pytest.approx(float(best), rel=1e-3)


def ten_losses(model):
    """Train with plain AdamW on rows drawn by a fixed seed."""
    torch.manual_seed(1)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    found = []
    for _ in range(10):
        ids = torch.randint(3, 128, (2, 12))
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss))
    return found


@pytest.mark.parametrize("build", ["tiny_llama", "tiny_gpt2"])
def test_lora_ga_is_pefts_but_for_the_scales_of_its_columns(build, request):
    """PEFT multiplies lora_B by the singular values and leaves lora_A unscaled; the vectors are the same.

    With its columns at the paper's length PEFT's own model trains as ours does, step by step.
    """
    base = without_dropout(request.getfixturevalue(build)())
    [batch] = make_batches(False, rows=12, size=12)
    ga = LoraGAConfig(direction="ArB2r", scale="stable", stable_gamma=64)
    config = peft_config(build, init_lora_weights="lora_ga", lora_ga_config=ga)
    # PEFT's preparation does not know "all-linear".
    observed = copy.deepcopy(base)
    wrapped = lora_pairs(add_lora(copy.deepcopy(base), LoraSettings(r=R)))
    config.target_modules = {pair.name for pair in wrapped}
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "labels")}
    preprocess_loraga(observed, config, lambda: observed(**inputs).loss.backward())
    theirs = get_peft_model(observed, config)

    model = add_lora(copy.deepcopy(base), LoraSettings(r=R))
    found = one_step_gradients(
        model, model.get_base_model(), lora_pairs(model), [batch], 2 * R, Estimator("exact")
    )

    def lora_ga(pair):
        return lora_ga_factors(found.estimates[pair.name].svd, R, 64.0)

    ours, factors = initialized(base, LoraSettings(r=R), lora_ga)
    others = {pair.name: pair for pair in lora_pairs(theirs)}
    assert others.keys() == factors.keys()
    for mine in lora_pairs(ours):
        A, B = factors[mine.name]
        other = others[mine.name]
        scale = B.shape[0] ** 0.25 / 8
        S = found.estimates[mine.name].svd.S[R : 2 * R]
        # The sign of each singular vector is free.
        signs = [
            torch.sign((p * q).sum(d)) for p, q, d in ((A, other.lora_A, 1), (B, other.lora_B, 0))
        ]
        their_A, their_B = signs[0][:, None] * other.lora_A, signs[1] * other.lora_B
        # PEFT takes a weight's first side for its outputs, which it is not in a Conv1D.
        first = other.layer.get_base_layer().weight.shape[0]
        lengths = first**0.25 / 8 * S
        assert torch.allclose(scale * their_A, A, atol=1e-3 * scale)
        assert torch.allclose(their_B, B / scale * lengths, atol=1e-3 * float(lengths[0]))
        with torch.no_grad():
            subtract_from_base(other, -other.lora_A, other.lora_B)  # takes PEFT's offset back
        subtract_from_base(other, A, B)
        install(other, A, B)
        assert torch.allclose(base_weight(other), base_weight(mine), atol=1e-5)
    assert ten_losses(ours) == pytest.approx(ten_losses(theirs), rel=1e-5)


def test_lora_ga_takes_the_papers_vectors_and_scale():
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(24, 17, generator=generator, dtype=torch.float64)
    U, S, Vh = torch.linalg.svd(gradient)
    A, B = lora_ga_factors(SVD(U[:, : 2 * R], S[: 2 * R], Vh[: 2 * R].T), R, 64.0)
    scale = 24**0.25 / 8
    for i in range(R):
        assert torch.allclose(A[i], scale * Vh[i])
        assert torch.allclose(B[:, i], scale * U[:, R + i])
    # Its first step is the best one of rank 2r, up to a factor: s (dB A + B dA) with the raw gradients.
    step = gradient @ A.T @ A + B @ B.T @ gradient
    best = (U[:, : 2 * R] * S[: 2 * R]) @ Vh[: 2 * R]
    assert torch.allclose(step / scale**2, best, atol=1e-10)


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("use_rslora", [False, True])
def test_the_initialization_changes_nothing_and_the_export_fits_the_untouched_base(
    build, use_rslora, request, tmp_path
):
    base = request.getfixturevalue(build)()
    model, factors = initialized(base, LoraSettings(r=R, use_rslora=use_rslora), pissa)
    with torch.no_grad():
        before = base(**inputs(base)).logits
        assert torch.allclose(model.eval()(**inputs(base)).logits, before, atol=1e-5)
        for pair in lora_pairs(model):  # training
            pair.lora_A.add_(0.05 * torch.randn_like(pair.lora_A))
            pair.lora_B.add_(0.05 * torch.randn_like(pair.lora_B))
        trained = model(**inputs(base)).logits
    assert not torch.allclose(trained, before, atol=1e-2)
    save_adapter(model, tmp_path, "somewhere", factors)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] == 2 * R
    assert config["base_model_name_or_path"] == "somewhere"
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    with torch.no_grad():
        assert torch.allclose(loaded(**inputs(base)).logits, trained, atol=1e-4)
    assert lora_pairs(loaded)[0].scaling == pytest.approx(lora_pairs(model)[0].scaling)


def float64_gradients(folder, batches):
    """Return autograd's gradient of the token mean over all batches in every weight, in float64."""
    model = AutoModelForCausalLM.from_pretrained(folder).double().eval()
    total, tokens = 0.0, 0
    for batch in batches:
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        logits, labels = model(**inputs).logits[:, :-1], batch["labels"][:, 1:]
        total = total + cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        tokens += int((labels != -100).sum())
    (total / tokens).backward()
    return {name.removesuffix(".weight"): p.grad for name, p in model.named_parameters()}


def test_the_command_initializes_with_the_gradient_of_the_untouched_model(
    fit, run_models, monkeypatch
):
    """The factors that the run subtracted, against autograd's gradient of the whole model in float64."""
    kept = []
    original = GradientInit.batches

    def keep(init, trainer):
        kept.append(list(original(init, trainer)))
        return kept[-1]

    monkeypatch.setattr(GradientInit, "batches", keep)
    folder = fit(
        *("--config=methods/lora_ga.yaml", "--init.num_samples=16", "--init.estimator.kind=exact"),
        "--init.gamma=25",
    )
    record = summary(folder)
    before, after = (record["metrics"][name]["loss"] for name in ("zero_shot", "after_init"))
    assert after == pytest.approx(before, rel=1e-5)
    batches = kept[-1]
    assert sum(len(batch["input_ids"]) for batch in batches) == 16
    gradients = float64_gradients(run_models / "llama", batches)
    state = weights(folder)
    assert len(record["init"]["layers"]) == 14
    for name in record["init"]["layers"]:
        prefix = f"base_model.model.{name}"
        A, B = (state[f"{prefix}.lora_{side}.weight"].double() for side in "AB")
        start_A, start_B = A[R:], -B[:, R:]
        U, _, Vh = torch.linalg.svd(gradients[name], full_matrices=False)
        # Spans at the paper's length: where singular values are close, vectors turn among themselves.
        length = start_B.shape[0] ** 0.25 / 25**0.5
        for start, vectors in ((start_A.T, Vh[:R].T), (start_B, U[:, R : 2 * R])):
            found, wanted = start @ start.T / length**2, vectors @ vectors.T
            assert torch.allclose(found, wanted, atol=1e-2), name


def test_the_sketch_and_the_exact_gradient_give_the_same_factors(tiny_llama):
    model = add_lora(tiny_llama(), LoraSettings(r=R))
    pairs = lora_pairs(model)
    batches = make_batches(False, rows=12, size=4)
    spans = []
    for estimator in (Estimator("exact"), Estimator(passes=3)):
        found = one_step_gradients(model, model.get_base_model(), pairs, batches, 2 * R, estimator)
        factors = [lora_ga_factors(found.estimates[p.name].svd, R, 64.0) for p in pairs]
        spans.append([A.T @ A for A, _ in factors])
    for exact, sketch in zip(*spans, strict=True):
        assert torch.allclose(exact, sketch, atol=2e-2 * float(exact.abs().max()))


def test_lora_ga_needs_two_r_singular_vectors(command, tiny_run, capfd):
    lora_ga = ("fit", "--config", tiny_run, "--config=methods/lora_ga.yaml")
    assert command(*lora_ga, "--init.num_samples=16", "--model.adapter.r=5") == 2
    assert "set model.adapter.r to at most 4" in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(("method", "name"), [("pissa", "PissaInit"), ("lora_ga", "LoraGaInit")])
def test_what_cannot_be_subtracted_from(
    method, name, command, tiny_run, run_models, tied, tmp_path, capfd, monkeypatch
):
    """Told from the configuration, before the weights, but for tied weights."""

    def refused(*options):
        config = f"--config=methods/{method}.yaml"
        assert command("fit", "--config", tiny_run, config, *options) == 2
        return capfd.readouterr().err

    told = refused(*tied)
    assert f"init is {name}, which changes the weight of lm_head" in told
    assert "the weight of model.embed_tokens too (tie_word_embeddings)" in told
    assert "leave lm_head out of model.adapter.target_modules" in told
    monkeypatch.setattr("app.training.model_building.load_model", None)
    assert f"init is {name}, but the model has no LoRA adapter" in refused("--model.adapter=null")
    folder = tmp_path / "codes"
    shutil.copytree(run_models / "llama", folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    told = refused(f"--model.name={folder}")
    assert f"init is {name}, which subtracts its factors from the base weights" in told
    assert "are quantised" in told
    assert "methods/lora_one.yaml" in told
    monkeypatch.setattr(LoraModule, "is_sharded", property(lambda _: True))
    assert f"init is {name}, which changes the base weights that this strategy shards" in refused()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("build", ["tiny_llama", "tiny_gpt2"])
def test_the_base_is_rounded_once(build, dtype, request):
    """From float64, so that it is the same wherever it is computed: bit for bit that of numpy."""
    base = request.getfixturevalue(build)().to(dtype)
    model = add_lora(base, LoraSettings(r=R))
    for pair in lora_pairs(model):
        A, B = torch.randn_like(pair.lora_A), torch.randn_like(pair.lora_B)
        W = base_weight(pair).double().numpy()
        subtract_from_base(pair, A, B)
        wanted = W - pair.scaling * B.double().numpy() @ A.double().numpy()
        assert torch.equal(base_weight(pair), torch.from_numpy(wanted).to(dtype)), pair.name


@pytest.mark.parametrize("build", BUILDERS)
def test_on_a_bfloat16_base_the_initialization_changes_its_rounding(build, request):
    """Within twice the 5e-3 that the docstrings of both initializations give."""
    base = request.getfixturevalue(build)().bfloat16()
    model, _ = initialized(base, LoraSettings(r=R), pissa)
    with torch.no_grad():
        before, after = (m.eval()(**inputs(base)).logits.float() for m in (base, model))
    assert 0 < float((after - before).norm() / before.norm()) < 1e-2


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_codes_are_not_subtracted_from(dtype, tiny_llama):
    [pair, *_] = lora_pairs(add_lora(tiny_llama(), LoraSettings(r=R)))
    layer = pair.layer.get_base_layer()
    codes = torch.full(layer.weight.shape, 3.0).to(dtype)
    layer.weight = torch.nn.Parameter(codes.clone(), requires_grad=False)
    told = rf"weight of {pair.name}, but that is quantised \({dtype}\)"
    with pytest.raises(InputError, match=told):
        subtract_from_base(pair, torch.ones_like(pair.lora_A), torch.ones_like(pair.lora_B))
    assert torch.equal(layer.weight.float(), codes.float())


@pytest.fixture
def tied(tmp_path, tiny_llama, run_models):
    """Return options for a model whose LM head is its embedding, with the head adapted."""
    folder = tmp_path / "tied"
    shutil.copytree(run_models / "llama", folder)
    config = AutoConfig.from_pretrained(folder)
    tiny_llama(tie_word_embeddings=True, vocab_size=config.vocab_size).save_pretrained(folder)
    return f"--model.name={folder}", "--model.adapter.target_modules=[q_proj,lm_head]"


@pytest.mark.slow
def test_a_weight_of_two_modules_is_not_merged(fit, command, tied, capfd):
    folder = fit("--config=methods/lora.yaml", *tied)
    assert command("export", "--run", folder, "--merge") == 2
    told = capfd.readouterr().err
    assert "merging would change the weight of lm_head, which is that of model.embed_tokens" in told
    assert not (folder / "merged").exists()
    # The same model with its head left out.
    folder = fit(
        "--config=methods/pissa.yaml", tied[0], "--model.adapter.target_modules=[q_proj,v_proj]"
    )
    assert command("export", "--run", folder, "--merge") == 0
