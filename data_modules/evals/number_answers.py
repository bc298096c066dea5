"""Read numbers in texts as a person reads them: for the answers of GSM8K.

Where lm-evaluation-harness takes a run of digits, signs and dots and compares it as text, these read
a number and compare its value; docs/evaluation.md lists every case in which that changes a verdict.
"""

import re
from collections.abc import Sequence
from fractions import Fraction

_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
_UNSIGNED = rf"(?:{_DIGITS})(?:/(?:{_DIGITS}))?"
_LATEX = rf"\\[dt]?frac\{{(?P<upper>[-−]?(?:{_DIGITS}))\}}\{{(?P<lower>(?:{_DIGITS}))\}}"
# A minus belongs to the number unless something that is subtracted from, or a range's start, is before it.
_MINUS = r"(?:(?<![0-9A-Za-z)\]}%])[-−])?"
_EXPONENT = r"(?<!\^)(?<!\^\{)"
_ANYWHERE = re.compile(
    rf"(?P<sign>{_MINUS})\\?\$?(?:{_LATEX}|{_EXPONENT}(?<![0-9])(?P<plain>{_UNSIGNED}))"
)


def number_behind(text: str, marker: str) -> Fraction | None:
    """Return the number of the first `marker`, such as "####", that one space and a number follow.

    The value is exact; a fraction a/b is one number; None where no marker has a number.
    """
    for match in re.finditer(rf"{re.escape(marker)} (?P<number>[-−]?{_UNSIGNED})", text):
        if (value := _value(match["number"])) is not None:
            return value
    return None


def last_number(text: str) -> Fraction | None:
    r"""Return the last number of a text, or None.

    A number may have a sign, a dollar sign, thousands commas and decimals; a/b and \frac{a}{b} are one
    number. Exponents, as in cm^2, are none.
    """
    text = text.replace("{,}", ",")  # LaTeX's thousands comma
    for match in reversed(list(_ANYWHERE.finditer(text))):
        number = match["plain"] or f"{match['upper']}/{match['lower']}"
        value = _value(number)
        if value is not None:
            return -value if match["sign"] else value
    return None


def number_scores(outputs: Sequence[str], marker: str, gold: Fraction) -> dict[str, float]:
    """Return the share of outputs that is right: `strict` by `number_behind`, `flexible` by `last_number`."""
    strict = sum(number_behind(text, marker) == gold for text in outputs)
    flexible = sum(last_number(text) == gold for text in outputs)
    return {"strict": strict / len(outputs), "flexible": flexible / len(outputs)}


def _value(number: str) -> Fraction | None:
    upper, _, lower = number.replace(",", "").replace("−", "-").partition("/")
    try:
        return Fraction(upper) / Fraction(lower or 1)
    except (ZeroDivisionError, ValueError):  # Python converts no more than 4300 digits
        return None
