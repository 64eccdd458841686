import random
import re
import subprocess
import sys

from qcrd_ray.rationales.corruption import corrupt, fill_negatives

QUESTION = (
    "Robin has 28 packages of gum and 13 packages of candy. There are 14 pieces in each package. How many pieces?"
)
RATIONALE = "Robin has 28 packages of gum with 14 pieces each, so 28 * 14 = 392 pieces. The answer is 392."
STRANGE = [
    "7",
    "a",
    "I",
    "x²",
    "²",
    "½ cup",
    "٣",
    "[MASK]",
    "a a",
    "1.2.3",
    "9" * 400,
    "1,000.50",
    "naïve café",
    "don't",
]


def copies(rationale, count=200):
    return [corrupt(rationale, QUESTION, random.Random(seed)) for seed in range(count)]


def test_a_copy_always_differs_and_keeps_a_word():
    for rationale in [RATIONALE, *STRANGE, "  two\nlines \n\n here ", "Yes."]:
        for copy in copies(rationale):
            assert copy.split() != rationale.split()
            assert re.search(r"\w", copy)


def test_a_text_without_a_word_comes_back():
    for rationale in ["", "   ", "+ - =", "...", "😀"]:
        assert set(copies(rationale, 20)) == {rationale}


def test_the_generator_decides_everything():
    assert copies(RATIONALE) == copies(RATIONALE)
    assert len(set(copies(RATIONALE))) > 190
    code = (
        "import random; from qcrd_ray.rationales.corruption import corrupt; "
        f"print(corrupt({RATIONALE!r}, {QUESTION!r}, random.Random(5)))"
    )
    other_process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other_process.stdout.rstrip("\n") == corrupt(RATIONALE, QUESTION, random.Random(5))


def test_a_share_of_the_words_is_touched_and_not_all():
    words = RATIONALE.split()
    for copy in copies(RATIONALE):
        same = len(set(words) & set(copy.split())) / len(set(words))
        assert 0.25 < same < 1.0


def test_only_part_of_the_copies_show_a_mask():
    masked = sum("[MASK]" in copy for copy in copies(RATIONALE))
    assert 50 <= masked <= 150
    assert any("<extra_id_0>" in corrupt(RATIONALE, "", random.Random(s), mask_token="<extra_id_0>") for s in range(20))


def test_numbers_become_other_numbers_of_the_question_or_near_ones():
    seen = {copy for copy in copies("392", 300) if copy != "[MASK]"}
    assert {"28", "13", "14"} <= seen
    assert seen - {"28", "13", "14"} <= {str(392 + step) for step in (-10, -3, -2, -1, 1, 2, 3, 10)}
    assert all(float(copy) >= 0 for copy in copies("0", 100) if copy != "[MASK]")
    assert any(re.fullmatch(r"\d\.\d\d", copy) for copy in copies("2.50", 50))


def test_operators_become_other_operators():
    changed = {match.group(1) for copy in copies("28 * 14") if (match := re.fullmatch(r"28 (\S) 14", copy))}
    assert changed == {"+", "-", "/", "×", "÷"}
    assert not any("twenty*" in copy for copy in copies("twenty-five"))


def test_filled_negatives():
    positives = [RATIONALE, RATIONALE.replace("392", "four hundred"), "28 * 14 = 392"]
    filled = fill_negatives(positives, ["so 42"], QUESTION, 3, (7, "q1"))
    assert filled[0] == "so 42" and len(filled) == 3 == len(set(filled))
    assert not set(filled) & set(positives)
    assert filled == fill_negatives(positives, ["so 42"], QUESTION, 3, (7, "q1"))
    assert filled != fill_negatives(positives, ["so 42"], QUESTION, 3, (8, "q1"))
    assert filled != fill_negatives(positives, ["so 42"], QUESTION, 3, (7, "q2"))


def test_filling_has_bounds():
    assert fill_negatives([RATIONALE], ["a", "b"], QUESTION, 1, (0,)) == ["a", "b"]
    assert fill_negatives([], [], QUESTION, 3, (0,)) == []
    assert fill_negatives(["..."], [], QUESTION, 3, (0,)) == []
    assert len(fill_negatives([RATIONALE], [], QUESTION, 5, (0,))) == 5


def test_torch_is_not_imported():
    code = "import sys, qcrd_ray.rationales.corruption; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
