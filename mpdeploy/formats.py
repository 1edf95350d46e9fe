"""How the report writes numbers: sensible digits, units, and "not measured" where there is no finite number."""

import math
from typing import Any

NOT_MEASURED = "not measured"
SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def _missing(value: Any) -> bool:
    """Tell whether `value` is no finite number: nothing, text, NaN, infinity, or what a template does not know."""
    return not isinstance(value, int | float) or not math.isfinite(value)


def number(value: Any, digits: int = 3) -> str:
    """Print a number with so many significant digits: 0.0123, 1,234, 3.1×10⁻⁶."""
    if _missing(value):
        return NOT_MEASURED
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(abs(value)))
    if not -4 < exponent < 6:
        mantissa, _, power = f"{value:.{digits - 1}e}".partition("e")
        return f"{mantissa}×10{str(int(power)).translate(SUPERSCRIPT)}".replace("-", "−")
    return f"{value:,.{max(0, digits - 1 - exponent)}f}".replace("-", "−")


def count(value: Any) -> str:
    """Print a whole number."""
    return NOT_MEASURED if _missing(value) else f"{int(value):,}"


def percent(value: Any) -> str:
    """Print a share in percent; what is not all or nothing is never rounded to 100 % or 0 %."""
    if _missing(value):
        return NOT_MEASURED
    value = value + 0.0  # minus zero is zero
    for digits in range(1, 9):
        text = f"{100 * value:.{digits}f}"
        if value in (0, 1) or float(text) not in (0.0, 100.0):
            break
    return f"{text.replace('-', '−')}\u00a0%"


def points(value: Any) -> str:
    """Print a difference of percentages."""
    return NOT_MEASURED if _missing(value) else f"{value:.2f}\u00a0points".replace("-", "−")


def times(value: Any) -> str:
    """Print a ratio."""
    return NOT_MEASURED if _missing(value) else f"{value:.2f}×"


def ms(value: Any) -> str:
    """Print milliseconds."""
    return NOT_MEASURED if _missing(value) else f"{number(value)}\u00a0ms"


def si(value: Any, unit: str = "") -> str:
    """Print a large number with an SI prefix and a unit."""
    if _missing(value):
        return NOT_MEASURED
    for power, prefix in ((12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if abs(value) >= 10**power:
            return f"{value / 10**power:.3g}\u00a0{prefix}{unit}"
    return f"{value:.0f}\u00a0{unit}".strip()


def answer(value: Any) -> str:
    """Print 1 and 0 as yes and no."""
    return NOT_MEASURED if _missing(value) else "yes" if value else "no"


def interval(low: Any, high: Any, unit: str) -> str:
    """Print an interval that may be open at one side: "90.1 % to 92.3 %", "at least 90.1 %"."""
    form = FORMATS[unit]
    match _missing(low), _missing(high):
        case True, True:
            return "–"
        case True, False:
            return f"at most {form(high)}"
        case False, True:
            return f"at least {form(low)}"
        case _:
            return f"{form(low)} to {form(high)}"


FORMATS = {"number": number, "count": count, "percent": percent, "points": points, "times": times, "ms": ms, "si": si}
FORMATS["answer"] = answer
