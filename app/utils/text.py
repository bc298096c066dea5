"""Write numbers and names."""

import difflib
from collections.abc import Iterable


def rate_text(rate: float) -> str:
    """Write a learning rate as the field does, 1e-4, without losing a digit."""
    digits, _, power = f"{rate:.16e}".partition("e")
    for places in range(17):
        digits, _, power = f"{rate:.{places}e}".partition("e")
        if float(f"{digits}e{power}") == rate:
            break
    return f"{digits}e{int(power)}"


def nearest(wrong: str, known: Iterable[str], cutoff: float = 0.5) -> str | None:
    """Return the known name most like a wrong one; None if none is like it."""
    return next(iter(difflib.get_close_matches(wrong, list(known), n=1, cutoff=cutoff)), None)


def did_you_mean(wrong: str, known: Iterable[str], cutoff: float = 0.5) -> str:
    """Return "; did you mean NAME?" with the known name most like a wrong one, or "" if none is like it."""
    close = nearest(wrong, known, cutoff)
    return "" if close is None else f"; did you mean {close}?"
