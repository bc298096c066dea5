"""How a report writes its numbers."""

import math

from app.compare.cells import rate_text
from app.compare.selection import Stat


def stat_text(stat: Stat, score: str) -> str:
    """Write `85.12 ± 0.31`, in percent unless it is a loss; without ± for one seed."""
    if not stat.n:
        return ""
    factor, places = (1, 4) if is_loss(score) else (100, 2)
    mean = f"{factor * stat.mean:.{places}f}"
    return mean if math.isnan(stat.std) else f"{mean} ± {factor * stat.std:.{places}f}"


def is_loss(score: str) -> bool:
    """Return whether a score is a loss, which is no percentage."""
    return score.rpartition("/")[2] == "loss"


def told_rate(value: float) -> str:
    """Write a learning rate, which a run may lack."""
    return "none" if math.isnan(value) else rate_text(value)
