"""What processes tell each other, and how they stay in step, part by part."""

import pytest


@pytest.mark.parametrize("part", ["verdicts", "out_of_step", "experts"])
def test_two_processes(part, by_hand):
    for status, told in by_hand({"part": part, "options": {}}):
        assert status == 0, told


@pytest.mark.parametrize("hangs", [0, 1])
def test_a_silent_process_is_given_up(hangs, by_hand):
    """Whatever the others wait for: here for the store, which lives in the first process."""
    ends = by_hand({"part": "watch", "options": {"hangs": hangs}}, hangs=hangs)
    status, told = ends[1 - hangs]
    assert status == 1, told
    assert "both alive" in told
    assert f"error: process {hangs} of 2 does not answer any more (no sign of life for 4 s)" in told
