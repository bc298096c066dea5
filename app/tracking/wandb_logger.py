"""Reach W&B, or do without it: its mode, and a logger whose failures cost a run nothing.

Private names stand here: W&B's `singleton`, which reads its settings and does not start its process, as
`wandb.setup` does; WandbLogger's `_wandb_init` and `_offline`, the arguments of `wandb.init`: W&B warns of
`anonymous` among them, and the mode changes where W&B cannot be reached after all.
"""

import os
import ssl
import threading
import urllib.error
import urllib.request
from typing import Any, Literal

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn
from typing_extensions import override

from app.utils.console import warn_on_failure
from app.utils.errors import InputError, reason

Setting = Literal["auto", "online", "offline", "disabled"]
Mode = Literal["online", "offline", "disabled"]

SECONDS_TO_ANSWER = 5.0
LIMITS = {"WANDB_SILENT": "true", "WANDB_INIT_TIMEOUT": "30", "WANDB_FINISH_TIMEOUT": "600"}
"""Environment variables of W&B, where they are not set: else it waits for ever for a network that is gone."""
NEXT_MODE: dict[str, Mode] = {"online": "offline", "offline": "disabled"}
SYNC = "`wandb sync` uploads it later"


def wandb_mode(setting: Setting) -> Mode:
    """Return W&B's mode for `output.wandb`; asks for nothing, and waits a few seconds for a server at most.

    `auto` follows WANDB_MODE and `wandb offline`; else it is online with an API key and a network.

    Raises:
        InputError: The setting is `online`, and that is not possible.
    """
    for name, value in LIMITS.items():
        os.environ.setdefault(name, value)
    if setting == "disabled" or setting == "offline":
        return setting
    import wandb  # slow, and of no use to a run with `output.wandb: disabled`
    from wandb.sdk.wandb_setup import singleton

    settings, mode, missing = singleton().settings, "online", ""
    if settings.mode in ("disabled", "offline", "dryrun"):
        mode = "disabled" if settings.mode == "disabled" else "offline"
        missing = f"WANDB_MODE, or a settings file of W&B, says {settings.mode}"
    elif not wandb.login(prompt=False, verify=False):
        mode, missing = "offline", "there is no API key (WANDB_API_KEY, or `wandb login`)"
    elif failure := connection_failure(settings.base_url):
        mode, missing = "offline", f"{settings.base_url} cannot be reached ({failure})"
        if setting == "auto":
            rank_zero_warn(f"W&B: {missing}; the run is logged offline, and {SYNC}")
    if missing and setting == "online":
        raise InputError(
            f"output.wandb is online, but {missing}: set output.wandb to offline or auto"
        )
    return mode  # type: ignore[return-value]


def connection_failure(url: str) -> str:
    """Return why a server gives no answer of any kind within a few seconds; empty if it gives one."""
    failures = ["no answer"]

    def ask() -> None:
        request = urllib.request.Request(url, method="HEAD")
        try:
            urllib.request.urlopen(request, timeout=SECONDS_TO_ANSWER).close()
            failures.clear()
        except urllib.error.HTTPError:
            failures.clear()  # an answer, too
        except urllib.error.URLError as error:
            # W&B's own process may know the certificate.
            failures[:] = [] if isinstance(error.reason, ssl.SSLError) else [_text(error.reason)]
        except OSError as error:
            failures[:] = [_text(error)]

    # A name server that does not answer knows no timeout.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(SECONDS_TO_ANSWER)
    return "".join(failures)


def _text(failure: str | BaseException) -> str:
    return reason(failure) if isinstance(failure, Exception) else str(failure)


class RunWandbLogger(WandbLogger):
    """Log as WandbLogger does; where W&B fails, warn and go on.

    Args:
        mode: W&B's mode.
        may_change: If W&B cannot be begun, log offline instead of online, or not at all; else that is an error.
        options: See `WandbLogger`.
    """

    def __init__(self, mode: Mode, may_change: bool, **options: Any) -> None:
        # `offline` sets an environment variable, too late once W&B has looked for a key.
        super().__init__(offline=mode == "offline", mode=mode, **options)
        self._wandb_init.pop("anonymous", None)
        self.may_change = may_change

    @property
    @override
    def experiment(self) -> Any:
        """The W&B run, begun on first use.

        Raises:
            InputError: It cannot be begun in the mode that was asked for.
        """
        while True:
            try:
                return super().experiment
            except Exception as error:
                if self._experiment is None:
                    self._change_mode(error)
                else:  # it has begun, and what Lightning asks of it then has failed
                    rank_zero_warn(f"W&B's run has no steps ({reason(error)})")

    def _change_mode(self, error: Exception) -> None:
        """Take the next mode that needs less."""
        mode = self._wandb_init["mode"]
        failure = f"W&B cannot begin a run that is {mode} ({reason(error)})"
        if not self.may_change or mode not in NEXT_MODE:
            raise InputError(f"{failure}: set output.wandb to offline, auto or disabled") from error
        self._wandb_init["mode"] = NEXT_MODE[mode]
        self._offline = NEXT_MODE[mode] == "offline"
        rank_zero_warn(f"{failure}: it is {NEXT_MODE[mode]}")

    @override
    @rank_zero_only
    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """Log values; W&B's failure is a warning."""
        with warn_on_failure("logging to W&B"):
            super().log_metrics(metrics, step)

    @override
    @rank_zero_only
    def log_hyperparams(self, params: Any) -> None:
        """Log settings; W&B's failure to take them is a warning."""
        _ = self.experiment  # one that cannot be begun is an error
        with warn_on_failure("logging the settings to W&B"):
            super().log_hyperparams(params)
