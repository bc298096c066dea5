"""Signals end a run at once, or at its next step while it trains; a second Ctrl-C always ends it."""

import os
import signal

import pytest

from app.utils.signals import STOPPING, Stopped, StopSignals, exit_status


@pytest.mark.parametrize("number", STOPPING)
def test_a_signal_before_training_stops_the_run(number):
    with StopSignals() as signals, pytest.raises(Stopped) as stopped:
        os.kill(os.getpid(), number)
    assert signals.received == number
    assert (stopped.value.status, stopped.value.line) == (
        128 + number,
        f"{number.name}: stopped before the first step",
    )
    assert not isinstance(stopped.value, Exception), "a library would handle it"


def test_a_deferred_signal_is_noted_and_the_handlers_come_back(capfd):
    before = [signal.getsignal(number) for number in STOPPING]
    with StopSignals() as signals:
        signals.deferred = True
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as a library does
        signals.install()
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received == signal.SIGTERM
        assert exit_status(signals.received) == 143
    assert "SIGTERM: stops after this step" in capfd.readouterr().err
    assert [signal.getsignal(number) for number in STOPPING] == before


def test_a_second_ctrl_c_ends_the_run_at_once(monkeypatch, capfd):
    statuses = []
    monkeypatch.setattr(os, "_exit", statuses.append)
    with StopSignals() as signals:
        signals.deferred = True
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
    assert statuses == [130]
    assert "complete checkpoints stay" in capfd.readouterr().err
