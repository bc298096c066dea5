"""docs/support.md: each method with every command, on T5, Gemma-3, Gemma-3 with vision."""

import pytest

from tests.support.matrix import each_cell

pytestmark = pytest.mark.slow


@each_cell("Methods", "T5", "Gemma-3", "Gemma-3 with vision")
def test_methods(row, column, tried):
    tried("Methods", row, column)
