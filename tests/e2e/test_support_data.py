"""docs/support.md: each data module and benchmark with every command."""

import pytest

from tests.support.matrix import each_cell

pytestmark = pytest.mark.slow


@each_cell("Data modules")
def test_data_modules(row, column, tried):
    tried("Data modules", row, column)


@each_cell("Benchmarks")
def test_benchmarks(row, column, tried, request):
    if row == "HumanEval":
        request.getfixturevalue("bubblewrap")
    if row == "LmEval":
        pytest.importorskip("lm_eval", reason="pip install -r requirements-lm-eval.txt")
    tried("Benchmarks", row, column)
