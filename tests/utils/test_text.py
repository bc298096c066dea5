"""Numbers and names in messages."""

import pytest

from app.utils.text import did_you_mean, rate_text


@pytest.mark.parametrize(
    ("rate", "text"), [(1e-4, "1e-4"), (0.00025, "2.5e-4"), (3.0, "3e0"), (1 / 3, None)]
)
def test_rates_lose_no_digit(rate, text):
    assert float(rate_text(rate)) == rate
    assert text is None or rate_text(rate) == text


def test_the_nearest_name():
    assert did_you_mean("lora_on", ["lora", "lora_one"]) == "; did you mean lora_one?"
    assert did_you_mean("zzz", ["lora", "lora_one"]) == ""
    assert did_you_mean("zzz", ["lora"], cutoff=0.0) == "; did you mean lora?"
