"""What processes tell each other, and how they stay in step, part by part."""

import pytest


@pytest.mark.parametrize("part", ["verdicts", "out_of_step", "experts"])
def test_two_processes(part, by_hand):
    for status, told in by_hand({"part": part, "options": {}}):
        assert status == 0, told
