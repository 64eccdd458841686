"""The tables between the stages. Their schemas are here and nowhere else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from qcrd_ray.errors import UserError

QUESTIONS = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("question", pa.string(), nullable=False),
        pa.field("answer", pa.string()),
        pa.field("target", pa.string()),
        pa.field("choices", pa.list_(pa.string())),
    ]
)
"""`answer` is gold and serves equality only; `target` is what a student learns to write for it."""

TEACHER_SAMPLES = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("sample_index", pa.int32(), nullable=False),
        pa.field("rationale", pa.string(), nullable=False),
        pa.field("answer", pa.string()),
        pa.field("target", pa.string()),
        pa.field("teacher", pa.string()),
        pa.field("temperature", pa.float32()),
        pa.field("seed", pa.int64()),
        pa.field("finish_reason", pa.string()),
        pa.field("completion_tokens", pa.int32()),
        pa.field("fingerprint", pa.string()),
    ]
)
"""`answer` is the teacher's own, null where it could not be parsed; what a recorded sample does not tell is null."""

STORED_SAMPLES = pa.schema(
    [
        pa.field("key", pa.int64(), nullable=False),
        pa.field("id", pa.string(), nullable=False),
        pa.field("sample_index", pa.int32(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("seed", pa.int64()),
        pa.field("finish_reason", pa.string()),
        pa.field("completion_tokens", pa.int32()),
    ]
)
"""Raw samples of a live teacher as they are kept for reuse: parsed only as tables are made of them, so that a better
answer pattern costs no new sample. `key` is a hash of the question's id and of the prompt that was asked: a question
whose text has changed has no samples."""

RATIONALE_SETS = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("question", pa.string(), nullable=False),
        pa.field("choices", pa.list_(pa.string())),
        pa.field("answer", pa.string()),
        pa.field("label", pa.string(), nullable=False),
        pa.field("positives", pa.list_(pa.string()), nullable=False),
        pa.field("negatives", pa.list_(pa.string()), nullable=False),
        pa.field("agreement", pa.float32()),
        pa.field("votes_gold", pa.bool_()),
        pa.field("sample0", pa.string(), nullable=False),
        pa.field("sample0_label", pa.string()),
    ]
)
"""One row a question. `label`: what the label task learns. `agreement`: votes of the winner over parsed samples.
`votes_gold`: whether the winner is the gold answer, null without one. `sample0` and `sample0_label`: the rationale of
sample 0, empty where there is no sample, and its answer in the student's form, null where it could not be parsed."""

AUGMENTED_NEGATIVES = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("positive_index", pa.int32(), nullable=False),
        pa.field("method", pa.string(), nullable=False),
        pa.field("negative", pa.string(), nullable=False),
    ]
)
"""Corrupted positives that balance the teacher's minority: of which positive, and how (`mask`, `replace`, `mixed`)."""

AUGMENTED_LISTS = pa.schema([pa.field("negatives", pa.list_(pa.string()), nullable=False)])
"""The same for training: row i belongs to row i of the rationale sets."""

HELD_OUT = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("question", pa.string(), nullable=False),
        pa.field("choices", pa.list_(pa.string())),
        pa.field("answer", pa.string(), nullable=False),
        pa.field("label", pa.string(), nullable=False),
    ]
)
"""Questions that a student is evaluated on. `label` is the gold answer in the form that the student learns."""

NEGATIVES = pa.schema(
    [
        pa.field("epoch", pa.int32(), nullable=False),
        pa.field("step", pa.int32(), nullable=False),
        pa.field("iteration", pa.int32(), nullable=False),
        pa.field("snapshot", pa.int32(), nullable=False),
        pa.field("id", pa.string(), nullable=False),
        pa.field("negative_index", pa.int32(), nullable=False),
        pa.field("rationale", pa.string(), nullable=False),
        pa.field("token_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("mean_logprob", pa.float32()),
        pa.field("finish_reason", pa.string()),
        pa.field("temperature", pa.float32()),
        pa.field("top_k", pa.int32()),
        pa.field("seed", pa.int64()),
    ]
)
"""One row for each (epoch, step, id, negative_index), from which its seed is hashed. `mean_logprob` is raw, at
temperature 1, under the snapshot that made it."""

OBSERVATIONS = pa.schema(
    [
        pa.field("split", pa.string(), nullable=False),
        pa.field("id", pa.string(), nullable=False),
        pa.field("question", pa.string(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("temperature", pa.float32()),
        pa.field("rationale", pa.string(), nullable=False),
        pa.field("score", pa.float32()),
    ]
)
"""Rationales of a trained run to look at. `question`: as the student reads it. `kind`: `positive` and `negative`, the
teacher's by its vote, or `student`, sampled from the student that the run keeps. `score`: the discriminator's, in
[0, 1], null without one."""


@dataclass(frozen=True)
class Question:
    """A row of `questions`."""

    id: str
    question: str
    answer: str | None = None
    target: str | None = None
    choices: tuple[str, ...] | None = None


@dataclass(frozen=True)
class TeacherSample:
    """A row of `teacher_samples` without its question's id; `sample_index` None: its place in the sequence."""

    rationale: str
    answer: str | None = None
    target: str | None = None
    teacher: str | None = None
    temperature: float | None = None
    seed: int | None = None
    finish_reason: str | None = None
    completion_tokens: int | None = None
    fingerprint: str | None = None
    sample_index: int | None = None


def check_table(schema: pa.Schema, expected: pa.Schema, name: str, columns: Sequence[str] | None = None) -> None:
    """Check that a table has the columns of a schema, with their types.

    Args:
        schema: the table's own.
        expected: one of this file.
        name: what to call the table in an error.
        columns: the columns that are needed; all of `expected` by default.

    Raises:
        UserError: a missing column (with those that are there), a column of another type.
    """
    for column in columns if columns is not None else expected.names:
        if column not in schema.names:
            raise UserError(f"{name}: no column {column!r}; there are: {', '.join(schema.names) or 'none'}")
        found, wanted = schema.field(column).type, expected.field(column).type
        if not found.equals(wanted) and not (pa.types.is_large_string(found) and pa.types.is_string(wanted)):
            raise UserError(f"{name}: column {column!r} is {found}, expected {wanted}")
