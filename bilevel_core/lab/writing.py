"""How numbers and symbols are written for readers, the same in tables, in printed lines and in explorers."""

import html
import math
import re

_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_GREEK = {"gamma": "γ", "lam": "λ", "theta": "θ", "delta": "δ", "eps": "ε", "star": "∗", "*": "∗"}


def format_number(value: float | str, spec: str = ".4g") -> str:
    """A number as the page writes it: ".2f" decimals, ".3g" digits and 1.2 × 10⁻⁵ where very small or large."""
    if isinstance(value, str):
        return value
    if math.isnan(value):
        return "undefined"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    digits = int(spec[1:-1])
    if spec.endswith("f"):
        text = f"{value:.{digits}f}"
        return (text.replace("-", "") if float(text) == 0 else text).replace("-", "−")
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    power = int(exponent)

    def bare(text: str) -> str:
        return text.rstrip("0").rstrip(".") if "." in text else text

    if -4 <= power < 6:
        return bare(f"{value:.{max(0, digits - 1 - power)}f}").replace("-", "−")
    return _power(bare(mantissa), power)


def _power(mantissa: str, power: int) -> str:
    """-1.2, 5 -> −1.2 × 10⁵; a bare 1 is left out."""
    raised = "10" + str(power).translate(_RAISED)
    sign, size = re.fullmatch(r"([+-]?)(.*)", mantissa).groups()
    return sign.replace("-", "−") + (raised if size == "1" else f"{size} × {raised}")


def duration(seconds: float) -> str:
    """90 -> '90 s', 600 -> '10 min', 7200 -> '2.0 h'."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def readable(text: str) -> str:
    """Text with the numbers that Python wrote as a reader writes them: a minus sign, no −0.00, 10⁴ for 1e+04."""
    text = re.sub(r"(?<![\w.])([+-]?\d(?:\.\d+)?)[eE]([+-]?\d{1,3})\b", lambda m: _power(m[1], int(m[2])), text)
    text = re.sub(r"(?<![\w.])[+-](?=0(?:\.0+)?(?![\w.]))", "", text)
    return re.sub(r"(?<![\w.)\]])-(?=[\d.∞∂λγθ(]|E\[|log\b)|(?<=\s)-(?=\s)", "−", text)


def symbols(text: str) -> str:
    """Names of the code as symbols of the notation, as `markup` takes them: abar_T -> ᾱ_{T}, L_gamma -> L_{γ}."""
    text = re.sub(r"\babar(?![a-z])", "ᾱ", text.replace("eps_hat", "ε̂").replace("x0_hat", "x̂_{0}"))
    text = re.sub(r"\btheta_(?=[a-z*])", "θ_", text)
    pattern = r"(?<!\w)(KL|[d∂]?[A-Za-zᾱλθγ])_((?:[A-Za-z0-9γλ]+|\*)(?:,[γλ*])?)(?!\w)"
    return re.sub(pattern, lambda m: f"{m[1]}_{{{_GREEK.get(m[2], m[2])}}}", text)


def written(text: str) -> str:
    """Text of a table for `markup`: symbols and numbers as a reader writes them."""
    return readable(symbols(text))


def strip(text: str) -> str:
    """Without the brackets of _{...} and ^{...}: for plain text."""
    return re.sub(r"([_^])\{([^}]*)\}", r"\1\2", text)


def markup(text: str, tag: bool) -> str:
    """_{...} and ^{...} as HTML (tag) or as matplotlib's mathtext."""
    if tag:
        names = {"_": "sub", "^": "sup"}
        return re.sub(r"([_^])\{([^}]*)\}", lambda m: f"<{names[m[1]]}>{m[2]}</{names[m[1]]}>", html.escape(text))
    return re.sub(r"([_^])\{([^}]*)\}", lambda m: f"$\\mathrm{{{{}}}}{m[1]}{{{m[2]}}}$", text)
