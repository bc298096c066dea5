"""docs/support.md: each method with every command, on Llama, GPT-2, Mixtral."""

import pytest

from tests.support.matrix import each_cell

pytestmark = pytest.mark.slow


@each_cell("Methods", "Llama", "GPT-2", "Mixtral")
def test_methods(row, column, tried):
    tried("Methods", row, column)
