"""Which engine runs a config's student, and with what limits."""

from __future__ import annotations

from typing import Any

from qcrd_ray.config import ExperimentConfig
from qcrd_ray.models.named import hub_config
from qcrd_ray.sampling.engine import T5_FAMILY, EngineSpec
from qcrd_ray.tasks.prompts import SEPARATOR_TOKENS


def is_seq2seq(config: ExperimentConfig) -> bool:
    """Whether the student is an encoder-decoder."""
    return bool(hub_config(config.student.model, config.student).is_encoder_decoder)


def engine_name(config: ExperimentConfig, shape: Any = None) -> str:
    """`sampler.engine`; `auto` is vllm for a decoder-only student, t5 for its family, else transformers.

    Args:
        shape: the student's transformers config, where it is known.
    """
    if config.sampler.engine != "auto":
        return config.sampler.engine
    shape = shape or hub_config(config.student.model, config.student)
    if not shape.is_encoder_decoder:
        return "vllm"
    return "t5" if shape.model_type in T5_FAMILY else "transformers"


def max_model_tokens(config: ExperimentConfig) -> int:
    """Prompt and continuation of the longest sequence that the sampler may be asked for."""
    limits = config.student
    label = max(limits.max_label_tokens, config.evaluation.max_new_tokens)
    longest = max(limits.max_rationale_tokens + label, config.negatives.max_tokens or 0)
    return limits.max_input_tokens + longest + SEPARATOR_TOKENS


def engine_spec(config: ExperimentConfig, model: str | None = None) -> EngineSpec:
    """The sampling engine of a config's student.

    Args:
        model: where it is loaded from, if that is not `student.model` itself.
    """
    return EngineSpec(
        engine=engine_name(config),
        model=model or config.student.model,
        precision=config.sampler.precision,
        max_sequences=config.sampler.max_sequences,
        max_model_tokens=max_model_tokens(config),
        kv_cache_gib=config.sampler.kv_cache_gib,
        gpu_memory_utilization=config.sampler.gpu_memory_utilization,
        gpu=config.sampler.gpus > 0,
        threads=config.sampler.threads,
        trust_remote_code=config.student.trust_remote_code,
        sleep=config.sampler.sleep,
    )
