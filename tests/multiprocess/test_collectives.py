"""Collectives, and gradients that processes reach in another order, part by part on two processes."""

import pytest

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]


@pytest.mark.parametrize("part", ["verdicts", "out_of_step", "experts"])
def test_two_processes(part, finished):
    finished({"part": part, "options": {}})
