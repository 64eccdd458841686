"""A small, bounded evaluator of arithmetic: numbers, + - * /, parentheses. Exact, and never Python's own."""

from __future__ import annotations

import math
import re
from fractions import Fraction

MAX_CHARACTERS = 200
MAX_DEPTH = 32
MAX_DIGITS = 40
SIGNIFICANT_DIGITS = 10
MAX_DECIMALS = 30

_TOKEN = re.compile(r"\s*(?:(\d+(?:,\d{3})+(?:\.\d*)?|\d+\.?\d*|\.\d+)|([-+*/()]))")
_SAME = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-", "–": "-", "[": "(", "]": ")"})


def evaluate(text: str) -> Fraction | None:
    """The exact value of an expression such as `( 84.0 / 2.0 )`, None if it is not one.

    Expressions of more than 200 characters, deeper than 32 parentheses, with numbers of more than 40 digits, with a
    value of 10**40 or more, or that divide by zero have no value.
    """
    if len(text) > MAX_CHARACTERS:
        return None
    tokens = _tokens(text.translate(_SAME))
    if not tokens:
        return None
    try:
        parser = _Parser(tokens)
        value = parser.sum(0)
        return value if parser.at == len(tokens) and abs(value) < 10**MAX_DIGITS else None
    except (_NoValue, ZeroDivisionError):
        return None


class _NoValue(Exception):
    pass


def _tokens(text: str) -> list[str] | None:
    tokens, at = [], 0
    text = text.rstrip()
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            return None
        token = (match[1] or match[2]).replace(",", "")
        if len(token) > MAX_DIGITS:
            return None
        tokens.append(token)
        at = match.end()
    return tokens


class _Parser:
    """sum := product (('+' | '-') product)*, product := factor (('*' | '/') factor)*, factor := '-' factor | …"""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens = tokens
        self.at = 0

    def _next(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def sum(self, depth: int) -> Fraction:
        value = self._product(depth)
        while self._next() in ("+", "-"):
            sign = self.tokens[self.at]
            self.at += 1
            right = self._product(depth)
            value = value + right if sign == "+" else value - right
        return value

    def _product(self, depth: int) -> Fraction:
        value = self._factor(depth)
        while self._next() in ("*", "/"):
            sign = self.tokens[self.at]
            self.at += 1
            right = self._factor(depth)
            value = value * right if sign == "*" else value / right
        return value

    def _factor(self, depth: int) -> Fraction:
        token = self._next()
        if depth > MAX_DEPTH or not token:
            raise _NoValue
        self.at += 1
        if token in ("-", "+"):
            value = self._factor(depth + 1)
            return -value if token == "-" else value
        if token == "(":
            value = self.sum(depth + 1)
            if self._next() != ")":
                raise _NoValue
            self.at += 1
            return value
        if token[0].isdigit() or token[0] == ".":
            return Fraction(token.rstrip(".") or "0")
        raise _NoValue


def canonical_number(value: Fraction) -> str:
    """One text for every way to write a value, in plain decimals that `evaluate` reads back as the same text.

    A whole number keeps every digit; another is rounded to ten significant digits, at most 30 of them decimals, so
    that 1/3 and 0.3333333333 agree.
    """
    if value.denominator == 1:
        return str(value.numerator)
    leading = math.floor(math.log10(abs(value)))
    places = min(MAX_DECIMALS, max(0, SIGNIFICANT_DIGITS - 1 - leading))
    digits = str(round(abs(value) * 10**places)).rjust(places + 1, "0")
    whole, decimals = digits[: len(digits) - places], digits[len(digits) - places :].rstrip("0")
    text = f"{whole}.{decimals}" if decimals else whole
    return f"-{text}" if value < 0 and text != "0" else text


_DRESSED = re.compile(r"^[\s$€£#=]*(?P<number>.*?)[\s.%°]*$", re.DOTALL)
_LEADING = re.compile(
    r"^\(?\s*(?P<number>-?\s*[$€£]?\s*(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:\s*/\s*\d+)?)\s*\)?"
    r"\s*%?\s+[A-Za-z][A-Za-z \-']*\.?$"
)


def read_number(text: str) -> Fraction | None:
    """The value of an answer as people write it: `8.0`, `$8`, `1,200`, `50%` (50), `( 16.0 / 2.0 )`, `8 apples`."""
    if len(text) > MAX_CHARACTERS:
        return None
    text = text.translate(_SAME).strip()
    match = _DRESSED.match(text)
    inner = match["number"] if match else text
    value = evaluate(inner)
    if value is not None:
        return value
    undressed = re.sub(r"[$€£]", "", inner)
    value = evaluate(undressed)
    if value is not None:
        return value
    leading = _LEADING.match(text)
    return evaluate(re.sub(r"[$€£\s]", "", leading["number"])) if leading else None
