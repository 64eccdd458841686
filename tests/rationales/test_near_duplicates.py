from __future__ import annotations

import pytest

from qcrd_ray.rationales.near_duplicates import similarity, without_near_duplicates

LONG = "Robin has 28 packages with 14 pieces each, so there are 28 * 14 = 392 pieces of gum in all of the packages."


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("So 8 plums.", "so  8\nplums"),
        ("It's 1,000.5!", "it's 1,000.5"),
        ("", "..."),
        ("yes", "Yes."),
    ],
)
def test_one_is_equality_but_for_case_space_and_punctuation(a: str, b: str) -> None:
    assert similarity(a, b) == 1.0
    assert without_near_duplicates([a, b], 1.0) == (a,)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("so 8", "so 9"),
        ("8", "9"),
        ("it is 1.5", "it is 15"),
        ("28 * 14 is it", "28 + 14 is it"),
        ("8 - 3 is it", "8 3 is it"),
        ("a b a b a b", "a b a b a b a b"),
    ],
)
def test_other_numbers_operators_and_repeats_are_no_equality(a: str, b: str) -> None:
    assert similarity(a, b) < 1.0
    assert without_near_duplicates([a, b], 1.0) == (a, b)


def test_similarity_is_the_share_of_common_grams() -> None:
    assert similarity("a b c d", "a b c e") == pytest.approx(1 / 3)
    assert similarity("a b c d", "e f g h") == 0.0
    assert similarity("a b", "a b c") == 0.0
    changed = LONG.replace("Robin", "He")
    assert 0.85 < similarity(LONG, changed) < 1.0
    assert similarity(LONG, changed) == similarity(changed, LONG)


def test_only_kept_ones_count() -> None:
    words = [f"w{i}" for i in range(40)]
    chain = [" ".join(words[i : i + 20]) for i in range(0, 12, 3)]  # each near the next, the first far from the third
    assert similarity(chain[0], chain[1]) > 0.7 > similarity(chain[0], chain[2])
    assert without_near_duplicates(chain, 0.7) == (chain[0], chain[2])
    assert without_near_duplicates([], 0.5) == ()
