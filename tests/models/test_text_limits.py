"""Positions that a text can have, against those that a model reads."""

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from app.models.text_limits import context_length, has_position_table

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
