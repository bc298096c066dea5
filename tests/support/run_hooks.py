"""Fixtures that look into a run, or end it, at a hook of the module."""

import os
from contextlib import contextmanager

import pytest

# The module and the callbacks take 10 s to import, which most tests do without: each fixture imports them.


class Killed(Exception):
    """Stands for `kill -9`: nothing is saved on the way out."""


@pytest.fixture
def killed_at():
    """Return `killed_at(step)`, a context in which training ends when this many steps are made."""

    @contextmanager
    def context(step):
        from app.training.module import LoraModule

        original = LoraModule.on_train_batch_start

        def start(module, batch, batch_idx):
            if module.global_step == step:
                raise Killed
            return original(module, batch, batch_idx)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(LoraModule, "on_train_batch_start", start)
            with pytest.raises(Killed):
                yield

    return context


@pytest.fixture
def signalled(monkeypatch):
    """Return `signalled(method, number, when)`: a hook sends a signal when `when(*its arguments)` is true."""
    from app.training.module import LoraModule

    def send(method, number, when):
        original = getattr(LoraModule, method)

        def sending(module, *args):
            if when(module, *args):
                os.kill(os.getpid(), number)
            return original(module, *args)

        monkeypatch.setattr(LoraModule, method, sending)

    return send


@pytest.fixture
def passes(monkeypatch):
    """Return a list that grows with each gradient pass: the module that made it."""
    from callbacks import alignment_monitor, initialization

    made = []
    for module in (initialization, alignment_monitor):

        def counting(*args, original=module.one_step_gradients, who=module.__name__, **kwargs):
            made.append(who)
            return original(*args, **kwargs)

        monkeypatch.setattr(module, "one_step_gradients", counting)
    return made


@pytest.fixture
def logged(monkeypatch):
    """Return the scores that the module logs, as numbers by their names."""
    from app.training.module import LoraModule

    scores = {}
    original = LoraModule.log_dict

    def log_dict(module, values, **options):
        scores.update({name: float(value) for name, value in values.items()})
        original(module, values, **options)

    monkeypatch.setattr(LoraModule, "log_dict", log_dict)
    return scores
