"""The README.md of adapters and models: the Hub reads its front matter, and it holds on any machine."""

import ast
import json
import re

import pytest
from huggingface_hub import ModelCard

from app.tracking.model_card import write_card
from app.tracking.record import RunRecord

COMMIT = "0123456789abcdef"
LORA = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "use_rslora": False, "use_dora": False}
LORA |= {"r": 8, "lora_alpha": 16, "target_modules": ["model.layers.0.q_proj", "v_proj"]}
ADALORA = {"peft_type": "ADALORA", "task_type": "CAUSAL_LM", "target_r": 8, "target_modules": "x.*"}


@pytest.fixture
def card(tmp_path):
    """Return `card(adapter, whole=False, name=..., fingerprint=..., steps=4)`: the card that is written."""

    def write(
        adapter, whole=False, name="org/base@main", fingerprint=f"org/base@{COMMIT}", steps=4
    ):
        record = RunRecord.model_validate(
            {
                "method": "lora_one",
                "model": {"name": name, "fingerprint": fingerprint},
                "data": {"name": "meta", "source": "meta-math/MetaMathQA", "rows": {"train": 9}},
                "train": {"steps": steps, "samples": 8 * steps},
            }
        )
        config = {
            "model": {
                "adapter": adapter and {"use_rslora": True, "use_dora": adapter.get("use_dora")},
                "optimizer": {"class_path": "LoraPlusAdamW", "init_args": {"lr": 0.1}},
                "lr_scheduler_type": "cosine",
                "warmup_steps": 0.03,
                "dtype": "bfloat16",
            },
            "trainer": {"precision": None},
            "data": {"class_path": "MetaMathDataModule", "init_args": {"path": None}},
            "init": adapter and {"class_path": "LoraOneInit", "init_args": {"gamma": 64}},
        }
        if adapter and not whole:
            (tmp_path / "adapter_config.json").write_text(json.dumps(adapter))
        else:
            (tmp_path / "config.json").write_text('{"dtype": "float16"}')
        write_card(tmp_path, record, config, adapter)
        return ModelCard.load(tmp_path / "README.md")

    return write


def code(card):
    """Return the Python and the shell code of a card; the first is a module that parses."""
    python, *shell = re.findall(r"```(?:python|bash)\n(.*?)```", card.text, re.DOTALL)
    ast.parse(python)
    return python, "".join(shell)


def test_an_adapter_for_a_model_of_the_hub(card):
    made = card(LORA)
    assert made.data.to_dict() == {
        "base_model": "org/base",
        "datasets": ["meta-math/MetaMathQA"],
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "lora-one"],
    }
    python, shell = code(made)
    assert f'from_pretrained("org/base", revision="{COMMIT}", dtype="bfloat16")' in python
    assert "--max-lora-rank 8 " in shell
    assert "LoRA of rank 8, scaling 2, on q_proj, v_proj" in made.text
    assert "LoraPlusAdamW (lr 0.1)" in made.text
    cited = re.findall(r"arXiv:(\S+)", made.text)  # LoRA-One, LoRA, rsLoRA, LoRA+
    assert cited == ["2502.01235", "2106.09685", "2312.03732", "2402.12354"]
    assert "## Train" not in made.text


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("/home/somebody/models/llama/", "`llama`"),
        ("models/tiny.gguf#sha256=abc", "`tiny.gguf`"),
        ("pypi://toy==1.0/toy/m.gguf#sha256=abc", "`pypi://toy==1.0/toy/m.gguf#sha256=abc`"),
    ],
)
def test_a_base_from_files(name, shown, card):
    """The Hub refuses a `base_model` that it does not have."""
    made = card(LORA, name=name, fingerprint="sha256:beef")
    assert made.data.base_model is None
    assert f"| {shown} (weights `sha256:beef`) |" in made.text
    assert "/home" not in str(made)
    assert "models/" not in str(made)
    assert 'from_pretrained("BASE", dtype="bfloat16")' in code(made)[0]


@pytest.mark.parametrize(
    ("adapter", "text"),
    [
        ({"r": 40}, "vllm serve org/base --enable-lora --max-lora-rank 64 "),
        ({"rank_pattern": {"v_proj": 40}}, "`python train.py export --run RUN --as lora`"),
        ({"use_dora": True}, "`python train.py export --run RUN --merge`"),
        (
            {"target_parameters": ["mlp.experts.down_proj"], "rank_pattern": {"v_proj": 40}},
            "fused experts (target_parameters): `python train.py export --run RUN --merge`",
        ),
        ({"task_type": "SEQ_2_SEQ_LM"}, "With transformers"),
    ],
)
def test_only_what_servers_read_is_served(adapter, text, card):
    made = card({**LORA, **adapter})
    assert text in made.text.partition("## Serve")[2]
    assert ("vllm" in code(made)[1]) == ("r" in adapter)
    assert (made.data.pipeline_tag is None) == ("task_type" in adapter)


def test_fused_experts_are_named_by_their_parameters(card):
    adapter = {"target_modules": [], "target_parameters": ["mlp.experts.down_proj"]}
    assert "scaling 2, on down_proj |" in card({**LORA, **adapter}).text


def test_adalora(card):
    made = card(ADALORA)
    assert made.data.tags == ["adalora", "lora-one"]
    assert "AdaLoRA pruned to rank 8 on average, on x.*" in made.text
    assert "export --run RUN --as lora" in made.text


@pytest.mark.parametrize("adapter", [LORA, None])
def test_a_whole_model(adapter, card):
    """An adapter merged, or all weights trained."""
    made = card(adapter, whole=True)
    assert (made.data.library_name, made.data.base_model) == ("transformers", "org/base")
    python, shell = code(made)
    assert "peft" not in python
    assert "vllm serve FOLDER\n" in shell
    assert "| weights | float16" in made.text
    assert ("adapter merged" in made.text) == (adapter is not None)
    assert ("with all weights trained" in made.text) == (adapter is None)


def test_an_adapter_to_begin_with(card):
    made = card(LORA, steps=0)
    assert "is_trainable=True" in code(made)[0]
    assert "| training | none |" in made.text
    assert "| precision | weights in bfloat16, `trainer.precision` 32-true |" in made.text
    assert "| LLaMA-Factory | `adapter_name_or_path: FOLDER` |" in made.text
    assert "## Scores" not in made.text
