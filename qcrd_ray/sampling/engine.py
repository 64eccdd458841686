"""What every engine speaks: requests of token ids in, generations of token ids out.

Imports no engine's library, no torch and no ray.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

T5_FAMILY = ("t5", "mt5", "umt5")
"""The encoder-decoders that engine t5 runs, by transformers' `model_type`."""


@dataclass(frozen=True)
class SamplingParameters:
    """How to sample. All of it is passed to the engine explicitly; no engine's own default is left in force.

    Attributes:
        temperature: 0 is greedy.
        top_k: sample among the likeliest `top_k` tokens; 0 is the whole vocabulary.
        top_p: 1 is no nucleus.
        max_tokens: generated tokens at most, the end token among them.
        stop: texts that end a generation; not part of its text.
        ignore_end: go on to `max_tokens` past the end token; for measuring.
        logprobs: whether `Generation.mean_logprob` is wanted; where it is not, it is NaN.
        choices: the text is one of these, sampled among the tokens that they go on with; empty: any text. Engine t5 has
            none.
    """

    temperature: float
    top_k: int = 0
    top_p: float = 1.0
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    ignore_end: bool = False
    logprobs: bool = True
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Request:
    """One prompt to continue.

    Attributes:
        prompt: token ids: the encoder's input for an encoder-decoder model, the text so far for a decoder-only one.
        parameters: how to sample.
        seed: decides the samples; the same prompt, seed and weights give the same text in any batch.
        n: generations of this prompt; each has a seed of its own, derived from `seed`.
    """

    prompt: tuple[int, ...]
    parameters: SamplingParameters
    seed: int = 0
    n: int = 1


@dataclass(frozen=True)
class Generation:
    """One continuation.

    Attributes:
        text: decoded, without special tokens.
        token_ids: without the end token.
        mean_logprob: mean log-probability of its tokens in nats, raw (temperature 1, whole vocabulary) under the
            weights that made it. The end token is among them if `finish_reason` is "stop": it is minus the
            cross-entropy that training computes for the same tokens. NaN for a generation without any token, and where
            it was not asked for.
        finish_reason: "stop" or "length".
    """

    text: str
    token_ids: tuple[int, ...]
    mean_logprob: float
    finish_reason: str


class SamplingEngine(Protocol):
    """An engine that holds one model's weights and continues prompts."""

    def generate(self, requests: Sequence[Request]) -> list[list[Generation]]:
        """`n` generations for each request, in the order of the requests."""
        ...

    def target_logprobs(self, prompts: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]) -> list[list[float]]:
        """Raw log-probabilities (temperature 1, whole vocabulary) of given tokens after each prompt, nats.

        They come from the computation that the engine samples with, so they prove which weights it samples from.

        Args:
            prompts: as in `Request.prompt`.
            targets: what follows each prompt: the decoder's tokens, or a decoder-only text's continuation. The end
                token is scored where it is given.

        Returns:
            One number for each token of each target.
        """
        ...

    def load_weights(self, snapshot: Path) -> None:
        """Take the weights of a Hugging Face folder of the same architecture."""
        ...

    def rest(self) -> None:
        """Give a GPU's memory back until the next call, where `EngineSpec.sleep` asks for it and the engine can."""
        ...

    def close(self) -> None:
        """Free the model and end every process that the engine started."""
        ...


@dataclass(frozen=True)
class EngineSpec:
    """All that it takes to start an engine in another process.

    Attributes:
        engine: "vllm", "t5" or "transformers".
        model: a Hugging Face folder or name.
        precision: "bf16" or "fp32".
        max_sequences: sequences that are generated at once.
        max_model_tokens: prompt and continuation of a sequence at most.
        kv_cache_gib: vLLM's cache on a CPU, GiB.
        gpu_memory_utilization: share of a GPU that vLLM takes.
        gpu: whether the engine may use a GPU.
        threads: CPU threads; None is the library's own choice.
        tensor_parallel: GPUs that vLLM spreads a model over.
        trust_remote_code: run Python code that ships with the model.
        sleep: whether `rest` gives a GPU's memory back.
    """

    engine: str
    model: str
    precision: str = "bf16"
    max_sequences: int = 64
    max_model_tokens: int = 2048
    kv_cache_gib: float = 1.0
    gpu_memory_utilization: float = 0.85
    gpu: bool = False
    threads: int | None = None
    tensor_parallel: int = 1
    trust_remote_code: bool = False
    sleep: bool = False


def start_engine(spec: EngineSpec) -> SamplingEngine:
    """Start the engine that `spec` names. Raises ValueError for an unknown one."""
    if spec.engine == "vllm":
        from qcrd_ray.sampling.vllm import VllmEngine

        return VllmEngine(spec)
    if spec.engine == "t5":
        from qcrd_ray.sampling.t5 import T5Engine

        return T5Engine(spec)
    if spec.engine == "transformers":
        from qcrd_ray.sampling.transformers import TransformersEngine

        return TransformersEngine(spec)
    raise ValueError(f"unknown engine {spec.engine!r}: expected vllm, t5 or transformers")
