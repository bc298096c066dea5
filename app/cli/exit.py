"""How a command ends: its exit status, its last line, and whether it waits for other processes."""

import errno
import os
import sys
from collections.abc import Callable

from app.distributed.processes import is_first_process, world_size
from app.distributed.shutdown import (
    abort_after_peer_failure,
    is_peer_failure,
    print_failure,
    shutdown,
    wait_for_same_failure,
)
from app.utils.console import warn_on_failure
from app.utils.errors import InputError, causes, reason
from app.utils.signals import Stopped, StopSignals


def run_and_exit(command: Callable[[], int], signals: StopSignals) -> int:
    """Run a command and shut down, together with the other processes where these still run.

    Args:
        command: Returns the exit status.
        signals: Marked as ending when the command has ended.

    Returns:
        The command's status; after an InputError, which is printed in one line, its own; after `Stopped` that
        of the signal.
    """
    status = 1
    lost: RuntimeError | None = None
    # True where others may wait for this process, or a launcher for the first that ends.
    leaves_at_once = False
    try:
        try:
            ended = command()
        except Stopped as stopped:
            if not stopped.together:
                raise
            if is_first_process():
                print(stopped.line, file=sys.stderr, flush=True)
            ended = stopped.status
        signals.ending = True
        # Before the others may go: launchers end all processes as soon as one has ended with a bad status.
        _finish_wandb(ended)
        shutdown()
        status = ended
    except ValueError as error:
        # The parser wraps what a class says of its arguments.
        wrong = next((e for e in causes(error) if isinstance(e, InputError)), None)
        if wrong is None:
            raise
        print_failure(f"error: {wrong}")
        status, leaves_at_once = wrong.exit_status, world_size() > 1
        _finish_wandb(status)
        wait_for_same_failure()
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(f"error: {reason(error)}: make room", file=sys.stderr, flush=True)
        status = InputError.exit_status
    except RuntimeError as error:
        if not is_peer_failure(error):
            raise
        lost = error
    except Stopped as stopped:
        print(stopped.line, file=sys.stderr, flush=True)
        status, leaves_at_once = stopped.status, world_size() > 1
    finally:
        signals.ending = True
        _finish_wandb(status)
    if lost is not None:
        abort_after_peer_failure(lost)
    if leaves_at_once:
        sys.stdout.flush()
        os._exit(status)
    return status


def _finish_wandb(status: int) -> None:
    """Write what W&B still holds, with the exit status."""
    wandb = sys.modules.get("wandb")  # importing it is slow, and of no use to a run without it
    if wandb is not None and wandb.run is not None:
        with warn_on_failure(
            "wandb.finish()", "what W&B has is in the run folder, for `wandb sync`"
        ):
            wandb.finish(exit_code=status)
