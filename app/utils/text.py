"""Write numbers and names."""

import difflib
from collections.abc import Iterable


def rate_text(rate: float) -> str:
    """Write a learning rate as the field does, 1e-4, without losing a digit."""
    import numpy as np  # a tenth of a second, which `--help` does not need

    return np.format_float_scientific(rate, trim="-", exp_digits=1).replace("+", "")


def nearest(wrong: str, known: Iterable[str], cutoff: float = 0.5) -> str | None:
    """Return the known name most like a wrong one; None if none is like it."""
    return next(iter(difflib.get_close_matches(wrong, list(known), n=1, cutoff=cutoff)), None)


def did_you_mean(wrong: str, known: Iterable[str], cutoff: float = 0.5) -> str:
    """Return "; did you mean NAME?" with the known name most like a wrong one, or "" if none is like it."""
    close = nearest(wrong, known, cutoff)
    return "" if close is None else f"; did you mean {close}?"
