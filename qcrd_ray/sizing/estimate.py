"""From shapes and lengths to the peak of a training worker and of a sampler.

A worker's peak is the largest over its phases, not the sum of all parts. What DeepSpeed 0.19 allocates in each phase:
E bytes an element of the weights (2 for bf16, 4 for fp32), T trained elements, W workers.

| part | ZeRO 0 | 1 and 2 | 3 |
|---|---|---|---|
| weights | E T | E T, flat | E T / W, and E T of gathered ones: models under a billion elements keep them |
| fp32 masters | none (fp32 only) | 4 T / W | 4 T / W in bf16 |
| Adam's moments | 8 T | 8 T / W | 8 T / W |
| gradients of the weights | E T | E T | E T, and E T / W of the worker's own |
| reduction | E T and the transport's E T / W | the same, and E T / W; none for one worker of ZeRO 1 on a CPU | 2 E T |
| flat gradient | none | 4 T / W, and E T / W beside it; on a CPU kept from step to step | as 1 and 2 |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from qcrd_ray.config import ExperimentConfig
from qcrd_ray.sampling.student_engine import engine_name, max_model_tokens
from qcrd_ray.sizing.batches import Batches, batches_of, choice_passes, gradient_passes, judged_tokens
from qcrd_ray.sizing.shapes import Parameters, judge_outline, known_config, outline
from qcrd_ray.sizing.simulate import Blocks, PassMemory, pass_memory, without_data
from qcrd_ray.training.checkpoint import SHARD_BYTES

GIBIBYTE = 2**30
MEBIBYTE = 2**20
BUCKET_ELEMENTS = 500_000_000
"""DeepSpeed's default of reduce_bucket_size; on a GPU the buffer is allocated whole."""
LIVE_ELEMENTS = 1_000_000_000
"""DeepSpeed's defaults of stage3_max_live_parameters and stage3_max_reuse_distance."""
CPU_RUNTIME = {0: 54 * MEBIBYTE, 1: 115 * MEBIBYTE, 2: 115 * MEBIBYTE, 3: 136 * MEBIBYTE}
"""What training itself brings into a process on a CPU, by ZeRO stage: modules that DeepSpeed and Ray Data import when
they start, oneDNN's kernels, stacks and heaps of threads. Measured on scratch:t5-tiny, through Ray and
in plain processes, whose tensors were taken off; between the two."""
GPU_RUNTIME = 1 * GIBIBYTE
"""CUDA's context, NCCL's buffers and cuBLAS's workspace. An allowance, not measured."""
GPU_FRAGMENTATION = 0.05
"""Share of the tensors that the caching allocator holds beyond them. An allowance, not measured."""


@dataclass(frozen=True)
class Machine:
    """Where it runs: `memory` bytes of a GPU, None on a CPU."""

    memory: int | None = None

    @property
    def gpu(self) -> bool:
        return self.memory is not None


@dataclass(frozen=True)
class Estimate:
    """Bytes by part, each at its own largest, and the peak of all, which they need not add up to."""

    parts: dict[str, int]
    phases: dict[str, int]
    peak_bytes: int

    @property
    def phase(self) -> str:
        """The phase that the peak is in."""
        return max(self.phases, key=lambda name: self.phases[name])


@dataclass(frozen=True)
class Sizing:
    worker: Estimate
    sampler: Estimate
    parameters: int
    trained: int
    lengths: str
    machine: Machine

    @property
    def fits(self) -> bool | None:
        """Whether both fit; None where no memory is given."""
        memory = self.machine.memory
        return None if memory is None else max(self.worker.peak_bytes, self.sampler.peak_bytes) <= memory


def model_states(trained: int, workers: int, stage: int, element: int) -> dict[str, int]:
    """Bytes of weights, gradients and optimizer (fp32 masters and moments) of a worker between two passes.

    What DeepSpeed's `estimate_zero2_model_states_mem_needs` and its sibling for ZeRO-3 call params, gradients and
    optimizer states, without their buffer factor.
    """
    shard = -(-trained // workers)
    masters = 4 * shard if (stage and element == 2) or stage in (1, 2) else 0
    return {
        "weights": element * (shard if stage == 3 else trained),
        "gradients": element * (trained if stage in (0, 1) else shard),
        "optimizer": masters + 8 * (trained if stage == 0 else shard),
    }


def estimate(
    config: ExperimentConfig, machine: Machine | None = None, lengths: tuple[int, int, int] | None = None
) -> Sizing:
    """Size a worker (rank 0, the largest) and a sampler.

    Raises:
        UserError: the model's shape or the data are not to be had on this machine.
    """
    machine = machine or Machine()
    batches = batches_of(config, lengths)
    shape = known_config(config.student.model, config.student, batches.vocabulary)
    worker, parameters = _worker(config, machine, shape, batches)
    sampler = _sampler(config, machine, shape, parameters)
    return Sizing(worker, sampler, parameters.count, sum(parameters.trained), batches.source, machine)


def _worker(config: ExperimentConfig, machine: Machine, shape: Any, batches: Batches) -> tuple[Estimate, Parameters]:
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    element = 2 if dtype is torch.bfloat16 else 4
    stage = max(1, config.train.zero_stage) if element == 2 else config.train.zero_stage
    workers = config.train.workers
    with without_data():
        student = outline(config, shape, dtype)
        parameters = Parameters.of(student)
        backward, choice = _passes(student, config, batches)
        judge = _judge(config, batches)
    trained, frozen = sum(parameters.trained), sum(parameters.frozen)
    shard = -(-trained // workers)
    every = Blocks.of(*(element * n for n in (*parameters.trained, *parameters.frozen)))
    states = model_states(trained, workers, stage, element)

    # Blocks that are there from the start on, and those that come with the first step.
    frozen_bytes = element * (-(-frozen // workers) if stage == 3 else frozen)
    held = Blocks.of(states["weights"], frozen_bytes) if stage else every
    masters = states["optimizer"] - 8 * (shard if stage else trained)
    moments = [4 * shard] * 2 if stage else [4 * n for n in parameters.trained for _ in range(2)]
    optimizer = Blocks.of(masters) + Blocks.of(*moments)
    gathered = every if stage == 3 and parameters.count <= LIVE_ELEMENTS else Blocks()
    if stage == 3 and not gathered.total:
        gathered = Blocks.of(*[element * n for n in sorted((*parameters.trained, *parameters.frozen))[-2:]])
    own = Blocks.of(element * shard) if stage == 3 else Blocks()
    gradient = kept = element * trained
    bucket = element * (max(BUCKET_ELEMENTS, max(parameters.trained)) if machine.gpu else trained)
    if stage == 0:
        reduction = Blocks.of(gradient, gradient / workers) if workers > 1 else Blocks()
    elif stage == 3:
        # Gradients leave the weights as soon as they fill the bucket.
        kept = element * min(trained, BUCKET_ELEMENTS)
        backward = backward.less(gradient - kept)
        reduction = Blocks.of(bucket, kept)
    elif stage == 1 and workers == 1 and not machine.gpu:
        reduction = Blocks()
    else:
        reduction = Blocks.of(bucket, gradient / workers, gradient / workers)
    update = Blocks.of(4 * shard, element * shard) if stage else Blocks()
    flat = Blocks()
    if stage in (1, 2) and not machine.gpu:
        flat, update = Blocks.of(4 * shard), Blocks.of(element * shard)
    snapshot = every
    consolidated = every if stage == 3 else Blocks()
    if machine.gpu:  # weights go to the host's memory one by one, and so does a snapshot
        snapshot, consolidated = Blocks(), Blocks.of(element * max(parameters.trained)) if stage == 3 else Blocks()
    full = Blocks.of(SHARD_BYTES if 12 * trained > SHARD_BYTES else 12 * trained, *[4 * max(parameters.trained)] * 2)
    judge_states, judge_pass = judge

    # A snapshot's copy is written beside the choice pass and gone by the time of the step's last backward pass; that
    # of ZeRO-3, which is gathered parameter by parameter, still holds its place in the heap then.
    kept_snapshot = snapshot if stage == 3 else Blocks()
    start = held + Blocks.of(masters) + own
    steady = held + optimizer + own + flat + gathered + judge_states
    phases = {
        "loading": every + held + Blocks.of(masters) if stage else every,
        "starting": start + Blocks.of(4 * shard) + (every if stage == 3 else Blocks()),
        "choosing": _with(steady + snapshot, choice),
        "backward": _with(steady + kept_snapshot, backward),
        "reducing": steady + Blocks(0, _large_gradients(parameters, element)) + reduction,
        "updating": steady + update,
        "judging": _with(steady, judge_pass),
        "publishing": steady + snapshot + consolidated,
        "checkpoint": steady + consolidated + full,
    }
    if machine.gpu:
        live = {name: blocks.total for name, blocks in phases.items()}
        live["backward"] = steady.total + backward.peak + (reduction.total if stage else 0)
        overhead = GPU_RUNTIME + int(GPU_FRAGMENTATION * max(live.values()))
        heap = 0
    else:
        # What is freed of small blocks stays in the heap: its largest extent is under every later phase.
        heap = max(blocks.small for blocks in phases.values())
        live = {name: blocks.large + heap for name, blocks in phases.items()}
        overhead = CPU_RUNTIME[config.train.zero_stage if element == 4 else stage]
    phases_bytes = {name: size + overhead for name, size in live.items()}
    gradients = own.total + kept
    parts = {
        "weights": held.total + gathered.total,
        "gradients": gradients + reduction.total + flat.total,
        "optimizer": optimizer.total,
        "activations": max(choice.peak, backward.peak - kept),
        "judge": judge_states.total + judge_pass.peak,
        "snapshot": snapshot.total + consolidated.total,
        "runtime": overhead,
    }
    return Estimate(parts, phases_bytes, max(phases_bytes.values())), parameters


def _with(blocks: Blocks, peaks: PassMemory) -> Blocks:
    return blocks + Blocks(peaks.small, max(peaks.large, peaks.peak - peaks.small))


def _large_gradients(parameters: Parameters, element: int) -> int:
    return Blocks.of(*(element * n for n in parameters.trained)).large


def _passes(student: Any, config: ExperimentConfig, batches: Batches) -> tuple[PassMemory, PassMemory]:
    """Memory of the largest pass with gradients, and of the largest without."""

    def largest(kind: Any) -> list[Any]:
        passes = [one for share in batches.shares for one in kind(student, config, share)]
        return max(passes, key=lambda one: (student.padded_tokens(one), _targets(one)), default=[])

    backward, choice = largest(gradient_passes), largest(choice_passes)

    def forward() -> torch.Tensor:
        if not config.couples_tasks:
            return student(backward)  # type: ignore[no-any-return]
        ce, peaks = student(backward, peaks_of=range(sum(len(item.targets) for item in backward)))
        return ce.sum() + peaks.sum()  # type: ignore[no-any-return]

    found = pass_memory(forward, _targets(backward), backward=True)
    student.zero_grad(set_to_none=True)
    student.eval()
    none = PassMemory(0, 0, 0)
    return found, pass_memory(lambda: student(choice), _targets(choice), backward=False) if choice else none


def _targets(items: list[Any]) -> int:
    return sum(len(target) for item in items for target in item.targets)


def _judge(config: ExperimentConfig, batches: Batches) -> tuple[Blocks, PassMemory]:
    """What the discriminator holds (weights, moments, fp32), and its training pass with its gradients."""
    if not (config.judge.enabled and config.is_contrastive):
        return Blocks(), PassMemory(0, 0, 0)
    encoder = judge_outline(config.judge)
    pairs, tokens = judged_tokens(config, batches)
    ids = torch.zeros(pairs, tokens, dtype=torch.long)

    def forward() -> torch.Tensor:
        states: torch.Tensor = encoder(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        return states.amax(1)

    sizes = [4 * p.numel() for p in encoder.parameters()]
    return Blocks.of(*sizes, *sizes, *sizes), pass_memory(forward, pairs * tokens, backward=True)


def _sampler(config: ExperimentConfig, machine: Machine, shape: Any, parameters: Parameters) -> Estimate:
    """Weights, what a swap of weights takes beside them, the cache of keys and values, and the last layer's scores."""
    engine = engine_name(config, shape)
    element = 2 if config.sampler.precision == "bf16" else 4
    weights = element * parameters.count
    length = max_model_tokens(config)
    if engine == "vllm":  # which asks for no more than the model has positions
        length = min(length, int(getattr(shape, "max_position_embeddings", length)))
    cache = config.sampler.max_sequences * length * _cache_of_token(shape, element)
    vocabulary = int(shape.vocab_size)
    scores = config.sampler.max_sequences * vocabulary * (element + 4 + 8)
    if engine == "vllm":
        if machine.memory is not None:
            share = int(config.sampler.gpu_memory_utilization * machine.memory)
            least = weights + length * _cache_of_token(shape, element) + scores + GPU_RUNTIME
            # vLLM fills its share with cache; it does not start where not even one sequence has room.
            cache = max(0, share - weights - scores - GPU_RUNTIME)
            peak = share if least <= share else least + machine.memory - share
            parts = {"weights": weights, "cache": cache, "scores": scores, "runtime": GPU_RUNTIME}
            return Estimate(parts, {"generating": peak}, peak)
        cache = int(config.sampler.kv_cache_gib * GIBIBYTE)
    runtime = GPU_RUNTIME if machine.gpu else CPU_RUNTIME[0]
    parts = {"weights": weights, "cache": cache, "scores": scores, "snapshot": weights, "runtime": runtime}
    phases = {"generating": weights + cache + scores + runtime, "swapping": 2 * weights + runtime}
    if engine == "vllm":
        phases["swapping"] += cache  # it is there from the start
    return Estimate(parts, phases, max(phases.values()))


def _cache_of_token(shape: Any, element: int) -> int:
    """Bytes of one token's keys and values in all layers."""
    if shape.is_encoder_decoder:
        layers = getattr(shape, "num_decoder_layers", None) or shape.num_hidden_layers
        return int(2 * layers * shape.num_heads * shape.d_kv * element)
    heads = getattr(shape, "num_key_value_heads", None) or shape.num_attention_heads
    width = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    return int(2 * shape.num_hidden_layers * heads * width * element)
