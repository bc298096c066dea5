"""Class paths of the project's own classes, which have bare names wherever they lie."""

import pkgutil
import re
import traceback
from collections.abc import Callable

from app.utils.errors import causes

RENAMED = {"InsideTraining": "AlignmentMonitor"}
"""Classes of earlier versions and what they are called now."""

DROPPED = {"CommonsenseDataModule": ("hub_id", "drop_refusals")}
"""Settings that classes had in earlier versions, which changed nothing of them."""

_LORA_GA = re.compile(r"(LoraGaInit[\"']?\n +init_args:\n(?: +.*\n)*? +)gamma:")
_OWN = re.compile(r"(?:app|callbacks|data_modules)\.[\w.]+")
_SETTING = re.compile(rf"""(\bclass_path["']?:\s*["']?)({_OWN.pattern})""")


def bare_name(path: str) -> str:
    """Return the name of a class of the project without its module; any other path as it is."""
    name = path.rpartition(".")[2]
    return RENAMED.get(name, name) if _OWN.fullmatch(path) else path


def exists(path: str) -> bool:
    """Return whether a full path names something that can be imported."""
    try:
        pkgutil.resolve_name(path)
    except (ImportError, AttributeError):
        return False
    return True


def failed_import(error: BaseException | None) -> str | None:
    """Describe the exception that ended a module's import, with file and line; None if none did.

    A module that does not exist is none whose import has ended.
    """
    for cause in causes(error):
        if isinstance(cause, SyntaxError):
            return f"{type(cause).__name__}: {cause.msg} ({cause.filename}, line {cause.lineno})"
        frames = traceback.extract_tb(cause.__traceback__)
        if own := [frame for frame in frames if frame.name == "<module>"]:
            text = " ".join(str(cause).split())
            where = f"{own[-1].filename}, line {own[-1].lineno}"
            return f"{type(cause).__name__}: {text} ({where})"
    return None


def shorten_class_paths(text: str, wanted: Callable[[str], bool]) -> str:
    """Return a YAML text with the bare names of the project's own classes, of the `wanted` full paths alone."""
    return _SETTING.sub(lambda m: m[1] + (bare_name(m[2]) if wanted(m[2]) else m[2]), text)


def in_current_settings(text: str) -> str:
    """Return a YAML text in today's settings, of a saved config.yaml, which has one a line.

    Those in `DROPPED` are left out; LoraGaInit's `gamma` is its `stable_gamma` now.
    """
    text = _LORA_GA.sub(r"\1stable_gamma:", text)
    for name, settings in DROPPED.items():
        if name in text:
            text = re.sub(rf"^ +(?:{'|'.join(settings)}): .*\n", "", text, flags=re.MULTILINE)
    return text
