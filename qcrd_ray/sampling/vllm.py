"""The fast engine for decoder-only models: vLLM, on GPUs and on CPUs."""

from __future__ import annotations

import contextlib
import gc
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qcrd_ray.sampling.engine import EngineSpec, Generation, Request, SamplingParameters

CPU_STEP_TOKENS = 4096
CPU_BLOCK_TOKENS = 32
"""Samples of one prompt share its whole blocks, and each prefills the rest: vLLM's own 128 on a CPU leaves much."""


class WeightSwap:
    """Mixed into vLLM's worker: takes the weights of a folder, what was derived from the old ones included."""

    def swap_weights(self, folder: str) -> None:
        model_runner: Any = self.model_runner  # type: ignore[attr-defined]
        model_runner.reload_weights(weights_path=folder)
        # On a CPU the output layer multiplies with a packed copy of its weights. Where it is tied to the embeddings,
        # reloading leaves that copy at the old ones, without a word.
        from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
        from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

        for module in model_runner.get_model().modules():
            if isinstance(module, VocabParallelEmbedding) and hasattr(module, "cpu_linear"):
                dispatch_cpu_unquantized_gemm(module, remove_weight=False)


class VllmEngine:
    """vLLM inside this process: no engine core of its own that could outlive it."""

    def __init__(self, spec: EngineSpec) -> None:
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        if not spec.gpu:
            os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(max(1, math.ceil(spec.kv_cache_gib)))
            # Threads that are bound to cores would fight a trainer on the same ones.
            os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
            import torch

            torch.set_num_threads(spec.threads or os.cpu_count() or 1)
        from vllm import LLM

        length = _model_length(spec)
        settings: dict[str, Any] = {"gpu_memory_utilization": spec.gpu_memory_utilization}
        if not spec.gpu:
            # Where a prefill is cut, vLLM sets the generator of a seeded request back, which a CPU's cannot do: the
            # whole engine fails.
            settings = {
                "enable_chunked_prefill": False,
                "max_num_batched_tokens": max(length, CPU_STEP_TOKENS),
                "block_size": CPU_BLOCK_TOKENS,
            }
        self.llm = LLM(
            model=spec.model,
            dtype="bfloat16" if spec.precision == "bf16" else "float32",
            max_model_len=length,
            max_num_seqs=spec.max_sequences,
            tensor_parallel_size=spec.tensor_parallel,
            enable_sleep_mode=spec.sleep,
            enable_prefix_caching=True,
            enforce_eager=not spec.gpu,
            trust_remote_code=spec.trust_remote_code,
            generation_config="vllm",
            logprobs_mode="raw_logprobs",
            disable_log_stats=True,
            worker_extension_cls="qcrd_ray.sampling.vllm.WeightSwap",
            seed=0,
            **settings,
        )
        self.end = int(self.llm.get_tokenizer().eos_token_id)
        self.sleeps = spec.sleep
        self.asleep = False

    def generate(self, requests: Sequence[Request]) -> list[list[Generation]]:
        if not requests:
            return []
        self._wake()
        outputs = self.llm.generate(
            [{"prompt_token_ids": list(request.prompt)} for request in requests],
            [_parameters(request) for request in requests],
            use_tqdm=False,
        )
        return [[self._generation(one) for one in output.outputs] for output in outputs]

    @property
    def context(self) -> int:
        """Tokens of a prompt and its continuation at most."""
        return int(self.llm.model_config.max_model_len)

    def add(self, name: str, request: Request) -> None:
        """Take in a request beside those at work; `step` gives its generations once all of them have ended."""
        from vllm.sampling_params import RequestOutputKind

        parameters = _parameters(request)
        parameters.output_kind = RequestOutputKind.FINAL_ONLY
        (prompt,) = self.llm.llm_engine.renderer.render_cmpl([{"prompt_token_ids": list(request.prompt)}])
        self.llm.llm_engine.add_request(name, prompt, parameters)

    def step(self) -> list[tuple[str, list[Generation]]]:
        """Generate one token of every sequence at work. Returns the requests that have ended, by name."""
        outputs = self.llm.llm_engine.step()
        return [(o.request_id, [self._generation(one) for one in o.outputs]) for o in outputs if o.finished]

    def _generation(self, output: Any) -> Generation:
        ids = list(output.token_ids)
        values: list[float] = []
        if output.logprobs:
            values = [position[token].logprob for token, position in zip(ids, output.logprobs, strict=True)]
        if ids and ids[-1] == self.end and output.finish_reason == "stop":
            ids = ids[:-1]
        mean = sum(values) / len(values) if values else math.nan
        return Generation(output.text, tuple(ids), mean, output.finish_reason)

    def target_logprobs(self, prompts: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]) -> list[list[float]]:
        from vllm import SamplingParams

        if not prompts:
            return []
        self._wake()
        texts = [[*prompt, *target] for prompt, target in zip(prompts, targets, strict=True)]
        outputs = self.llm.generate(
            [{"prompt_token_ids": text} for text in texts],
            SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0),
            use_tqdm=False,
        )
        found = []
        for prompt, text, output in zip(prompts, texts, outputs, strict=True):
            places = range(len(prompt), len(text))
            found.append([float(output.prompt_logprobs[place][text[place]].logprob) for place in places])
        return found

    def load_weights(self, snapshot: Path) -> None:
        if not (snapshot / "config.json").is_file():
            raise RuntimeError(f"snapshot {snapshot}: no config.json")
        self._wake()
        self.llm.collective_rpc("swap_weights", args=(str(snapshot),))
        # Cached prefixes were computed with the old weights.
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not reset its prefix cache; requests are still running")

    def rest(self) -> None:
        if self.sleeps and not self.asleep:
            self.llm.sleep(level=1)  # the weights wait in the CPU's memory, the cache of keys and values is dropped
            self.asleep = True

    def _wake(self) -> None:
        if self.asleep:
            self.llm.wake_up()
            self.asleep = False

    def close(self) -> None:
        with contextlib.suppress(Exception):
            self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        gc.collect()


def _model_length(spec: EngineSpec) -> int:
    """What the spec asks for, as far as the model goes."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(spec.model, trust_remote_code=spec.trust_remote_code)
    return min(spec.max_model_tokens, int(getattr(config, "max_position_embeddings", spec.max_model_tokens)))


def _parameters(request: Request) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    asked: SamplingParameters = request.parameters
    return SamplingParams(
        n=request.n,
        temperature=asked.temperature,
        top_k=asked.top_k,
        top_p=asked.top_p,
        min_p=0.0,
        repetition_penalty=1.0,
        presence_penalty=0.0,
        frequency_penalty=0.0,
        seed=request.seed,
        max_tokens=asked.max_tokens,
        stop=list(asked.stop) or None,
        ignore_eos=asked.ignore_end,
        logprobs=0 if asked.logprobs else None,
        skip_special_tokens=True,
        structured_outputs=StructuredOutputsParams(choice=list(asked.choices)) if asked.choices else None,
    )
