"""Arithmetic that a rationale writes down, and whether it holds: `84 / 2 = 42`, `x = 3 * 4 = 12`, `$5 + $3 = $8`.

A step is an equality of two expressions of plain numbers, one of them with an operator. What stands on a variable, a
power, a function or a unit that changes (`3 hours = 3 * 60 minutes`) is no step: one that is counted as wrong is meant
to be wrong, and some arithmetic goes unseen for that.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise

from qcrd_ray.tasks.arithmetic import MAX_CHARACTERS, evaluate

MAX_UNIT_WORDS = 3
MAX_SIDE_TOKENS = 80
MAX_SENTENCE = 300

_CALCULATOR = re.compile(r"<<[^<>\n]{0,200}>>")
_LATEX = re.compile(r"\\(?:(times|cdot|div)(?![A-Za-z])|[()\[\]$%])")
_BOXED = re.compile(r"\\(?:boxed|text|mathrm|mathbf)\{([^{}\n]*)\}")
_FRACTION = re.compile(r"(?<!\d)(?<!\d )\\[dt]?frac\{([^{}\n]*)\}\{([^{}\n]*)\}")
_MARKUP = re.compile(r"(?<![\d)\s])\*\*|\*\*(?![\d(\s])|(?<=\s)\*\*(?=\d)|(?<=\d)\*\*(?=\s)|`")
_SAME = str.maketrans(
    {"×": "*", "·": "*", "⋅": "*", "∙": "*", "✕": "*", "÷": "/", "∕": "/", "−": "-", "–": "-", "’": "'", "\u00a0": " "}
)
_PHRASES = (
    (re.compile(r"\bmultiplied by\b", re.IGNORECASE), " times "),
    (re.compile(r"\bdivided by\b", re.IGNORECASE), " / "),
    (re.compile(r"\b(?:(?:is|are) )?equal(?:s| to)\b", re.IGNORECASE), " = "),
)
_BULLET = re.compile(r"^(?:(?P<dash>-\s+(?=\d))|[-*+•]\s+|\(?\w{1,2}[.)]\s+(?![-+*/=]))", re.MULTILINE)
_DASH = "\ue000"
"""In place of a bullet that may be a minus."""
_CLAUSE_END = re.compile(r"""\n|[.,;!?](?=[\s)"']|$)|(?<!\d):|:(?!\d)|[!<>]=|=>|->|[→⇒—"“”]""")
_SENTENCE_END = re.compile(r"\n|[.!?](?=[\s)\"']|$)")
_EQUAL = re.compile(r"(==?|≈|≅)")
_TOKEN = re.compile(
    r"""(?P<number>(?:[0-9][0-9,.]*|\.[0-9]+)(?:\s?%)?)
      | (?P<word>[^\W\d_]+(?:['-][^\W\d_]+)*)
      | (?P<operator>\*\*|[-+*/])
      | (?P<open>[(\[])
      | (?P<close>[)\]])
      | (?P<other>\S)""",
    re.VERBOSE,
)
_PLAIN = re.compile(r"((?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+)(\s?%)?")
_SIGN_WORDS = {"x": "*", "X": "*", "times": "*", "plus": "+", "minus": "-"}


def _words(*lines: str) -> frozenset[str]:
    return frozenset(" ".join(lines).split())


_STOP_WORDS = _words(
    "and are as at because but by for from had has have he here hence i if in into is it of on or she since so than",
    "that then there therefore they this thus to was we were when which while with you",
)
_SCALES = _words("dozen hundred thousand million billion remainder rem r k squared cubed percent")
_FACTORS = _words(
    "half third quarter fifth tenth twice double triple thrice than by from to plus minus times x root sqrt cube log",
    "sin cos ln power factor difference product",
)
_LABELS = _words("day week month year step case part option chapter question number friend person room")
_RATES = _words("per a an each every")
_ORDINALS = _words("st nd rd th")
_INEXACT = _words("remainder remaining rounded rounding leftover leftovers over approximately approx about roughly")
_CUT = _words("remainder remaining remain remains rounded rounding leftover leftovers left full fully whole complete")
"""Said of a division whose result is cut to a whole number."""
_DENIED = re.compile(r"\s*(?:is|are|was|would be|cannot be)\s+(?:not|wrong|incorrect|false)\b", re.IGNORECASE)
_DENIED_LATER = re.compile(
    r"\W*(?:which|that|this|it)\s+(?:is|was|would be)\s+(?:not\s+(?:right|correct|true)|wrong|incorrect|false)\b",
    re.IGNORECASE,
)
_MEASURES = _words(
    "second sec minute min hour hr day week month year cent penny pennie nickel dime quarter dollar inch inche foot",
    "feet yard mile mm cm m km meter metre kilometer centimeter gram g kg kilogram ounce oz pound lb liter l ml gallon",
    "quart pint cup am pm",
)


@dataclass(frozen=True)
class Step:
    """An equality that a rationale states.

    Attributes:
        text: both sides as they are read.
        right: whether it holds.
    """

    text: str
    right: bool


@dataclass(frozen=True)
class _Token:
    kind: str
    text: str
    spaced: bool
    """Whether white space, or nothing, stands before it."""


@dataclass(frozen=True)
class _Side:
    """An expression beside an equals sign.

    Attributes:
        expression: numbers without commas, a percentage as `20%`.
        operators: how many it has.
        units: words behind its numbers, without a plural's s.
        whole: whether nothing else stands on its side.
        rest: what stands behind it.
    """

    expression: str
    operators: int
    units: frozenset[str]
    whole: bool = False
    rest: tuple[_Token, ...] = ()


def find_steps(text: str) -> list[Step]:
    """The arithmetic steps of a text, in its order.

    A result may be rounded or cut at the last decimal that it is written with (`10 / 3 = 3.33`), after `≈` at the last
    digit that is no zero. `5 * 3 = 15 + 2 = 17` is read as people mean it: `5 * 3 = 15`, then `15 + 2 = 17`.
    """
    steps = []
    for clause, goes_on in _clauses(text):
        money, dashed = "$" in clause, clause.startswith(_DASH)
        parts = _EQUAL.split(clause.removeprefix(_DASH).replace("$", "").replace("€", "").replace("£", ""))
        sides = [_tokens(part) for part in parts[::2]]
        for (before, after), sign in zip(pairwise(sides), parts[1::2], strict=True):
            left, right = _trailing(before), _leading(after)
            if left is None or right is None or not left.operators + right.operators:
                continue
            if "not" in left.units:
                continue
            holds = _holds(left, right, sign in "≈≅", money)
            if holds is False and dashed and before is sides[0] and left.whole:
                negative = replace(left, expression=f"- {left.expression}")
                if _holds(negative, right, sign in "≈≅", money):
                    left, holds = negative, True
            if holds is None or (not holds and _may_hold(left, right, money, goes_on)):
                continue
            steps.append(Step(f"{left.expression} {sign} {right.expression}", holds))
    return steps


def _clauses(text: str) -> Iterator[tuple[str, str]]:
    """Pieces of a text with an equals sign, in which no sentence or line ends; how their sentence goes on."""
    text = _LATEX.sub(lambda match: {"times": "*", "cdot": "*", "div": "/"}.get(match[1], " "), text)
    text = _FRACTION.sub(r"((\1)/(\2))", _BOXED.sub(r" \1 ", text))
    text = _CALCULATOR.sub("", text).translate(_SAME)
    for pattern, sign in _PHRASES:
        text = pattern.sub(sign, text)
    text = _joined(_MARKUP.sub(" ", text.replace(_DASH, " ")))
    text = _BULLET.sub(lambda match: _DASH if match["dash"] else "", text)
    begin = 0
    for end in [match.span() for match in _CLAUSE_END.finditer(text)] + [(len(text), len(text))]:
        clause = text[begin : end[0]]
        if "=" in clause or "≈" in clause or "≅" in clause:
            yield clause, _SENTENCE_END.split(text[end[0] : end[0] + MAX_SENTENCE], maxsplit=1)[0]
        begin = end[1]


def _joined(text: str) -> str:
    """A text without blank lines, a line that begins with an equals sign, or follows one, set behind the one before."""
    lines: list[str] = []
    for line in text.splitlines():
        plain = line.strip()
        if plain and lines and (plain[0] in "=≈" or lines[-1][-1] in "=≈"):
            lines[-1] += f" {plain}"
        elif plain:
            lines.append(plain)
    return "\n".join(lines)


def _tokens(side: str) -> list[_Token]:
    tokens, end = [], -1
    for match in _TOKEN.finditer(side):
        kind, text = str(match.lastgroup), match[0]
        if kind == "number":
            plain = _PLAIN.fullmatch(text)
            if plain is None:
                kind = "other"
            else:
                text = plain[1].replace(",", "").rstrip(".") + ("%" if plain[2] else "")
        elif text == "**":
            kind = "other"
        tokens.append(_Token(kind, text, match.start() != end))
        end = match.end()
    return tokens


def _leading(tokens: Sequence[_Token]) -> _Side | None:
    """The expression that a side begins with, None where it does not begin with one or goes on with what is none."""
    parsed = _parse(tokens, 0)
    return parsed[0] if parsed is not None else None


def _trailing(tokens: Sequence[_Token]) -> _Side | None:
    """The longest expression that a side ends with, None where what stands before it may belong to it."""
    tokens = tokens[-MAX_SIDE_TOKENS:]
    for start in range(len(tokens)):
        parsed = _parse(tokens, start)
        if parsed is not None and parsed[1] == len(tokens):
            return parsed[0] if _begins(tokens, start) else None
    return None


def _begins(tokens: Sequence[_Token], start: int) -> bool:
    """Whether an expression can begin at a token, by what stands before it."""
    if start == 0:
        return True
    before = tokens[start - 1]
    if before.kind == "open":
        return True
    if before.kind != "word" or not tokens[start].spaced:
        return False
    word = before.text.casefold()
    if word in ("of", "and") and start > 1:
        owner = tokens[start - 2]
        if word == "and":  # 2 and 1/3 is a mixed number
            return owner.kind != "number" or [token.text for token in tokens[start + 1 : start + 2]] != ["/"]
        return owner.kind == "word" and _singular(owner.text) not in _FACTORS | _SCALES
    return word not in _FACTORS | _LABELS and (len(word) > 1 or word in "ai")  # Day 1 - 46 * 2


class _NoExpression(Exception):
    pass


def _parse(tokens: Sequence[_Token], start: int) -> tuple[_Side, int] | None:
    """(the expression that begins at a token, where it ends), None where there is none."""
    try:
        return _Expression(tokens, start).read()
    except _NoExpression:
        return None


class _Expression:
    """operand (sign operand)*, an operand with unit words behind it. Whether it has a value, `evaluate` finds out."""

    def __init__(self, tokens: Sequence[_Token], start: int) -> None:
        self.tokens, self.at, self.start = tokens, start, start
        self.parts: list[str] = []
        self.units: list[str] = []
        self.depth = self.operators = 0

    def _kind(self, ahead: int = 0) -> str:
        return self.tokens[self.at + ahead].kind if self.at + ahead < len(self.tokens) else ""

    def read(self) -> tuple[_Side, int]:
        self._operand()
        while self._goes_on():
            self._operand()
        if self.depth:
            raise _NoExpression
        whole = self.start == 0 and self.at == len(self.tokens)
        units, rest = frozenset(self.units), tuple(self.tokens[self.at :])
        return _Side(" ".join(self.parts), self.operators, units, whole, rest), self.at

    def _operand(self) -> None:
        while self._kind() in ("open", "operator"):
            token = self.tokens[self.at]
            if token.kind == "open":
                self.depth += 1
                self.parts.append("(")
            elif token.text != "-" or (self.at + 1 < len(self.tokens) and self.tokens[self.at + 1].spaced and self.at):
                raise _NoExpression
            else:
                self.parts.append("-")
            self.at += 1
        if self._kind() != "number":
            raise _NoExpression
        self.parts.append(self.tokens[self.at].text)
        self.at += 1

    def _goes_on(self) -> bool:
        """Read what follows an operand. Returns whether another operand has to come."""
        self._closes()
        words = 0
        while self._kind() == "word":
            token = self.tokens[self.at]
            sign = self._sign_word(token)
            if sign is not None:
                return self._operator(sign)
            word = token.text.casefold()
            is_letter = len(word) == 1 and (word not in "ai" or not token.spaced)
            if is_letter or _singular(word) in _SCALES or (word in _ORDINALS and not token.spaced):
                raise _NoExpression  # a variable, or another number than it looks
            if word in _STOP_WORDS or words == MAX_UNIT_WORDS:
                return False
            if word not in _RATES and self.tokens[self.at - 1].text.casefold() not in _RATES:
                self.units.append(_singular(word))
            words += 1
            self.at += 1
            if self._is_per():
                self.at += 2
            self._closes()
        if self._kind() == "operator":
            if self.tokens[self.at].text == "-" and words and self._kind(1) not in ("number", "open"):
                return False  # a dash
            return self._operator(self.tokens[self.at].text)
        if self._kind() == "open" and not words and not self.tokens[self.at].spaced:
            self.operators += 1
            self.parts.append("*")
            return True
        if self._kind() in ("number", "other"):
            raise _NoExpression
        return False

    def _is_per(self) -> bool:
        """Whether a unit goes on as in `points/round`."""
        slash = self._kind() == "operator" and self.tokens[self.at].text == "/" and not self.tokens[self.at].spaced
        if not slash or self._kind(1) != "word" or self.tokens[self.at + 1].spaced:
            return False
        if len(self.tokens[self.at + 1].text) == 1:
            raise _NoExpression  # 1 picker/x drums
        return True

    def _closes(self) -> None:
        while self._kind() == "close" and self.depth:
            self.depth -= 1
            self.parts.append(")")
            self.at += 1

    def _sign_word(self, token: _Token) -> str | None:
        if self._kind(1) not in ("number", "open"):
            return None
        if token.text in ("of", "Of"):
            return "*" if self.parts[-1].endswith("%") or self.parts[-2:-1] == ["/"] else None
        return _SIGN_WORDS.get(token.text)

    def _operator(self, sign: str) -> bool:
        self.operators += 1
        self.parts.append(sign)
        self.at += 1
        return True


def _singular(word: str) -> str:
    word = word.casefold()
    return word[:-1] if word.endswith("s") and len(word) > 2 else word


def _holds(left: _Side, right: _Side, approximate: bool, money: bool) -> bool | None:
    """Whether two sides are equal as written, None where one has no value or a percentage may mean two things."""
    if max(len(left.expression), len(right.expression)) > MAX_CHARACTERS:
        return None
    if any(re.search(r"[-+] [\d.]+%", side.expression) and side.operators for side in (left, right)):
        return None
    results = []
    for percent in ("/100)", ")") if "%" in left.expression + right.expression else (")",):
        first, second = _value(left, percent), _value(right, percent)
        if first is None or second is None:
            return None
        results.append(_equal(first, second, left, right, percent, approximate, money))
    return any(results)


def _value(side: _Side, percent: str) -> Fraction | None:
    return evaluate(re.sub(r"([\d.]+)%", rf"(\1{percent}", side.expression))


def _equal(
    first: Fraction, second: Fraction, left: _Side, right: _Side, percent: str, approximate: bool, money: bool
) -> bool:
    # 3.33 * 3 = 10: where a whole number comes of it, two decimals may be rounded ones too, unless they are cents.
    written = [value for value, side in ((first, left), (second, right)) if not side.operators]
    is_whole = bool(written) and written[0].denominator == 1
    least = 2 if is_whole and not money and abs(first - second) < Fraction(1, 4) else 3
    if first == second or abs(first - second) <= _slack(left, percent, least) + _slack(right, percent, least):
        return True
    if not right.operators:
        return _is_rounded(first, second, right, percent, approximate)
    if not left.operators:
        return _is_rounded(second, first, left, percent, approximate)
    begins, _, goes_on = right.expression.partition(" ")
    if goes_on and re.fullmatch(r"[\d.]+", begins):
        result = Fraction(begins)
        return first == result or _is_rounded(first, result, _Side(begins, 0, frozenset()), percent, approximate)
    return False


def _slack(side: _Side, percent: str, least: int) -> Fraction:
    """How far off a side may be as its numbers of `least` or more decimals, which are rounded themselves, may be."""
    value, slack = _value(side, percent), Fraction(0)
    for match in re.finditer(rf"\d*\.(\d{{{least},}})", side.expression) if side.operators else ():
        more = Fraction(match[0]) + Fraction(1, 2 * 10 ** len(match[1]))
        written = f"({more.numerator}/{more.denominator})"
        other = _value(
            replace(side, expression=f"{side.expression[: match.start()]}{written}{side.expression[match.end() :]}"),
            percent,
        )
        if value is not None and other is not None:
            slack += abs(other - value)
    return slack


def _is_rounded(value: Fraction, written: Fraction, side: _Side, percent: str, approximate: bool) -> bool:
    """Whether a written number is a value rounded, or cut, at its last decimal."""
    digits = side.expression.strip("(-) %")
    decimals = len(digits.partition(".")[2])
    unit = Fraction(1, 10**decimals)
    if approximate and not decimals:
        unit = Fraction(10 ** (len(digits) - len(digits.rstrip("0") or "0")))
    in_hundredths = "%" in side.expression
    if in_hundredths and percent == "/100)":
        unit /= 100
    if not (decimals or in_hundredths or approximate):
        return False
    rounded = abs(value - written) <= unit / 2
    cut = value * written >= 0 and 0 <= abs(value) - abs(written) < unit
    return rounded or cut or (approximate and abs(value - written) <= unit)


def _may_hold(left: _Side, right: _Side, money: bool, goes_on: str) -> bool:
    """Whether two sides that differ may yet be meant to be the same: in other units, or but for a remainder."""
    if not left.operators and (left.units or not left.whole):
        return True  # the last number of a sentence, or `1 pack = $28 / 2`
    label, _, rest = left.expression.partition(" - ")
    if label.isdigit() and evaluate(rest) is not None and evaluate(rest) == evaluate(right.expression):
        return True  # Bus 1 - 46 * 2 = 92
    said = {token.text.casefold() for token in right.rest} | right.units
    if said & _INEXACT or (left.units | right.units) & {"am", "pm"}:
        return True
    if _DENIED.match(" ".join(token.text for token in right.rest)) or _DENIED_LATER.match(goes_on):
        return True
    value, written = evaluate(left.expression), evaluate(right.expression)
    if "/" in left.expression and value is not None and written is not None and abs(value - written) < 1:
        said |= {word.casefold() for word in re.findall(r"\w+", goes_on)}
        if said & _CUT:
            return True
    if [token.kind for token in right.rest[:2]] == ["word", "number"] and right.rest[0].text == "and":
        return True  # 2 and 1/3
    if left.units and right.units and not left.units & right.units:
        return True
    measures = (left.units | right.units) & _MEASURES
    return len(measures | ({"dollar"} if money and measures else set())) > 1
