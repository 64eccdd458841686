"""Arithmetic in rationales: what is found, what is wrong, and what nobody may call wrong."""

from __future__ import annotations

import random
import time
from fractions import Fraction

import pytest

from qcrd_ray.evaluation.arithmetic_steps import find_steps


def marks(text: str) -> str:
    """A letter for each step: r (right) or w (wrong)."""
    return "".join("r" if step.right else "w" for step in find_steps(text))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("84/2 = 42", "r"),
        ("- 5 + 3 = -2", "r"),  # a minus
        ("- 5 + 3 = 8", "r"),  # a bullet
        ("- 5 + 3 = 9", "w"),
        ("(8) - 3 + 4 = 9", "r"),
        ("(2) 3 + 4 = 8", "w"),
        ("3 + 5 does not = 9", ""),
        ("He thought 3 + 5 = 9, which is wrong.", ""),
        ("He got 3 + 5 = 9, which is right.", "w"),
        ("23 - 6 = 18, which is not much", "w"),
        ("84 / 2 = 43", "w"),
        ("x = 3 * 4 = 12", "r"),
        ("x = 3 * 4 = 13", "w"),
        ("3 + 4 + 5 = 12", "r"),
        ("Points per round = 84 points / 2 rounds = 42 points/round.", "r"),
        ("Nora picked 14 + 9 = 23 plums and gave 6 away, so 23 - 6 = 18 are left.", "rw"),
        ("So 8 pages + 2 pages = 10 pages.", "r"),
        ("4 boxes x 6 apples each = 24 apples", "r"),
        ("3 × 4 = 12, 12 ÷ 5 = 2.4 and 5 − 8 = −3", "rrr"),
        ("3x4=12", "r"),
        ("5 times 3 equals 16", "w"),
        ("84 divided by 2 is equal to 42", "r"),
        ("$1,200 ÷ 4 = $300", "r"),
        ("1000000 * 1,000,000 = 1,000,000,000,000", "r"),
        ("10 / 3 = 3.33", "r"),
        ("20 / 3 = 6.66", "r"),  # cut
        ("20 / 3 = 6.67", "r"),  # rounded
        ("20 / 3 = 6.68", "w"),
        ("20 / 3 = 7", "w"),
        ("20 / 3 ≈ 7", "r"),
        ("1987 + 11 ≈ 2000", "r"),
        ("1987 + 11 ≈ 3000", "w"),
        ("20% of 50 = 10", "r"),
        ("5/20 * 100 = 25%", "r"),
        ("5/20 * 100% = 25%", "r"),
        ("2/3 = 67%", "r"),
        ("2/3 = 69%", "w"),
        ("0.1739 * 92 = 16", "r"),  # 0.1739 is itself rounded
        ("$2.25 * 3 = $6.76", "w"),
        ("2.25 * 3 = 6.76", "w"),
        ("0.25 * 4 = 1.02", "w"),
        ("12.50 * 2 = 25.01", "w"),
        ("90 / 4 = 22 groups, so he picks up 22", "w"),
        ("100 / 7 = 14 apples each, and over the week all are eaten", "w"),
        ("23 - 6 = 18 which is not much", "w"),
        ("5 * 3 = 16 and not 15", "w"),
        ("10/3 = 3.33, and 3.33 * 3 = 10", "rr"),  # 3.33 is itself rounded
        ("6.67 * 3 = 20", "r"),
        ("$6.67 * 3 = $20", "w"),
        ("6.67 * 3 = 21", "w"),
        ("23 - 6 = 18, so 18 are left", "w"),
        ("186 / 19 = 9 rows", "w"),
        ("186 / 19 = 8, with a remainder of 15", "w"),
        ("5 * 3 = 15 + 2 = 17", "rr"),  # sloppy, and meant
        ("5 * 3 = 16 + 2 = 18", "wr"),
        ("9 = 4 + 5", "r"),
        ("-3 + 4 = 1", "r"),
        ("- 3 + 4 = 7", "r"),  # a bullet
        ("3 - 5 = - 2", "r"),
        ("12 - -3 = 15", "r"),
        ("1. 3 + 4 = 7\n2) 7 + 1 = 8\n(c) 8 * 2 = 17", "rrw"),
        ("(3 + 4) * 2 = 14", "r"),
        ("2(3+4)=14", "r"),
        ("6 + 60 (all of them) + 2 = 66", ""),
        ("there are 7 (3 + 4 = 7) apples", "r"),
        ("Total\n= 3 + 4\n\n= 8", "w"),
        ("3+4=<<3+4=7>>7 apples", "r"),
        ("84 / 2 = **42**, and **3 + 4 = 8**", "rw"),
        (r"\(3 \times 4 = 12\), $7 \cdot 30 = \boxed{210}$, \frac{84}{2} = 43", "rrw"),
        ("1/2 of 8 = 4", "r"),
        ("The sum of 5 + 3 = 9", "w"),
    ],
)
def test_steps_are_found_and_judged(text: str, expected: str) -> None:
    assert marks(text) == expected, find_steps(text)


@pytest.mark.parametrize(
    "text",
    [
        "2x = 84",
        "x + 3 + 4 = 12",
        "24 - 3x - 17 = 0",
        "3 + 4 = 7y",
        "2^3 + 1 = 9",
        "2**3 = 8",
        "3! + 4 = 10",
        "f(3) + 4 = 9",
        "√9 + 1 = 4",
        "3 1/2 + 1 = 4.5",
        "2 and 1/3 x 3 = 7",
        r"3\frac{1}{2} + 1 = 4.5",
        "3,5 + 1 = 4.5",
        "1,2345 + 1 = 5",
        "3 hours = 3 * 60 minutes",
        "1 pack = $28 / 2",
        "2 hours + 30 minutes = 150 minutes",
        "$2 + 50 cents = $2.50",
        "10 / 3 = 3 remainder 1",
        "42 ÷ 5 = 8 with 2 left over",
        "7/3 = 2 and 1/3",
        "half of 8 + 2 = 6",
        "three times 4 + 1 = 13",
        "did 35 push-ups and 3 crunches = 35 + 3",
        "1st chapter + 36 pages = 67 pages",
        "Day 1 - 46 * 2 = 92",
        "Bus 1 - 46 * 2 = 92",
        "94 pickers/540 drums = 1 picker/x drums",
        "57.53/100 * 8 = 4.604 (approx.)",
        "50 - 20% = 40",
        "2 dozen + 3 = 27",
        "3 + 4 != 8",
        "3 + 4 >= 6",
        "3 + 4 =",
        "= 7",
        "1/0 = 3",
        "3 + ٤ = 7",
        "a = b = c",
        "The year 2020 = 20 * 101",
        "16 ounces = 1 pound",
        "total += 3",
        "3 + ? = 7",
        "8 / 3 = 2, with a remainder of 2",
        "8 / 3 = 2, remainder 2",
        "25 / 4 = 6 boxes, with 1 left",
        "100/7 = 14, rounded down",
        "100 / 7 = 14 full weeks",
        "8 + 5 = 1 PM",
        "3 + 4 = 8 is wrong",
    ],
)
def test_what_is_no_plain_arithmetic_is_never_called_wrong(text: str) -> None:
    assert "w" not in marks(text), find_steps(text)


OPERATIONS = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b, "/": lambda a, b: a / b}
SIGNS = {"+": ["+"], "-": ["-", "−", "–"], "*": ["*", "×", "x", "·", r"\times"], "/": ["/", "÷", r"\div"]}


def tree(rng: random.Random, depth: int) -> tuple[Fraction, str]:
    """A value and one way to write it, the value by Python's own fractions."""
    if depth == 0 or rng.random() < 0.4:
        value = Fraction(
            rng.choice([rng.randint(1, 99), rng.randint(1000, 99999), rng.randint(1, 999) / Fraction(100)])
        )
        return value, written(rng, value)
    sign = rng.choice("+-*/")
    (left, left_text), (right, right_text) = tree(rng, depth - 1), tree(rng, depth - 1)
    if sign == "/" and right == 0:
        sign = "+"
    space = rng.choice([" ", "  "])
    text = f"{left_text}{space}{rng.choice(SIGNS[sign])}{space}{right_text}"
    return OPERATIONS[sign](left, right), f"({text})"


def written(rng: random.Random, value: Fraction) -> str:
    """A decimal as people write it."""
    if value.denominator == 1:
        return f"{int(value):,}" if rng.random() < 0.3 else str(int(value))
    return f"{float(value):.2f}"


def decimals(value: Fraction) -> str | None:
    """A value of at most four decimals in full, None where it has more."""
    scaled = value * 10_000
    if scaled.denominator != 1 or abs(value) >= 10**12:
        return None
    sign, (whole, rest) = "-" if value < 0 else "", divmod(abs(int(scaled)), 10_000)
    return f"{sign}{whole}.{rest:04d}".rstrip("0").rstrip(".")


BEFORE = ["", "So he has ", "Total = ", "x = ", "1. ", "- ", "Therefore: ", "The cost is $5. Then ", "(a) "]
AFTER = ["", ".", " apples.", " in all, and so on.", " (as he said)", "\nThat is it.", "!", " dollars per week"]


def test_a_right_chain_is_never_flagged_and_a_wrong_end_always() -> None:
    rng = random.Random(7)
    found = 0
    while found < 1500:
        value, text = tree(rng, rng.randint(1, 3))
        result = decimals(value)
        if not text.startswith("(") or result is None or len(text) > 150:
            continue
        found += 1
        text = text[1:-1] if rng.random() < 0.5 else text
        before, after = rng.choice(BEFORE), rng.choice(AFTER)
        assert marks(f"{before}{text} = {result}{after}") == "r", (before, text, result, after)
        wrong = decimals(value + rng.choice([1, -1, 10, Fraction(1, 2)]))
        assert marks(f"{before}{text} = {wrong}{after}") == "w", (before, text, wrong, after)


def test_a_chain_of_many_steps() -> None:
    rng = random.Random(3)
    for _ in range(200):
        total, parts = rng.randint(1, 50), []
        for _ in range(rng.randint(1, 6)):
            number = rng.randint(1, 50)
            parts.append(f"{total} + {number} = {total + number}")
            total += number
        for joint in (", ", ". ", "; ", "\n", " and then ", " so "):
            assert marks(joint.join(parts)) == "r" * len(parts), joint.join(parts)


@pytest.mark.parametrize(
    "text",
    [
        "=" * 20_000,
        "(" * 20_000 + "= 3",
        "3 + " * 5_000 + "= 3",
        "1 = " * 5_000,
        "1 + 1 = " * 2_500,
        "\n" * 20_000 + "= 3",
        " " * 20_000 + "=",
        "9" * 20_000 + " + 1 = 2",
        "-" * 20_000 + "1 = 1",
        "3 apples " * 2_000 + "= 6",
        "\\frac{" * 3_000,
        "**" * 10_000,
        "a" * 20_000,
        "1,000," * 3_000 + " = 3",
    ],
)
def test_no_text_takes_long(text: str) -> None:
    begin = time.process_time()
    find_steps(text)
    assert time.process_time() - begin < 2.0
