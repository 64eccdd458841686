"""Two students' rationales, sampled and judged: what jobs/judge.py does."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from qcrd_ray.config import ExperimentConfig
from qcrd_ray.errors import TooManyFailures, UserError
from qcrd_ray.evaluation.judge import CHOICES, LEAD, Judged, count, judge_prompt, verdict_of
from qcrd_ray.evaluation.own_process import in_own_process
from qcrd_ray.evaluation.student_rationales import (
    Written,
    choose_rows,
    explaining_student,
    gold_of,
    sample_student,
)
from qcrd_ray.rationales.schema import Question
from qcrd_ray.run_folder import writable_folder, write_text_atomic
from qcrd_ray.sampling.teacher import LIVE, LiveTeacher
from qcrd_ray.sampling.teacher_engine import Ask, Prompt, TeacherEngine, together
from qcrd_ray.sampling.teacher_prompt import first_seed
from qcrd_ray.seeding import stable_hash
from qcrd_ray.tasks import get_task

logger = logging.getLogger(__name__)

ANSWERS, PAIRS = "answers.jsonl", "pairs.jsonl"


@dataclass(frozen=True)
class Pair:
    """Two rationales of a question, and the prompts that ask which is better."""

    question: Question
    temperature: float
    a: Written
    b: Written
    a_first: Prompt
    b_first: Prompt

    @property
    def identical(self) -> bool:
        return self.a.rationale == self.b.rationale


def compare(config: ExperimentConfig) -> dict[str, Any]:
    """Sample `comparison.student_a` and `student_b`, have the judge of `teacher.*` compare them, count.

    `output` gets `pairs.jsonl`, every pair with the judge's raw answers, and `answers.jsonl`, from which the same
    command takes the answers that are there.

    Raises:
        UserError: what the user must mend.
        TooManyFailures: more of the judge's answers failed than `teacher.max_failed_share`; it has the result.
    """
    begin = time.perf_counter()
    settings = config.comparison
    if not config.output:
        raise UserError("config key output: not set; give the folder that the pairs go to")
    output = writable_folder(config.output, "output")
    if config.teacher.engine not in LIVE:
        raise UserError(
            f"config key teacher.engine: {config.teacher.engine} judges nothing; expected {', '.join(LIVE)}"
        )
    folders = {
        key: explaining_student(config, f"comparison.{key}", _named(getattr(settings, key), key))
        for key in ("student_a", "student_b")
    }
    judge = LiveTeacher(judging(config), CHOICES)
    temperatures = list(dict.fromkeys(settings.temperatures))
    rows = choose_rows(config, config.evaluation.split, settings.questions, settings.seed)
    questions = [row.question for row in rows]
    if len(questions) < settings.questions:
        logger.info("%s has %d questions, fewer than %d", config.evaluation.split, len(questions), settings.questions)
    written: dict[str, list[list[list[Written]]]] = {}
    for key, folder in folders.items():
        logger.info("%s writes %d rationales at each of %s", key, len(questions), temperatures)
        # Of one seed, two students that are alike would write the same texts, and a student no pair with itself.
        options: dict[str, Any] = {"top_k": settings.top_k, "seed": stable_hash(settings.seed, key)}
        written[key] = in_own_process(sample_student, config, folder, questions, temperatures, **options)
    pairs = [
        _pair(config, question, temperature, a, b, judge.builder.chat)
        for temperature, all_a, all_b in zip(temperatures, *written.values(), strict=True)
        for question, (a,), (b,) in zip(questions, all_a, all_b, strict=True)
    ]
    sampled = time.perf_counter()
    endpoint = config.teacher.endpoint.base_url if config.teacher.engine == "openai" else None
    fingerprint = f"{judge.fingerprint}-{stable_hash(endpoint):016x}" if endpoint else judge.fingerprint
    answers = Answers(output / ANSWERS, fingerprint)
    logger.info("the judge is asked for %d pairs in both orders; %d answers are there", len(pairs), len(answers.texts))
    failed = _ask_all(config, judge, pairs, answers)
    result = _result(config, pairs, answers, failed, judge)
    result["seconds"] = {"students": round(sampled - begin, 1), "judge": round(time.perf_counter() - sampled, 1)}
    failures = sum(failed.values())
    if failures > config.teacher.max_failed_share * 2 * len(pairs):
        reasons = ", ".join(f"{reason} {number}" for reason, number in failed.most_common(5))
        raise TooManyFailures(
            f"{failures} of {2 * len(pairs)} answers of the judge failed ({reasons}); what it answered is kept: start "
            "again to ask for the rest",
            result,
        )
    return result


def judging(config: ExperimentConfig) -> ExperimentConfig:
    """The config of the judge: the LLM of `teacher.*`, greedy, with the prompt of this file."""
    changed = {
        "temperature": 0.0,
        "top_k": 0,
        "top_p": 1.0,
        "samples": 1,
        "max_tokens": config.comparison.max_tokens,
        "stop": [],
        "prompt_file": None,
        "shots_file": None,
    }
    return config.model_copy(update={"teacher": config.teacher.model_copy(update=changed)})


def _named(model: str | None, key: str) -> str:
    if not model:
        raise UserError(f"config key comparison.{key}: not set; give a student folder, as runs/NAME/student")
    return model


def _pair(config: ExperimentConfig, question: Question, temperature: float, a: Written, b: Written, chat: bool) -> Pair:
    text = get_task(config).student_input(question.question, question.choices)
    one = judge_prompt(config.task, text, gold_of(question), a.rationale, b.rationale, chat)
    other = judge_prompt(config.task, text, gold_of(question), b.rationale, a.rationale, chat)
    return Pair(question, temperature, a, b, one, other)


class Answers:
    """The judge's answers, by prompt, in a file that a line is added to as each comes."""

    def __init__(self, path: Path, fingerprint: str) -> None:
        """Reads what is there.

        Args:
            fingerprint: of the judge; answers of another one are not its own.
        """
        self._path, self._fingerprint = path, fingerprint
        self.texts: dict[str, str] = {}
        self._file: TextIO | None = None
        if path.exists():
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    row = json.loads(line)
                    if row["judge"] == fingerprint:
                        self.texts[str(row["prompt"])] = str(row["text"])
                except (ValueError, KeyError, TypeError):
                    continue  # cut short by a kill

    @staticmethod
    def key(prompt: Prompt) -> str:
        return f"{stable_hash(prompt.text, prompt.messages):016x}"

    def of(self, prompt: Prompt) -> str | None:
        return self.texts.get(self.key(prompt))

    def add(self, prompt: Prompt, text: str) -> None:
        self.texts[self.key(prompt)] = text
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("a", encoding="utf-8")
            self._file.write("\n" if self._file.tell() else "")  # the line before may have no end
        row = {"judge": self._fingerprint, "prompt": self.key(prompt), "text": text}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def _ask_all(config: ExperimentConfig, judge: LiveTeacher, pairs: Sequence[Pair], answers: Answers) -> Counter[str]:
    """Ask for what is missing. Returns how many answers failed, by reason."""
    missing: dict[str, tuple[str, Prompt]] = {}
    for pair in pairs:
        for prompt in () if pair.identical else (pair.a_first, pair.b_first):
            if answers.of(prompt) is None:
                missing[answers.key(prompt)] = (pair.question.id, prompt)
    if not missing:
        return Counter()
    engine = judge.start(0.0)()
    try:
        return asyncio.run(_asked(engine, list(missing.values()), answers, config.comparison.seed))
    finally:
        answers.close()


async def _asked(
    engine: TeacherEngine, missing: Sequence[tuple[str, Prompt]], answers: Answers, seed: int
) -> Counter[str]:
    failed: Counter[str] = Counter()

    async def one(question: str, prompt: Prompt) -> None:
        answered = await engine.ask(Ask(question, prompt, (0,), first_seed(seed, question)))
        if 0 in answered.replies:
            answers.add(prompt, answered.replies[0].text)
        else:
            failed[answered.failed.get(0) or engine.stopped or "no answer"] += 1

    try:
        await together([one(question, prompt) for question, prompt in missing])
    finally:
        await engine.close()
    return failed


def _result(
    config: ExperimentConfig, pairs: Sequence[Pair], answers: Answers, failed: Mapping[str, int], judge: LiveTeacher
) -> dict[str, Any]:
    """Count, and write the pairs."""
    chat = judge.builder.chat
    lines: list[str] = []
    judged: dict[float, list[Judged]] = {pair.temperature: [] for pair in pairs}
    for pair in pairs:
        raw = [None if pair.identical else answers.of(prompt) for prompt in (pair.a_first, pair.b_first)]
        read = [text if chat or text is None else f"{LEAD} {text.strip().partition(chr(10))[0]}" for text in raw]
        one = Judged(verdict_of(read[0], True), verdict_of(read[1], False), identical=pair.identical)
        judged[pair.temperature].append(one)
        line = {
            "id": pair.question.id,
            "temperature": pair.temperature,
            "question": pair.question.question,
            "answer": gold_of(pair.question),
            "rationale_a": pair.a.rationale,
            "rationale_b": pair.b.rationale,
            "raw_a_first": raw[0],
            "raw_b_first": raw[1],
            "verdict_a_first": one.a_first,
            "verdict_b_first": one.b_first,
            "outcome": one.outcome,
        }
        text = json.dumps(line, ensure_ascii=False)
        lines.append(text.encode("utf-8", "replace").decode("utf-8") + "\n")  # a judge may write half a surrogate pair
    assert config.output is not None
    write_text_atomic(Path(config.output).expanduser() / PAIRS, "".join(lines))
    return {
        "job": "judge",
        "task": config.task,
        "split": config.evaluation.split,
        "questions": len({pair.question.id for pair in pairs}),
        "student_a": config.comparison.student_a,
        "student_b": config.comparison.student_b,
        "judge": {
            "engine": config.teacher.engine,
            "model": config.teacher.model,
            "chat": chat,
            "choices": list(judge.choices),
        },
        "failed": dict(failed),
        "comparisons": [
            {"temperature": temperature, **count(pairs_of_it)} for temperature, pairs_of_it in judged.items()
        ],
    }
