"""W&B's mode with and without key and network, and a run that W&B fails at every call."""

import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from unittest.mock import MagicMock

import pytest
import wandb
from lightning.pytorch.loggers import CSVLogger
from wandb.sdk.wandb_run import Run
from wandb.sdk.wandb_setup import singleton

from app.tracking import wandb_logger
from app.tracking.loggers import OutputSettings, make_loggers
from app.tracking.run_folder import RunFolder
from app.tracking.wandb_logger import LIMITS, RunWandbLogger, connection_failure, wandb_mode
from app.utils.errors import InputError
from tests.support.run_folders import summary

NOBODY = "http://127.0.0.1:9"


@pytest.fixture
def server():
    """Return the address of a server that knows nothing."""

    class Answer(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_error(404)

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Answer) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{serving.server_port}"
        serving.shutdown()


@pytest.fixture
def set_up(no_key, monkeypatch):
    """Return `set_up(**variables)`, which sets W&B's environment variables as a new process meets them."""

    def apply(**variables):
        for name in LIMITS:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(f"WANDB_{name}", value)
        wandb.teardown()

    return apply


def test_without_a_key_auto_is_offline(set_up, recwarn):
    set_up()
    assert wandb_mode("auto") == "offline"
    assert wandb_mode("offline") == "offline"
    assert wandb_mode("disabled") == "disabled"
    assert not recwarn.list
    with pytest.raises(
        InputError, match=r"output.wandb is online, but there is no API key .*offline"
    ):
        wandb_mode("online")
    assert (singleton().settings.init_timeout, singleton().settings.finish_timeout) == (30, 600)


def test_a_key_needs_a_network_to_be_online(set_up, server):
    key = "0123456789" * 4
    set_up(API_KEY=key, BASE_URL=server)
    assert wandb_mode("auto") == wandb_mode("online") == "online"
    set_up(API_KEY=key, BASE_URL=NOBODY)
    begin = time.perf_counter()
    with pytest.warns(
        UserWarning, match=rf"{NOBODY} cannot be reached \(Connection refused\).*sync"
    ):
        assert wandb_mode("auto") == "offline"
    with pytest.raises(InputError, match=rf"is online, but {NOBODY} cannot be reached"):
        wandb_mode("online")
    assert time.perf_counter() - begin < 5


def test_a_server_that_does_not_answer(monkeypatch):
    monkeypatch.setattr(wandb_logger, "SECONDS_TO_ANSWER", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert connection_failure(f"http://127.0.0.1:{silent.getsockname()[1]}")
    assert connection_failure("http://no.such.host.invalid")


@pytest.mark.parametrize("mode", ["offline", "disabled"])
def test_wandb_mode_counts_where_the_setting_is_auto(mode, set_up, tmp_path):
    set_up(API_KEY="0123456789" * 4, MODE=mode)
    assert wandb_mode("auto") == mode
    loggers = make_loggers(OutputSettings(name="x", root=str(tmp_path)))
    kinds = [CSVLogger] if mode == "disabled" else [CSVLogger, RunWandbLogger]
    assert all(map(isinstance, loggers, kinds))
    assert len(loggers) == len(kinds)
    with pytest.raises(InputError, match=f"is online, but WANDB_MODE, .* says {mode}"):
        make_loggers(OutputSettings(name="x", root=str(tmp_path), wandb="online"))
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["version_0"]


def test_a_run_that_cannot_be_begun_needs_less(monkeypatch, tmp_path):
    modes = []

    def init(**options):
        modes.append(options["mode"])
        if options["mode"] != "disabled":
            raise wandb.errors.CommError(f"no {options['mode']}")
        return MagicMock(spec=Run)

    monkeypatch.setattr(wandb, "init", init)
    logger = RunWandbLogger("online", True, save_dir=str(tmp_path))
    with pytest.warns(UserWarning, match="W&B cannot begin a run that is") as told:
        logger.log_hyperparams({"a": 1})
    assert modes == ["online", "offline", "disabled"]
    assert len([w for w in told if "CommError: no o" in str(w.message)]) == 2
    for mode in ("online", "offline"):
        with pytest.raises(InputError, match=f"that is {mode} .*set output.wandb to"):
            _ = RunWandbLogger(mode, False, save_dir=str(tmp_path)).experiment


def test_a_run_that_wandb_fails_at_every_call_is_finished(fit, set_up, monkeypatch):
    set_up()
    run, broken = MagicMock(spec=Run), BrokenPipeError(32, "Broken pipe")
    run.summary, run.config = MagicMock(), MagicMock()
    run.disabled, run.id = False, "abc"
    for call in ("define_metric", "log", "log_artifact", "config.update", "summary.update"):
        run.configure_mock(**{f"{call}.side_effect": broken})

    def init(**options):
        wandb.run = run
        return run

    def finish(**options):
        wandb.run = None
        raise broken

    monkeypatch.setattr(wandb, "run", None)
    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setattr(wandb, "finish", finish)
    with pytest.warns(UserWarning, match=r"Broken pipe") as told:
        folder = fit("--output.wandb=auto")
    messages = {str(warning.message).partition(" (")[0] for warning in told}
    assert messages >= {
        "W&B's run has no steps",
        "logging the settings to W&B failed",
        "logging to W&B failed",
        "logging the finished run to W&B failed",
        "wandb.finish() failed",
    }
    assert run.log.call_count >= 3
    assert "final" in summary(folder)["metrics"]
    RunFolder(folder).check_finished()
