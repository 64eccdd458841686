"""Which teacher a config asks for, its samples, and the tables that they make."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qcrd_ray.config import ExperimentConfig
from qcrd_ray.errors import UserError
from qcrd_ray.rationales import tables
from qcrd_ray.rationales.counts import Counts
from qcrd_ray.rationales.schema import Question
from qcrd_ray.ray_session import ray_session
from qcrd_ray.sampling.engine import EngineSpec, SamplingParameters
from qcrd_ray.sampling.sample_store import SampleSet
from qcrd_ray.sampling.scripted import ScriptedTeacher
from qcrd_ray.sampling.teacher_engine import TeacherEngine
from qcrd_ray.sampling.teacher_pool import Outcome, Plan, Totals, sample_missing, sampling_parameters
from qcrd_ray.sampling.teacher_prompt import PromptBuilder, question_key, set_fingerprint
from qcrd_ray.tasks import Task

logger = logging.getLogger(__name__)

LIVE = ("vllm", "transformers", "openai")
"""Engines whose samples are kept in a store."""
DATA_CPUS = 1.0
_EDGE_BYTES = 1 << 20


@dataclass(frozen=True)
class StoredSamples:
    """A live teacher's samples, as the tables take them."""

    name: str
    fingerprint: str
    parts: tuple[Path, ...]
    temperature: float
    simulated: bool = False

    def key(self, task: Task, question: Question) -> int:
        return question_key(question)


@dataclass(frozen=True)
class Prepared:
    """Tables, and what a live teacher did for them (None: recorded or scripted samples)."""

    counts: Counts
    outcome: Outcome | None = None
    sample_set: SampleSet | None = None


def check_teacher(config: ExperimentConfig) -> None:
    """Find what is wrong with the teacher before anything is started.

    Raises:
        UserError: an engine that does not go with the task, with the source or with the model, a file that is missing.
    """
    engine = config.teacher.engine
    if engine in LIVE:
        LiveTeacher(config)
    elif engine == "scripted":
        ScriptedTeacher(config)
    elif config.data.path and config.data.path.startswith("generated:") and config.uses_rationales:
        raise UserError(f"data.path={config.data.path} has no recorded samples; set teacher.engine=scripted")


def teacher_cpus(config: ExperimentConfig) -> float:
    """Logical CPUs that sampling and the tables take."""
    return DATA_CPUS + (config.teacher.max_actors or config.teacher.actors) * config.teacher.cpus


def prepare_tables(
    config: ExperimentConfig,
    output: Path,
    keep: bool = False,
    show: Callable[[Plan, Totals], None] = lambda plan, totals: None,
) -> Prepared:
    """Ask a live teacher for what is missing, then write the tables of `rationales.tables.prepare_tables`.

    Args:
        keep: take the tables that are there, if they fit the config, and ask for nothing (a run that goes on must not
            find other rationales than it began with, as it would where a failed question is answered now).
        show: called each second while a live teacher samples.

    Raises:
        UserError: what the user must mend; what was sampled is kept.
    """
    if config.teacher.engine not in LIVE or not config.uses_rationales:
        check_teacher(config)
        scripted = ScriptedTeacher(config) if config.teacher.engine == "scripted" else None
        return Prepared(tables.prepare_tables(config, output, scripted))
    live = LiveTeacher(config)
    store = Path(config.teacher.store).expanduser() if config.teacher.store else output / "samples"
    sample_set = live.sample_set(store)
    if keep and (counts := tables.existing_tables(config, output, live.stored(sample_set))) is not None:
        return Prepared(counts, None, sample_set)
    with _sampled(config, live, sample_set, show) as outcome:
        counts = tables.prepare_tables(config, output, live.stored(sample_set))
    return Prepared(counts, outcome, sample_set)


def sample_teacher(
    config: ExperimentConfig, store: Path, show: Callable[[Plan, Totals], None] = lambda plan, totals: None
) -> Outcome:
    """Ask a live teacher for what a store lacks of the config's samples; make no tables.

    Raises:
        UserError: what the user must mend, too many failures among it; what was sampled is kept.
    """
    live = LiveTeacher(config)
    with _sampled(config, live, live.sample_set(store), show) as outcome:
        failed = failures_message(config, outcome)
    if failed is not None:
        raise UserError(failed)
    return outcome


@contextmanager
def _sampled(
    config: ExperimentConfig, live: LiveTeacher, sample_set: SampleSet, show: Callable[[Plan, Totals], None]
) -> Iterator[Outcome]:
    """A set of samples with all that the teacher would give, and nobody else at it."""
    _say_what_is_new(sample_set, live.description)
    with (
        ray_session(teacher_cpus(config), config.run.verbose),
        sample_set.locked(patience_s=config.teacher.store_timeout_s) as lock,
    ):
        sample_set.create(live.description)
        outcome = sample_missing(config, sample_set, live.builder, live.start, show, lock)
        if not outcome.sampled + outcome.plan.reused:
            raise UserError(failures_message(config, outcome) or _nothing(config, outcome))
        yield outcome


def failures_message(config: ExperimentConfig, outcome: Outcome) -> str | None:
    """One line where more questions failed than `teacher.max_failed_share` allows, else None."""
    share = outcome.failed_questions / max(1, outcome.plan.questions)
    if share <= config.teacher.max_failed_share and not _gave_up(outcome):
        return None
    reasons = ", ".join(f"{reason} {count}" for reason, count in list(outcome.reasons.items())[:5])
    ended = f"; sampling was stopped: {outcome.stopped}" if outcome.stopped else ""
    return (
        f"{outcome.failed_questions} of {outcome.plan.questions} questions failed ({share:.1%}, "
        f"teacher.max_failed_share={config.teacher.max_failed_share:g}); samples by reason: {reasons}{ended}. "
        "What was sampled is kept; start again to ask for the rest"
    )


def _nothing(config: ExperimentConfig, outcome: Outcome) -> str:
    if outcome.stopped == "budget":
        return f"config key teacher.endpoint.budget: {config.teacher.endpoint.budget:g} does not pay for one question"
    return f"none of {outcome.plan.questions} questions was answered; failed samples by reason: {outcome.reasons}"


def _gave_up(outcome: Outcome) -> bool:
    return outcome.stopped is not None and outcome.stopped != "budget"


class LiveTeacher:
    """A live teacher: its prompt, what decides its samples, and how it starts."""

    def __init__(self, config: ExperimentConfig, choices: tuple[str, ...] = ()) -> None:
        """
        Args:
            choices: all that a local model may write where it continues plain text; a chat answers in its own words.
        """
        settings = config.teacher
        assert settings.model is not None  # checked by the config
        self.config = config
        self.model = settings.model
        chat_template = None
        identity: Any = settings.model
        if settings.engine != "openai":
            model = _check_model(config)
            chat_template = _chat_template(config, model)
            identity = _model_identity(settings.model, model)
        chat = settings.prompt == "chat" or (
            settings.prompt == "auto" and (chat_template is not None or settings.engine == "openai")
        )
        self.builder = PromptBuilder(config, chat)
        self.choices = choices if not chat and settings.engine != "openai" else ()
        self.description: dict[str, Any] = {
            "engine": settings.engine,
            "model": identity,
            "task": config.task,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "top_k": settings.top_k,
            "max_tokens": settings.max_tokens,
            "seed": settings.seed,
            "precision": settings.precision if settings.engine != "openai" else None,
            "chat_template": chat_template if chat else None,
            **self.builder.description(),
            **({"choices": list(self.choices)} if self.choices else {}),
        }
        self.fingerprint = set_fingerprint(self.description)

    def sample_set(self, store: Path) -> SampleSet:
        """Its samples in a store."""
        return SampleSet((store / self.fingerprint).absolute())

    def stored(self, sample_set: SampleSet) -> StoredSamples:
        parts = tuple(sample_set.parts())
        return StoredSamples(self.model, self.fingerprint, parts, self.config.teacher.temperature)

    def start(self, spent: float) -> Callable[[], TeacherEngine]:
        if self.config.teacher.engine == "openai":
            return functools.partial(_start_endpoint, self.config, self.builder.stop, spent)
        parameters = replace(sampling_parameters(self.config, self.builder.stop), choices=self.choices)
        return functools.partial(start_local, self.config, parameters)


def _start_endpoint(config: ExperimentConfig, stop: tuple[str, ...], spent: float) -> TeacherEngine:
    from qcrd_ray.sampling.openai import OpenAiTeacher

    return OpenAiTeacher(config.teacher, stop, spent)


def start_local(config: ExperimentConfig, parameters: SamplingParameters) -> TeacherEngine:
    from qcrd_ray.sampling.local_teacher import LocalTeacher

    settings = config.teacher
    assert settings.model is not None
    spec = EngineSpec(
        engine=settings.engine,
        model=_model_source(settings.model),
        precision=settings.precision,
        max_sequences=settings.max_sequences,
        max_model_tokens=settings.max_model_tokens,
        kv_cache_gib=settings.kv_cache_gib,
        gpu_memory_utilization=settings.gpu_memory_utilization,
        gpu=settings.gpus > 0 or settings.tensor_parallel > 1,
        threads=settings.threads,
        tensor_parallel=settings.tensor_parallel,
        trust_remote_code=settings.trust_remote_code,
    )
    return LocalTeacher(spec, parameters)


def _model_source(model: str) -> str:
    if model.startswith("embedded:"):
        from qcrd_ray.models.embedded import embedded_student

        return str(embedded_student(model.removeprefix("embedded:")))
    return model


def _check_model(config: ExperimentConfig) -> str:
    """The folder or name that the teacher loads from."""
    from transformers import AutoConfig

    settings = config.teacher
    assert settings.model is not None
    source = _model_source(settings.model)
    try:
        found = AutoConfig.from_pretrained(source, trust_remote_code=settings.trust_remote_code)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        known = "a Hugging Face name, a folder with config.json, embedded:smollm2-135m"
        raise UserError(
            f"config key teacher.model: no model at {settings.model!r}; expected {known} ({reason})"
        ) from None
    if settings.engine == "vllm":
        if found.is_encoder_decoder:
            raise UserError(
                f"config key teacher.engine: vllm runs no encoder-decoder model such as {settings.model}; "
                "set it to transformers"
            )
        if importlib.util.find_spec("vllm") is None:
            raise UserError("config key teacher.engine: vllm is not installed; run make setup, or set transformers")
    return source


def _chat_template(config: ExperimentConfig, source: str) -> str | None:
    """The model's chat template. Raises UserError where a chat is asked of a model without one."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=config.teacher.trust_remote_code)
    template = tokenizer.chat_template
    if template is None and config.teacher.prompt == "chat":
        raise UserError(f"config key teacher.prompt: {config.teacher.model} has no chat template; set it to few_shot")
    return json.dumps(template) if isinstance(template, dict) else template


def _model_identity(model: str, source: str) -> Any:
    """What a model is, wherever it lies: its name; for a folder of the user's, its content."""
    folder = Path(source)
    if model.startswith("embedded:") or not folder.is_dir():
        return model
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*")):
        if file.suffix in (".json", ".safetensors", ".bin", ".model", ".jinja") and file.is_file():
            size = file.stat().st_size
            digest.update(f"{file.name} {size} ".encode())
            with file.open("rb") as content:  # whole weights would take minutes; two fine-tunings differ everywhere
                digest.update(content.read(_EDGE_BYTES))
                content.seek(max(0, size - _EDGE_BYTES))
                digest.update(content.read(_EDGE_BYTES))
    return {"folder": folder.name, "content": digest.hexdigest()[:16]}


def _say_what_is_new(sample_set: SampleSet, description: dict[str, Any]) -> None:
    """Tell that a set of samples is begun beside others, and how it differs from the nearest of them."""
    if (sample_set.folder / "set.json").exists() or not sample_set.folder.parent.is_dir():
        return
    differences: list[tuple[int, str, str]] = []
    for file in sorted(sample_set.folder.parent.glob("*/set.json")):
        try:
            other = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        keys = [key for key in description if other.get(key) != description[key]]
        differences.append((len(keys), file.parent.name, ", ".join(keys)))
    if differences:
        _, name, differing = min(differences)
        logger.info(
            "no samples of this teacher yet: a new set %s is begun beside %d other(s); it differs from %s in: %s",
            sample_set.folder.name,
            len(differences),
            name,
            differing,
        )
