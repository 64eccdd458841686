"""Which engine runs a config's student, and with what limits."""

from __future__ import annotations

from qcrd_ray.config import ExperimentConfig
from qcrd_ray.models.student import check_student
from qcrd_ray.sampling.engine import EngineSpec


def is_seq2seq(config: ExperimentConfig) -> bool:
    """Whether the student is an encoder-decoder."""
    model = config.student.model
    if model.startswith("scratch:"):
        return "t5" in model
    if model.startswith("embedded:"):
        return False
    return bool(check_student(model, config.student).is_encoder_decoder)


def engine_spec(config: ExperimentConfig, model: str) -> EngineSpec:
    """The sampling engine of a config's student."""
    engine = config.sampler.engine
    if engine == "auto":
        engine = "transformers" if is_seq2seq(config) else "vllm"
    limits = config.student
    longest = max(limits.max_rationale_tokens + limits.max_label_tokens, config.negatives.max_tokens or 0)
    return EngineSpec(
        engine=engine,
        model=model,
        precision=config.sampler.precision,
        max_sequences=config.sampler.max_sequences,
        max_model_tokens=limits.max_input_tokens + max(longest, config.evaluation.max_new_tokens) + 8,
        kv_cache_gib=config.sampler.kv_cache_gib,
        gpu_memory_utilization=config.sampler.gpu_memory_utilization,
        gpu=config.sampler.gpus > 0,
        threads=config.sampler.threads,
        trust_remote_code=limits.trust_remote_code,
    )
