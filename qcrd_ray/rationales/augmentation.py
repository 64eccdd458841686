"""Corrupted positives that balance the teacher's minority (appendix A.3), made for a whole table by Ray Data.

The discriminator is pretrained on them. They depend on the seed and the question alone, whatever runs beside.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from qcrd_ray.config import ExperimentConfig
from qcrd_ray.rationales.corruption import WordKinds, make_negatives
from qcrd_ray.rationales.counts import AugmentedCounts
from qcrd_ray.rationales.ray_data import stream_tables
from qcrd_ray.rationales.schema import AUGMENTED_LISTS, AUGMENTED_NEGATIVES
from qcrd_ray.rationales.table_files import ArrowFile, ParquetParts, open_rationale_table
from qcrd_ray.rationales.taggers import NONE, RULES, Word, choose_tagger, tag
from qcrd_ray.tasks import get_task

AUGMENTED = "augmented"
ROWS_AT_ONCE = 2048

_MADE = pa.schema(
    [
        pa.field("id", pa.string()),
        pa.field("positive_index", pa.list_(pa.int32())),
        pa.field("method", pa.list_(pa.string())),
        pa.field("negatives", pa.list_(pa.string())),
        pa.field("missing", pa.int32()),
    ]
)


def augmentation_tagger(config: ExperimentConfig) -> str:
    """The tagger that corrupted positives are made with; `none` where nothing uses them.

    Raises:
        UserError: `judge.augmentation` names one that is not installed.
    """
    judge = config.judge
    if not (config.is_contrastive and judge.enabled and judge.pretrain_steps):
        return NONE
    return choose_tagger(judge.augmentation)


def write_augmented(config: ExperimentConfig, split: str, folder: Path, tagger: str) -> AugmentedCounts:
    """Write `augmented_negatives/` and `<split>.augmented.arrow` beside a `<split>.arrow`.

    Row i of the Arrow file belongs to row i of the other: as many corrupted positives as the question has positives
    more than negatives. Fewer, and counted as unbalanced, where its positives have too few words.
    """
    table = (folder / f"{split}.arrow").absolute()
    rows = open_rationale_table(table).num_rows
    reads = [
        partial(_augment, table, begin, min(begin + ROWS_AT_ONCE, rows), config, tagger)
        for begin in range(0, rows, ROWS_AT_ONCE)
    ]
    made = augmented = unbalanced = 0
    with (
        ParquetParts(folder / "augmented_negatives", AUGMENTED_NEGATIVES) as parts,
        ArrowFile(folder / f"{split}.{AUGMENTED}.arrow", AUGMENTED_LISTS) as lists,
    ):
        for block in stream_tables(reads, _MADE):
            lists.write(block.select(AUGMENTED_LISTS.names).cast(AUGMENTED_LISTS))
            for batch in block.to_batches():
                flat = {
                    "id": pc.take(batch["id"], pc.list_parent_indices(batch["negatives"])),
                    "positive_index": pc.list_flatten(batch["positive_index"]),
                    "method": pc.list_flatten(batch["method"]),
                    "negative": pc.list_flatten(batch["negatives"]),
                }
                parts.write(pa.table(flat).cast(AUGMENTED_NEGATIVES))
                made += len(flat["id"])
                augmented += pc.sum(pc.greater(pc.list_value_length(batch["negatives"]), 0)).as_py() or 0
                unbalanced += pc.sum(pc.greater(batch["missing"], 0)).as_py() or 0
    return AugmentedCounts(tagger=tagger, negatives=made, questions=augmented, unbalanced=unbalanced)


def _augment(path: Path, begin: int, end: int, config: ExperimentConfig, tagger: str) -> Iterable[pa.Table]:
    columns = ["id", "question", "choices", "positives", "negatives"]
    rows = open_rationale_table(path).select(columns).slice(begin, end - begin).to_pylist()
    return [pa.Table.from_pylist(augment_rows(rows, config, tagger), schema=_MADE)]


def augment_rows(rows: Sequence[dict[str, Any]], config: ExperimentConfig, tagger: str) -> list[dict[str, Any]]:
    """Corrupted positives of rows of `rationale_sets`: {id, positive_index, method, negatives, missing} each."""
    task = get_task(config)
    questions = [task.student_input(row["question"], row["choices"]) for row in rows]
    wanted = [max(0, len(row["positives"]) - len(row["negatives"])) for row in rows]
    short = [number for number, count in enumerate(wanted) if count]
    kinds: dict[int, list[WordKinds]] = {}
    if tagger != RULES:
        found = _kinds([rows[number] for number in short], [questions[number] for number in short], tagger)
        kinds = dict(zip(short, found, strict=True))
    result = []
    for number, row in enumerate(rows):
        seed = (config.teacher.seed, row["id"])
        made = make_negatives(
            row["positives"], row["negatives"], questions[number], wanted[number], seed, kinds.get(number)
        )
        result.append(
            {
                "id": row["id"],
                "positive_index": [corruption.positive_index for corruption in made],
                "method": [corruption.method for corruption in made],
                "negatives": [corruption.text for corruption in made],
                "missing": wanted[number] - len(made),
            }
        )
    return result


def _kinds(rows: Sequence[dict[str, Any]], questions: Sequence[str], tagger: str) -> list[list[WordKinds]]:
    """For each row the parts of speech of each of its positives; words are those of the question and all rationales."""
    rationales = [[*row["positives"], *row["negatives"]] for row in rows]
    texts = [text for given, question in zip(rationales, questions, strict=True) for text in (*given, question)]
    tagged = iter(zip(texts, tag(tagger, texts), strict=True))
    result = []
    for row, given in zip(rows, rationales, strict=True):
        own = [next(tagged) for _ in range(len(given) + 1)]
        words: dict[str, dict[str, None]] = {}  # in the order of the texts, each once
        for text, found in own:
            for word in found:
                if word.part is not None:
                    words.setdefault(word.part, {})[text[word.begin : word.end]] = None
        lists = {part: tuple(forms) for part, forms in words.items()}
        result.append([WordKinds(_places(found), lists) for _, found in own[: len(row["positives"])]])
    return result


def _places(words: Sequence[Word]) -> dict[tuple[int, int], str]:
    return {(word.begin, word.end): word.part for word in words if word.part is not None}
