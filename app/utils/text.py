"""Write numbers and names."""


def rate_text(rate: float) -> str:
    """Write a learning rate as the field does, 1e-4, without losing a digit."""
    digits, _, power = f"{rate:.16e}".partition("e")
    for places in range(17):
        digits, _, power = f"{rate:.{places}e}".partition("e")
        if float(f"{digits}e{power}") == rate:
            break
    return f"{digits}e{int(power)}"
