from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from qcrd_ray.config import ExperimentConfig, config_from_dict
from qcrd_ray.errors import UserError
from qcrd_ray.rationales import augmentation, taggers
from qcrd_ray.rationales.augmentation import augment_rows, augmentation_tagger
from qcrd_ray.rationales.schema import AUGMENTED_LISTS, AUGMENTED_NEGATIVES, check_table
from qcrd_ray.rationales.tables import open_rationale_table, prepare_tables
from qcrd_ray.rationales.taggers import Word, choose_tagger, spacy_words

QUESTION = "Robin has 28 green packages of gum and 13 small packages of candy. How many pieces are there?"
TEXTS = ("Robin has 28 packages, and each package holds 14 pieces.", "28 * 14 = 392, so there are 392 pieces.")


def config(**keys: Any) -> ExperimentConfig:
    return config_from_dict({"task": "svamp", **keys, "judge": {"augmentation": "rules", **keys.get("judge", {})}})


def row(name: str, positives: list[str], negatives: list[str]) -> dict[str, Any]:
    return {"id": name, "question": QUESTION, "choices": None, "positives": positives, "negatives": negatives}


def write_source(folder: Path, questions: int) -> Path:
    folder.mkdir(exist_ok=True)
    lines = []
    for i in range(questions):
        samples = [
            {"rationale": f"{text} It is way {j} of {i}.", "answer": "2" if j > 3 else "1"}
            for j, text in enumerate([*TEXTS, *TEXTS, TEXTS[0]])
        ]
        lines.append({"id": f"q{i}", "question": QUESTION, "answer": "1", "teacher_samples": samples[: 1 + i % 5]})
    lines.append(
        {"id": "dots", "question": "?", "answer": "1", "teacher_samples": [{"rationale": "...", "answer": "1"}]}
    )
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_every_question_is_balanced_and_seeded_by_its_id_alone(
    ray_session: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_source(tmp_path / "in", 300)
    chosen = config(data={"path": str(folder)})
    counts = prepare_tables(chosen, tmp_path / "one")
    made = counts.augmented
    assert made is not None
    sets = open_rationale_table(tmp_path / "one" / "train.arrow").to_pylist()
    lists = open_rationale_table(tmp_path / "one" / "train.augmented.arrow")
    check_table(lists.schema, AUGMENTED_LISTS, "train.augmented.arrow")
    assert lists.num_rows == len(sets) == 301
    for entry, negatives in zip(sets, lists["negatives"].to_pylist(), strict=True):
        if entry["id"] == "dots":
            assert negatives == []
            continue
        assert len(entry["positives"]) == len(entry["negatives"]) + len(negatives)
        assert not set(negatives) & set(entry["positives"] + entry["negatives"])
    flat = pq.read_table(tmp_path / "one" / "augmented_negatives")
    check_table(flat.schema, AUGMENTED_NEGATIVES, "augmented_negatives")
    assert flat["negative"].to_pylist() == [text for texts in lists["negatives"].to_pylist() for text in texts]
    assert set(flat["method"].to_pylist()) == {"mask", "replace", "mixed"}
    assert (made.tagger, made.negatives, made.questions, made.unbalanced) == ("rules", flat.num_rows, 300, 1)
    assert [r["positive_index"] for r in flat.to_pylist() if r["id"] == "q3"] == [0, 1, 2, 3]

    monkeypatch.setattr(augmentation, "ROWS_AT_ONCE", 7)
    folder_of_some = tmp_path / "some"
    folder_of_some.mkdir()
    lines = (folder / "train.jsonl").read_text().splitlines(keepends=True)
    (folder_of_some / "train.jsonl").write_text("".join(lines[150:]))
    prepare_tables(config(data={"path": str(folder_of_some)}), tmp_path / "two")
    again = open_rationale_table(tmp_path / "two" / "train.augmented.arrow")
    assert again["negatives"].to_pylist() == lists["negatives"].to_pylist()[150:]
    other = prepare_tables(config(data={"path": str(folder_of_some)}, teacher={"seed": 1}), tmp_path / "three")
    assert other.augmented is not None
    assert not again.equals(open_rationale_table(tmp_path / "three" / "train.augmented.arrow"))


def test_tables_know_whether_they_hold_corrupted_positives(ray_session: Any, tmp_path: Path) -> None:
    folder = write_source(tmp_path / "in", 3)
    output = tmp_path / "out"
    chosen = config(data={"path": str(folder)})
    assert prepare_tables(chosen, output).augmented is not None
    assert prepare_tables(chosen, output).reused
    (output / "train.augmented.arrow").unlink()
    assert not prepare_tables(chosen, output).reused
    without = config(data={"path": str(folder)}, judge={"augmentation": "none"})
    assert prepare_tables(without, output).augmented is None
    assert not (output / "train.augmented.arrow").exists()
    assert not (output / "augmented_negatives").exists()


@pytest.mark.parametrize(
    "keys",
    [
        {"judge": {"augmentation": "none"}},
        {"judge": {"enabled": False}},
        {"judge": {"pretrain_steps": 0}},
        {"method": "dss"},
        {"method": "finetune"},
    ],
)
def test_nothing_is_made_where_nothing_uses_it(keys: dict[str, Any]) -> None:
    assert augmentation_tagger(config(**keys)) == "none"


def test_a_tagger_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(taggers.importlib.util, "find_spec", lambda name: None)
    assert choose_tagger("auto") == "rules"
    for name in ("spacy", "stanza"):
        with pytest.raises(UserError, match=rf"judge\.augmentation: {name} with .* is not installed"):
            augmentation_tagger(config(judge={"augmentation": name}))


PARTS = {
    **dict.fromkeys(("Robin",), "PROPN"),
    **dict.fromkeys(("has", "holds", "are"), "VERB"),
    **dict.fromkeys(("packages", "package", "pieces", "gum", "candy"), "NOUN"),
    **dict.fromkeys(("green", "small", "many"), "ADJ"),
}


def words_of(text: str) -> list[Word]:
    return [Word(m.start(), m.end(), PARTS.get(m[0])) for m in re.finditer(r"\w+", text)]


def test_words_become_words_of_the_same_part_of_speech(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(augmentation, "tag", lambda tagger, texts: [words_of(text) for text in texts])
    rows = [row(f"q{i}", ["Robin has packages"], []) for i in range(300)]
    made = augment_rows(rows, config(), "spacy:some 1.0")
    replaced = [m["negatives"][0] for m in made if m["method"] == ["replace"]]
    assert len(replaced) > 100
    allowed = [{"Robin", "[MASK]"}, {"has", "are"}, {"packages", "gum", "candy", "pieces"}]
    for text in replaced:
        assert all(word in words for word, words in zip(text.split(), allowed, strict=True)), text
    assert {text.split()[1] for text in replaced} == {"has", "are"}
    assert {text.split()[2] for text in replaced} == {"packages", "gum", "candy", "pieces"}


def test_spacy_tells_the_parts() -> None:
    spacy = pytest.importorskip("spacy", reason="spacy is not installed")
    pipeline = spacy.blank("en")
    ruler = pipeline.add_pipe("attribute_ruler")
    for word, part in PARTS.items():
        ruler.add(patterns=[[{"ORTH": word}]], attrs={"POS": part})
    texts = [*TEXTS, "Don't  stop"]
    found = spacy_words(pipeline, texts)
    assert [text[word.begin : word.end] for text, words in zip(texts, found, strict=True) for word in words][:3] == [
        "Robin",
        "has",
        "28",
    ]
    assert [word.part for word in found[0]][:4] == ["PROPN", "VERB", None, "NOUN"]
    assert [texts[2][word.begin : word.end] for word in found[2]] == ["Do", "n't", " ", "stop"]


def test_an_installed_model_is_used() -> None:
    pytest.importorskip("spacy", reason="spacy is not installed")
    tagger = choose_tagger("auto")
    if not tagger.startswith("spacy:"):
        pytest.skip("no English model of spaCy is installed")
    (words,) = taggers.tag(tagger, ["Robin quickly ate 28 green apples."])
    assert [word.part and word.part.split()[0] for word in words] == [
        "PROPN",
        "ADV",
        "VERB",
        None,
        "ADJ",
        "NOUN",
        None,
    ]
    rows = [row(f"q{i}", list(TEXTS), []) for i in range(20)]
    made = augment_rows(rows, config(), tagger)
    assert all(len(m["negatives"]) == 2 for m in made)
    assert made == augment_rows(rows[::-1], config(), tagger)[::-1]
