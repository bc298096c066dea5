"""What cannot be trained, or merged, is refused with what to change."""

import json
import shutil

import pytest
from transformers import AutoConfig

from app.models.adapter_config import AdaLoraBudget, LoraSettings
from app.training.checks import check_init_alone
from app.training.module import LoraModule
from app.utils.errors import InputError
from callbacks.lora_ga_init import LoraGaInit
from callbacks.lora_sb_init import LoraSbInit


@pytest.fixture
def tied(tmp_path, tiny_llama, run_models):
    """Return options for a model whose LM head is its embedding, with the head adapted."""
    folder = tmp_path / "tied"
    shutil.copytree(run_models / "llama", folder)
    config = AutoConfig.from_pretrained(folder)
    tiny_llama(tie_word_embeddings=True, vocab_size=config.vocab_size).save_pretrained(folder)
    return f"--model.name={folder}", "--model.adapter.target_modules=[q_proj,lm_head]"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "name"), [("pissa", "PissaInit"), ("lora_ga", "LoraGaInit"), ("loram", "LoramInit")]
)
def test_what_cannot_be_subtracted_from(
    method, name, error_of, tiny_run, run_models, tied, tmp_path, monkeypatch
):
    """Told from the configuration, before the weights, but for tied weights."""

    fit = ("fit", "--config", tiny_run, f"--config=methods/{method}.yaml")
    told = error_of(*fit, *tied)
    assert f"init is {name}, which changes the weight of lm_head" in told
    assert "the weight of model.embed_tokens too (tie_word_embeddings)" in told
    assert "leave lm_head out of model.adapter.target_modules" in told
    monkeypatch.setattr("app.training.model_building.load_model", None)
    assert f"init is {name}, but the model has no LoRA adapter" in error_of(
        *fit, "--model.adapter=null"
    )
    folder = tmp_path / "codes"
    shutil.copytree(run_models / "llama", folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    told = error_of(*fit, f"--model.name={folder}")
    assert f"init is {name}, which subtracts its factors from the base weights" in told
    assert "are quantised" in told
    assert "methods/lora_one.yaml" in told
    monkeypatch.setattr(LoraModule, "is_sharded", property(lambda _: True))
    assert f"init is {name}, which changes the base weights that this strategy shards" in error_of(
        *fit
    )


@pytest.mark.slow
def test_a_weight_of_two_modules_is_not_merged(fit, command, error_of, tied, monkeypatch):
    folder = fit("--config=methods/lora.yaml", *tied)
    with monkeypatch.context() as patched:
        patched.setattr("app.commands.export.load_model", None)  # told before weights are loaded
        told = error_of("export", "--run", folder, "--merge")
    assert "merging would change the weight of lm_head, which is that of model.embed_tokens" in told
    assert not (folder / "merged").exists()
    # The same model with its head left out.
    folder = fit(
        "--config=methods/pissa.yaml", tied[0], "--model.adapter.target_modules=[q_proj,v_proj]"
    )
    assert command("export", "--run", folder, "--merge") == 0


@pytest.mark.parametrize(
    ("init", "elsewhere", "adapter", "path", "message"),
    [
        (
            "LoraGaInit",
            LoraGaInit().elsewhere,
            LoraSettings(),
            None,
            "LoraGaInit, which changes the base weights, too",
        ),
        (
            "LoraSbInit",
            LoraSbInit().elsewhere,
            LoraSettings(),
            None,
            "LoraSbInit, which makes factors that LoraSbAdamW alone trains",
        ),
        (None, "", None, None, "model.adapter is null, so there is no adapter"),
        (
            None,
            "",
            LoraSettings(adalora=AdaLoraBudget()),
            None,
            "adalora is set, whose triplets",
        ),
        (None, "", LoraSettings(), "runs/x/adapter", "an adapter that is there already"),
    ],
)
def test_adapters_that_other_tools_cannot_begin_with(init, elsewhere, adapter, path, message):
    with pytest.raises(InputError, match=message):
        check_init_alone(init, elsewhere, adapter, path)
    check_init_alone("LoraOneInit", "", LoraSettings(), None)


def test_an_optimizer_of_a_span_wants_one(error_of, tiny_run, monkeypatch):
    monkeypatch.setattr("app.training.model_building.load_model", None)
    for command in ("fit", "plan"):
        told = error_of(command, "--config", tiny_run, "--config=methods/lora_sb", "--init=null")
        assert told.startswith("model.optimizer is LoraSbAdamW, which keeps to the span")
        assert "set init to LoraSbInit, as methods/lora_sb.yaml does" in told
