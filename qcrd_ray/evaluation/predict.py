"""Answers of a trained student to questions as they come: label and rationale, in order, a batch at a time."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TextIO, TypeVar

from qcrd_ray.config import ExperimentConfig, PredictionConfig, load_config
from qcrd_ray.errors import UserError
from qcrd_ray.evaluation.questions import Asked, Bad, Input, check_file, is_unicode, read_questions
from qcrd_ray.models.exported import check_exported, read_exported
from qcrd_ray.run_folder import text_file_atomic
from qcrd_ray.sampling.engine import EngineSpec, Request, SamplingEngine, SamplingParameters, start_engine
from qcrd_ray.sampling.predictions import most_tokens, rationale_and_label
from qcrd_ray.sampling.student_engine import engine_spec
from qcrd_ray.seeding import stable_hash
from qcrd_ray.tasks import get_task
from qcrd_ray.tasks.prompts import EXPLAIN, PREDICT, load_tokenizer

T = TypeVar("T")
logger = logging.getLogger(__name__)

READY_BATCHES = 1
REPORT_SECONDS = 15.0
_ESCAPED = {code: f"\\u{code:04x}" for code in (*range(0x7F, 0xA0), 0x2028, 0x2029)}
"""What JSON leaves as it is and a terminal or a reader of lines does not: control characters and line separators."""


@dataclass
class Counts:
    """What became of the inputs.

    Attributes:
        cut: questions whose prompt was cut to the student's length.
    """

    answered: int = 0
    bad: int = 0
    cut: int = 0
    started: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class Work:
    """A batch, ready for the engine.

    Attributes:
        requests: the label of every question, then the rationale of every question where it is asked for.
    """

    inputs: list[Input]
    requests: list[Request]
    cut: int


class Predictor:
    """A student and the engine that runs it."""

    def __init__(self, engine: SamplingEngine, config: ExperimentConfig, options: PredictionConfig, rationales: bool):
        """
        Args:
            config: of the student, whose folder is `student.model`.
            rationales: whether they are wanted.
        """
        self.engine, self.config, self.options = engine, config, options
        self.tokenizer = load_tokenizer(config.student.model, config.student)
        self.task = get_task(config)
        self.rationales = rationales
        self.prefixes = [PREDICT]
        if rationales and config.method not in ("single_task", "finetune"):
            self.prefixes.append(EXPLAIN)

    def prepare(self, inputs: list[Input]) -> Work:
        """Tokenize a batch."""
        asked = [one for one in inputs if isinstance(one, Asked)]
        texts = [self.task.student_input(one.question, one.choices) for one in asked]
        requests: list[Request] = []
        cut = 0
        for prefix in self.prefixes:
            parameters = SamplingParameters(
                temperature=self.options.temperature, max_tokens=most_tokens(self.config, prefix), logprobs=False
            )
            prompts = self.tokenizer.prompts(prefix, texts)
            cut = max(cut, sum(was_cut for _, was_cut in prompts))
            requests += [
                Request(tuple(ids), parameters, stable_hash(self.options.seed, "predict", prefix, one.number))
                for (ids, _), one in zip(prompts, asked, strict=True)
            ]
        return Work(inputs, requests, cut)

    def answer(self, work: Work) -> list[dict[str, Any]]:
        """An object for each input, in order."""
        texts = [generation.text.strip() for [generation] in self.engine.generate(work.requests)]
        count = len(texts) // len(self.prefixes)
        answers = iter(zip(texts[:count], texts[count:] or [""] * count, strict=True))
        return [self._object(one, *(next(answers) if isinstance(one, Asked) else ("", ""))) for one in work.inputs]

    def _object(self, one: Input, label: str, rationale: str) -> dict[str, Any]:
        if isinstance(one, Bad):
            return {"error": one.message}
        if self.config.method == "single_task":
            rationale, label = rationale_and_label(self.config, label)
        found = {} if one.id is None else {"id": one.id}
        found |= {"question": one.question, "label": label}
        if self.rationales and self.config.method != "finetune":
            found["rationale"] = rationale
        return found


def predict_lines(
    predictor: Predictor, batches: Iterable[list[Input]], write: Callable[[str], None], skip_bad: bool
) -> Counts:
    """Answer batches of inputs; `write` gets the lines of each as soon as it is done.

    The next batch is read and tokenized while the engine works on one.

    Raises:
        UserError: the first bad input, before its batch is answered; with `skip_bad` its line holds the error.
    """
    counts = Counts()
    reported = counts.started
    for work in ahead(map(predictor.prepare, checked(batches, skip_bad))):
        lines = [line(answer) for answer in predictor.answer(work)]
        write("".join(lines))
        bad = sum(isinstance(one, Bad) for one in work.inputs)
        counts.bad += bad
        counts.answered += len(work.inputs) - bad
        counts.cut += work.cut
        now = time.monotonic()
        if now - reported > REPORT_SECONDS:
            reported = now
            logger.info("%s answered, %.1f a second", f"{counts.answered:,}", counts.answered / (now - counts.started))
    return counts


def checked(batches: Iterable[list[Input]], skip_bad: bool) -> Iterator[list[Input]]:
    """The batches. Raises UserError at the first bad input, unless they are to be skipped."""
    for inputs in batches:
        bad = next((one for one in inputs if isinstance(one, Bad)), None)
        if bad is not None and not skip_bad:
            raise UserError(f"{bad.message}; mend it, or give --skip-bad to have the error in its place")
        yield inputs


def ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items, the next one made in a thread while one is worked on. What ends the thread is raised here."""
    ready: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(READY_BATCHES)

    def make() -> None:
        try:
            for item in items:
                ready.put((item, None))
            ready.put((None, StopIteration()))
        except BaseException as error:
            ready.put((None, error))

    threading.Thread(target=make, name="questions", daemon=True).start()
    while True:
        item, end = ready.get()
        if isinstance(end, StopIteration):
            return
        if end is not None:
            raise end
        yield item


def line(answer: dict[str, Any]) -> str:
    """An answer as a line of JSON that a terminal can be shown."""
    return json.dumps(answer, ensure_ascii=False).translate(_ESCAPED) + "\n"


def prediction_spec(config: ExperimentConfig, options: PredictionConfig, one_question: bool) -> EngineSpec:
    """The engine of a student.

    Args:
        one_question: whether only one is asked, for which vllm would take longer to start than it saves.

    Raises:
        UserError: an engine that does not run this student, or is not installed.
    """
    import torch

    gpu = torch.cuda.is_available()
    spec = engine_spec(config)
    has_vllm = importlib.util.find_spec("vllm") is not None
    engine = options.engine
    if engine == "auto":
        engine = "transformers" if spec.engine == "vllm" and (one_question or not has_vllm) else spec.engine  # type: ignore[assignment]
    elif engine == "vllm" and spec.engine != "vllm":
        raise UserError(
            f"--engine vllm runs no encoder-decoder student; for {config.student.model} it is {spec.engine}"
        )
    elif engine == "t5" and spec.engine != "t5":
        raise UserError(f"--engine t5 runs T5, mT5 and UMT5; for {config.student.model} it is {spec.engine}")
    if engine == "vllm" and not has_vllm:
        raise UserError("--engine vllm: vllm is not installed; run make setup, or give --engine transformers")
    return replace(
        spec,
        engine=engine,
        precision=options.precision or config.sampler.precision,
        max_sequences=options.max_sequences,
        kv_cache_gib=options.kv_cache_gib,
        gpu_memory_utilization=options.gpu_memory_utilization,
        gpu=gpu,
        threads=options.threads,
    )


def questions_given(texts: Sequence[str]) -> list[list[Input]]:
    """Questions of a command line."""
    if not all(text.strip() for text in texts):
        raise UserError("the question is empty")
    if not all(map(is_unicode, texts)):
        raise UserError("the question is no valid UTF-8")
    return [[Asked(number, text) for number, text in enumerate(texts, start=1)]]


def predict_job(arguments: Any, options: PredictionConfig, stdout: TextIO) -> None:
    """What jobs/predict.py does. Raises UserError before anything is loaded where that is possible.

    Args:
        arguments: of its command line.
    """
    from transformers.utils import logging as transformers_logging

    exported = read_exported(arguments.student, load_config(arguments.config) if arguments.config else None)
    config = exported.config(str(arguments.student), arguments.trust_remote_code)
    check_exported(arguments.student, config.student)
    if arguments.question:
        batches: Iterator[list[Input]] = iter(questions_given(arguments.question))
    else:
        if arguments.file is not None:
            check_file(arguments.file)
        elif sys.stdin is None:
            raise UserError("standard input is closed; give a question, --file FILE, or lines on standard input")
        elif sys.stdin.isatty():
            logger.info("reading questions from the terminal, one a line; Ctrl-D ends")
        batches = read_questions(arguments.file, arguments.format, options.batch, options.linger_s)
    rationales = not arguments.no_rationale
    if rationales and config.method == "finetune":
        logger.info("this student was trained on labels alone (method finetune): it writes no rationales")
    transformers_logging.disable_progress_bar()
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(text_file_atomic(arguments.output)) if arguments.output else stdout
        engine = start_engine(prediction_spec(config, options, bool(arguments.question)))
        stack.callback(engine.close)

        def write(text: str) -> None:
            try:
                file.write(text)
                file.flush()
            except BrokenPipeError:
                raise
            except OSError as error:
                raise UserError(
                    f"{arguments.output or 'standard output'}: cannot be written: {error.strerror}"
                ) from None

        counts = predict_lines(Predictor(engine, config, options, rationales), batches, write, arguments.skip_bad)
    seconds = time.monotonic() - counts.started
    parts = [f"{counts.answered:,} answered in {seconds:.1f} s ({counts.answered / max(seconds, 1e-9):.1f} a second)"]
    parts += [f"{counts.bad:,} bad inputs"] if counts.bad else []
    parts += [f"{counts.cut:,} questions cut to {config.student.max_input_tokens} tokens"] if counts.cut else []
    logger.info("%s", "; ".join(parts))
