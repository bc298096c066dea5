"""Positions that a text can have, against those that a model reads."""

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from app.models.text_limits import check_causal, context_length, has_position_table
from app.utils.errors import InputError

SIZE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32}
ROBERTAS = ("Roberta", "RobertaPreLayerNorm", "XLMRoberta", "XLMRobertaXL", "Camembert", "Xmod")
ROBERTAS += ("Data2VecText",)


@pytest.mark.parametrize("padding", [0, 1, 5])
@pytest.mark.parametrize("name", ROBERTAS)
def test_a_table_that_begins_with_rows_of_padding(name, padding):
    config = getattr(transformers, f"{name}Config")(
        **SIZE,
        **{"intermediate_size": 16, "max_position_embeddings": 20, "pad_token_id": padding},
        is_decoder=True,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    if name == "Xmod":
        model.set_default_language(config.languages[0])
    context = context_length(config)
    assert has_position_table(model)
    assert context == 20 - (padding + 1)
    model(torch.full((1, context), 9))
    with pytest.raises((IndexError, RuntimeError), match=r"out of (bounds|range)"):
        model(torch.full((1, context + 1), 9))


SIZES = {
    **SIZE,
    **{"intermediate_size": 16, "embedding_size": 16, "max_position_embeddings": 20},
    **{"n_layers": 1, "emb_dim": 16, "n_heads": 2, "n_embd": 16, "n_layer": 1, "n_head": 2},
}


def sees_what_is_behind(config):
    """Return whether an output changes with a token behind it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.arange(3, 13).repeat(2, 1)
    ids[1, -1] = 20
    with torch.no_grad():
        one, other = model(input_ids=ids).logits[:, :-1]
    return not torch.allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("decoder", [False, True])
@pytest.mark.parametrize(
    "name", ["Bert", "BertGeneration", "Electra", "Roberta", "RoFormer", "XLM"]
)
def test_an_encoder_is_refused_unless_it_was_made_a_decoder(name, decoder):
    made = {"causal" if name == "XLM" else "is_decoder": decoder}
    config = getattr(transformers, f"{name}Config")(**SIZES, **made, pad_token_id=1)
    assert sees_what_is_behind(config) != decoder
    if decoder:
        check_causal(config, "mine")
    else:
        with pytest.raises(InputError, match=r"model.name='mine' is an encoder"):
            check_causal(config, "mine")


@pytest.mark.parametrize("name", ["GPT2", "GPTNeoX", "Llama", "OPT", "ModernBertDecoder"])
def test_a_decoder_is_not(name):
    own = {} if name == "GPT2" else SIZES
    config = getattr(transformers, f"{name}Config")(**{**own, "vocab_size": 32}, pad_token_id=1)
    check_causal(config, "mine")


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("Llama", {"is_causal": False}),
        ("Qwen3", {"is_causal": False}),
        ("Gemma3Text", {"use_bidirectional_attention": True}),
    ],
)
def test_a_decoder_that_sees_both_ways_is_refused(name, setting):
    setting |= {"num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 1}
    config = getattr(transformers, f"{name}Config")(**SIZES, **setting)
    assert sees_what_is_behind(config)
    with pytest.raises(InputError, match="is an encoder"):
        check_causal(config, "mine")
