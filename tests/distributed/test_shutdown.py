"""Which errors mean that another process is gone."""

import pytest
import torch.distributed as dist

from app.distributed import shutdown

GLOO_CLOSED = (
    "[/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1. This is "
    "typically caused by a remote worker crashing."
)
GLOO_TIMEOUT = "[/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 5000ms for recv"


@pytest.mark.parametrize(
    ("error", "processes", "expected"),
    [
        (RuntimeError(GLOO_CLOSED), 2, True),
        (RuntimeError(GLOO_TIMEOUT), 2, True),
        (dist.DistBackendError("NCCL error"), 2, True),
        (dist.DistNetworkError("the store is gone"), 2, True),
        (RuntimeError("DataLoader timed out after 5 seconds"), 2, False),
        (OSError(GLOO_CLOSED), 2, False),
        (RuntimeError(GLOO_CLOSED), 1, False),
    ],
)
def test_peer_failures(error, processes, expected, monkeypatch):
    monkeypatch.setattr(shutdown, "world_size", lambda: processes)
    assert shutdown.is_peer_failure(error) is expected


@pytest.mark.parametrize(("message", "traceback"), [(GLOO_CLOSED, False), (GLOO_TIMEOUT, True)])
def test_the_message_after_a_peer_failure(message, traceback, monkeypatch, capsys):
    statuses = []
    monkeypatch.setattr(shutdown.os, "_exit", statuses.append)
    try:
        raise RuntimeError(message)
    except RuntimeError as error:
        shutdown.abort_after_peer_failure(error)
    text = capsys.readouterr().err
    assert statuses == [1]
    assert text.splitlines()[-1].startswith("error: another of the 1 processes has ended")
    assert message in text.splitlines()[-1]
    assert ("Traceback" in text) is traceback
