"""Formats numbers for people to read. None becomes "n/a". Unit prefixes such as k and M are powers of 1000."""

from collections.abc import Sequence
from typing import Any

NA = "n/a"


def number(x: Any) -> str:
    """Formats a number with four significant digits, or without decimals if it is 1000 or more. Values that are not
    numbers are formatted by `str`."""
    if isinstance(x, bool) or not isinstance(x, int | float):
        return NA if x is None else str(x)
    return f"{x:,.0f}" if abs(x) >= 1000 or isinstance(x, int) else f"{x:.4g}"


def short(x: float | None) -> str:
    """Formats a number with two significant digits, or without decimals if it is 100 or more."""
    return NA if x is None else f"{x:,.0f}" if abs(x) >= 99.5 else f"{x:.2g}"


def integer(x: float | None) -> str:
    return NA if x is None else f"{x:,.0f}"


def signed(x: float | None) -> str:
    return NA if x is None else f"{x:+.3f}" if x else "0"


def percent(x: float | None) -> str:
    """Formats a fraction: 0.31 becomes "31 %", 0.043 becomes "4.3 %", and 0.0043 becomes "0.43 %"."""
    if x is None:
        return NA
    if x in (0, 1) or 0.0995 <= abs(x) < 0.995:
        return f"{100 * x:.0f} %"
    return f"{100 * x:.1f} %" if abs(x) >= 0.0095 else f"{100 * x:.2g} %"


def scaled(x: float | None, unit: str = "", names: str = " kMGTPE") -> str:
    """Formats a number with at most three digits and a unit prefix: 1234567 with unit "B" becomes "1.2 MB"."""
    if x is None:
        return NA
    power = 0
    while abs(x) >= 999.5 and power < len(names) - 1:
        x, power = x / 1000, power + 1
    digits = f"{x:.0f}" if x >= 99.5 or x == int(x) else f"{x:.1f}"
    return f"{digits} {names[power].strip()}{unit}".rstrip()


def size(x: float | None) -> str:
    """1234567 -> "1.2 MB"."""
    return scaled(x, "B")


def flops(x: float | None) -> str:
    return scaled(x, "FLOP")


def seconds(x: float | None) -> str:
    return NA if x is None else f"{x:.0f} s" if x >= 9.95 or x == 0 else f"{x:.2g} s"


def duration(x: float) -> str:
    """3725 seconds -> "1:02:05"."""
    minutes, s = divmod(round(x), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"


def span(values: Sequence[float] | None, form: str = ",.0f", between: str = " to ") -> str:
    """Formats (low, high) as "1 to 2", or as a single number if both numbers are formatted alike."""
    if values is None:
        return NA
    low, high = (format(v, form) for v in values)
    return low if low == high else f"{low}{between}{high}"


def joined(parts: Sequence[str]) -> str:
    return ", ".join(parts[:-1]) + " and " + parts[-1] if len(parts) > 1 else "".join(parts)
