"""The students and the batches of the benchmarks that time steps of training.

`svamp` and `cqa` have the lengths of the real questions and rationales where QCRD_BENCHMARK_DATA names the benchmark
data, else texts of those lengths that are made up. Token ids are those of SmolLM2's tokenizer.
"""

from __future__ import annotations

import itertools
import json
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

T5_SHAPES: dict[str, dict[str, int]] = {
    "t5_small": {"d_model": 512, "d_ff": 2048, "num_layers": 6, "num_heads": 8},
    "t5_base": {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12},
}
T5_VOCABULARY = 32128
STUDENTS = (*T5_SHAPES, "smollm2_135m")
DATA = ("svamp", "cqa")
PRECISIONS = ("auto", "bf16", "fp32")
QUESTIONS, POSITIVES = 8, 5
ACTIVE = 0.25
"""Share of the negatives within the margin."""


@dataclass(frozen=True)
class Example:
    """A question with as many rationales as a step takes."""

    id: str
    question: str
    label: str
    positives: list[str]
    negative: str


def examples(data: str, count: int, positives: int = POSITIVES) -> list[Example]:
    """Real questions where they are, in an order of its own, with so many positives each and a negative.

    SVAMP's teacher answered each question six times and CommonsenseQA's once: where that is not enough, the answers to
    the next questions stand in, for their lengths.
    """
    folder = os.environ.get("QCRD_BENCHMARK_DATA")
    rng = random.Random(7)
    if folder is None:
        return [_made_up(data, number, rng, positives) for number in range(count)]
    rows = [json.loads(line) for line in (Path(folder) / data / "train.jsonl").open(encoding="utf-8")]
    rng.shuffle(rows)
    teacher = "gpt35turbo-mcckd" if data == "svamp" else "palm540b"
    pool = []
    for row in rows:
        texts = [sample["rationale"] for sample in row["teacher_samples"] if sample["teacher"] == teacher]
        if len(texts) > (POSITIVES if data == "svamp" else 0):
            pool.append((row, texts))
    found = []
    for number, (row, _) in enumerate(pool[:count]):
        answers = itertools.chain.from_iterable(pool[(number + n) % len(pool)][1] for n in itertools.count())
        texts = list(itertools.islice(answers, positives + 1))
        question = row["question"] + "".join(f"\n({c})" for c in row.get("choices") or [])
        label = row.get("equation") or row["answer"]
        found.append(Example(row["id"], question, label, texts[:-1], texts[-1]))
    return found


def _made_up(data: str, number: int, rng: random.Random, positives: int) -> Example:
    """Words drawn so that the numbers of tokens are distributed as those of the real texts."""
    typical, spread, longest = (100, 0.45, 1000) if data == "svamp" else (38, 0.45, 200)

    def words(tokens: float) -> str:
        return " ".join(rng.choice(("cat", "dog", "red", "two", "sum", "has", "the", "of")) for _ in range(int(tokens)))

    rationales = [words(min(longest, max(8, rng.lognormvariate(0, spread) * typical))) for _ in range(positives + 1)]
    question = words(max(16, rng.gauss(45, 12)))
    return Example(f"made-up-{number}", question, words(6), rationales[:-1], rationales[-1])


def batches_of(
    student: Any, config: Any, found: Sequence[Example], questions: int = QUESTIONS
) -> list[tuple[Any, list[Any]]]:
    """(batch, the negatives of each of its questions), token ids folded into the student's vocabulary."""
    from qcrd_ray.rationales.streaming import StepBatch, TrainingRow
    from qcrd_ray.sampling.negatives import Negative
    from qcrd_ray.tasks.prompts import EXPLAIN, PREDICT

    tokenizer, limits = student.tokenizer, config.student
    vocabulary = student.model.config.vocab_size

    def fold(ids: Sequence[int]) -> list[int]:
        return [token if token < vocabulary else token % 32000 + 100 for token in ids]

    def target(text: str, limit: int) -> list[int]:
        return fold(tokenizer.target(text, limit).ids)

    batches = []
    for step in range(len(found) // questions):
        share, rows, negatives = found[step * questions : (step + 1) * questions], [], []
        for number, example in enumerate(share):
            positives = [target(text, limits.max_rationale_tokens) for text in example.positives]
            predict, explain = (fold(tokenizer.prompt(kind, example.question)[0]) for kind in (PREDICT, EXPLAIN))
            rows.append(
                TrainingRow(
                    row=step * questions + number, id=example.id, question=example.question, predict=predict,
                    explain=explain, label=target(example.label, limits.max_label_tokens), positives=positives,
                    positive_texts=example.positives, minority=[], minority_texts=[], first=positives[0],
                    first_text=example.positives[0], cut_prompts=0, cut_targets=0,
                )
            )  # fmt: skip
            negatives.append([Negative(target(example.negative, limits.max_rationale_tokens), example.negative, 1)])
        batches.append((StepBatch(step=step, epoch=0, global_size=questions, rows=rows), negatives))
    return batches


def margin_of(engine: Any, batches: Sequence[tuple[Any, list[Any]]], share: float) -> float:
    """δ within which `share` of the batches' negatives lie, for the student of an engine."""
    import torch

    engine.train(False)
    ordered: list[float] = []
    with torch.no_grad():
        for batch, negatives in batches:
            prompts = [row.explain for row in batch.rows]
            ce = engine.module.rationale_ce(prompts, [[n.ids for n in row] for row in negatives])
            ordered += ce.flatten().tolist()
    engine.train(True)
    ordered.sort()
    active = round(share * len(ordered))
    return ordered[-1] + 1.0 if active == len(ordered) else (ordered[active - 1] + ordered[active]) / 2


def batches_of_ids(steps: Sequence[Sequence[dict[str, list[int]]]]) -> Iterator[Any]:
    """Batches of questions with a label and a rationale, from their token ids."""
    from qcrd_ray.rationales.streaming import StepBatch, TrainingRow

    for step, share in enumerate(steps):
        rows = [
            TrainingRow(
                row=number, id=str(number), question="", predict=ids["predict"], explain=ids["explain"],
                label=ids["label"], positives=[ids["rationale"]], positive_texts=[""], minority=[], minority_texts=[],
                first=ids["rationale"], first_text="", cut_prompts=0, cut_targets=0,
            )
            for number, ids in enumerate(share)
        ]  # fmt: skip
        yield StepBatch(step=step, epoch=0, global_size=len(rows), rows=rows)


@dataclass(frozen=True)
class Setting:
    """A student with the config that it is trained by.

    Attributes:
        file: of the preset.
        embedded: the folder of the embedded SmolLM2, whose tokenizer cuts all texts.
    """

    student: Any
    config: Any
    file: Path
    embedded: Path

    @classmethod
    def of(cls, name: str, precision: str = "auto") -> Setting:
        import torch
        from transformers import T5Config, T5ForConditionalGeneration

        from qcrd_ray.config import load_config
        from qcrd_ray.models.embedded import embedded_student
        from qcrd_ray.models.seq2seq import Seq2SeqStudent
        from qcrd_ray.models.student import load_student
        from qcrd_ray.tasks.prompts import StudentTokenizer, load_tokenizer

        torch.manual_seed(0)
        file = Path(__file__).resolve().parents[1] / "jobs" / "configs" / f"{name}.yaml"
        config = load_config(
            file,
            ["student.model=embedded:smollm2-135m", f"teacher.samples={POSITIVES}", f"train.precision={precision}",
             "judge.encoder=embedded:minilm-l6"],
        )  # fmt: skip
        dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
        embedded = embedded_student("smollm2-135m")
        if name == "smollm2_135m":
            student = load_student(str(embedded), config.student, dtype)
        else:
            shape = T5Config(**T5_SHAPES[name], vocab_size=T5_VOCABULARY, dropout_rate=0.0, decoder_start_token_id=0)
            shape._attn_implementation = "sdpa"
            tokenizer = load_tokenizer(str(embedded), config.student).tokenizer
            network = T5ForConditionalGeneration(shape)
            student = Seq2SeqStudent(network, StudentTokenizer(tokenizer, config.student, True))
        return cls(student, config, file, Path(embedded))
