"""The typed experiment config: every key, its meaning, its range and its default, in one place.

YAML file, then dotted overrides (`optim.lr=1e-4`), checked by the pydantic models below. Nothing here imports torch,
transformers, ray or vllm, so that `--help` answers at once.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import pydantic
import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from qcrd_ray.errors import UserError
from qcrd_ray.hardware import cpu_gains_by_bf16
from qcrd_ray.seeding import stable_hash

TaskName = Literal["svamp", "cqa", "anli1", "esnli", "chain_sum", "custom"]
MethodName = Literal["finetune", "single_task", "dss", "mi", "qcrd", "mi+qcrd"]
SchemeName = Literal["min_max", "max_min", "sampling", "mean", "weighted_mean"]
NegativeSource = Literal[
    "lagged", "fixed", "self_consistency", "lagged+self_consistency", "fixed+self_consistency", "none"
]
TeacherEngine = Literal["recorded", "scripted", "vllm", "transformers", "openai"]
Augmentation = Literal["auto", "spacy", "stanza", "rules", "none"]
SamplerEngine = Literal["auto", "vllm", "t5", "transformers"]

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]


FOLDER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,127}")


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


Precision = Literal["auto", "bf16", "fp32"]
_AUTO = "auto: bf16 on a GPU and where the CPU of the machine that starts the job gains by it, else fp32."


def _precision_of_machine(raw: Any, gpus: str) -> Any:
    """A section's mapping with `precision=auto` replaced. What is learned depends on it, so a config holds the answer.

    Args:
        gpus: key of the section's GPUs.
    """
    if not isinstance(raw, Mapping) or raw.get("precision", "auto") != "auto":
        return raw
    on_gpu = raw.get(gpus) not in (None, 0, 0.0)
    return {**raw, "precision": "bf16" if on_gpu or cpu_gains_by_bf16() else "fp32"}


class DataConfig(Section):
    path: str | None = Field(
        None,
        description="Folder with train, valid and perhaps test as .jsonl, .parquet or .csv; a Distilling-step-by-step "
        "folder; hub:NAME for a Hugging Face dataset; generated:chain_sum for questions made by reasoning-gym.",
    )
    limit: Positive | None = Field(None, description="Use the first N usable questions of the training split.")
    share: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        1.0,
        description="Train on this share of the usable questions; a hash of the ids chooses, so that a smaller share "
        "is part of a larger one.",
    )
    unanswered: Literal["auto", "drop", "keep"] = Field(
        "auto",
        description="Training questions without an answer of the recorded teacher, which only finetune can learn from: "
        "auto drops them where there are samples at all, as every other method does.",
    )
    eval_limit: Positive | None = Field(None, description="Use the first N questions of the held-out splits.")
    teachers: list[str] | None = Field(None, description="Names of the teachers to take samples from. Default: all.")
    max_positives: Positive | None = Field(None, description="Keep at most N positive rationales a question.")
    columns: dict[str, str] = Field(
        default_factory=dict, description="Our column to yours, for example {question: prompt, answer: gold}."
    )
    generated: dict[str, Positive] = Field(
        default_factory=lambda: {"train": 960, "valid": 60, "test": 200},
        description="Questions a split, for data.path=generated:….",
    )
    max_rationale_chars: Positive = Field(
        20_000, description="A teacher's sample longer than this is left out and counted."
    )
    near_duplicates: Annotated[float, Field(gt=0.0, le=1.0)] | None = Field(
        None,
        description="Drop a positive whose similarity to an earlier one of its question reaches this (1: equal but for "
        "case, white space and punctuation). Default: keep all. The vote counts them all the same.",
    )


class TaskConfig(Section):
    """What `task=custom` needs; ignored by the others."""

    template: str = Field("{question}", description="Python format string of the prompt; {question}, {choices}.")
    answer_pattern: str = Field(
        r"[Tt]he answer is:?\s*(?P<answer>.+?)\s*\.?\s*(?:\n|$)",
        description="Regular expression that finds the group `answer` in a teacher's output; the last match counts.",
    )
    compare: Literal["text", "number", "choice"] = Field("text", description="How two answers are compared.")


class EndpointConfig(Section):
    """The OpenAI-compatible server of `teacher.engine=openai`."""

    base_url: str | None = Field(
        None, description="URL of the server, for example http://host:8000/v1. Default: OPENAI_BASE_URL, else OpenAI's."
    )
    api_key_env: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] = Field(
        "OPENAI_API_KEY", description="Environment variable that holds the key; the key itself is never written."
    )
    max_in_flight: Positive = Field(32, description="Requests in flight at most.")
    requests_per_minute: Annotated[float, Field(gt=0.0)] | None = Field(
        None, description="Requests a minute at most, retries among them, evenly spaced. Default: no limit."
    )
    tokens_per_minute: Positive | None = Field(
        None, description="Prompt and generated tokens in any minute at most. Default: no limit."
    )
    timeout_s: Annotated[float, Field(gt=0.0)] = Field(120.0, description="Seconds after which a request has failed.")
    max_attempts: Positive = Field(6, description="Attempts of a request, with backoff between them, before it failed.")
    max_backoff_s: Annotated[float, Field(gt=0.0)] = Field(
        60.0, description="Longest wait between two attempts; a Retry-After of the server may be longer."
    )
    use_n: Literal["auto", "always", "never"] = Field(
        "auto", description="Ask K samples in one request (n=K); auto: where the server has it, else K requests."
    )
    send_seed: bool = Field(
        False,
        description="Send each request a seed. Servers differ in what they make of it, and vLLM's on a CPU fails where "
        "a prompt with a seed is prefilled in parts.",
    )
    price_input: Annotated[float, Field(ge=0.0)] = Field(0.0, description="Price of a million prompt tokens.")
    price_output: Annotated[float, Field(ge=0.0)] = Field(0.0, description="Price of a million generated tokens.")
    budget: Annotated[float, Field(gt=0.0)] | None = Field(
        None,
        description="Cost at which sampling stops, that of the samples already there among it (of the judge: of this "
        "start). Needs a price. Default: none.",
    )

    @model_validator(mode="after")
    def _has_a_price(self) -> EndpointConfig:
        if self.budget is not None and not self.price_input and not self.price_output:
            raise ValueError("budget needs what tokens cost: set price_input and price_output, per million tokens")
        return self


class TeacherConfig(Section):
    engine: TeacherEngine = Field("recorded", description="Where the teacher's samples come from.")
    model: str | None = Field(
        None,
        description="Teacher of the engines vllm and transformers (Hugging Face name, folder, embedded:smollm2-135m) "
        "and openai (the server's name of it).",
    )
    samples: Positive = Field(5, description="K, the paper's m: samples a question that are voted.")
    temperature: Annotated[float, Field(ge=0.0, le=10.0)] = Field(0.7, description="Sampling temperature.")
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = Field(1.0, description="Nucleus of a live teacher; 1: none.")
    top_k: NonNegative = Field(0, description="Likeliest tokens that vllm and transformers sample among; 0: all.")
    max_tokens: Positive = Field(256, description="Generated tokens of a sample at most.")
    seed: NonNegative = Field(0, description="Seed of the teacher's samples and of the order of recorded ones.")
    prompt: Literal["auto", "chat", "few_shot"] = Field(
        "auto",
        description="chat: the model's chat template (openai: chat completions); few_shot: plain text that a base "
        "model continues (openai: completions); auto: chat where the model has a template.",
    )
    prompt_file: str | None = Field(
        None,
        description="Jinja2 file of the prompt: {{ question }}, {{ choices }}, {{ shots }}, {{ instruction }}. In a "
        "chat it is the user's message.",
    )
    shots_file: str | None = Field(
        None, description="JSON lines {question, rationale, answer, choices?} in place of the task's worked examples."
    )
    stop: list[str] | None = Field(None, description="Texts that end a sample. Default: the task's, none in a chat.")
    store: str | None = Field(
        None,
        description="Folder that samples are kept in and reused from, by any run. Default: samples/ beside the tables.",
    )
    store_timeout_s: Annotated[float, Field(ge=0.0)] = Field(
        0.0, description="Seconds to wait for another run that works on the same samples before this one gives up."
    )
    max_failed_share: Fraction = Field(
        0.05, description="Share of failed questions past which the job's exit code is 1."
    )
    actors: Positive = Field(1, description="Engine actors of vllm and transformers at least.")
    max_actors: Positive | None = Field(
        None, description="Engine actors at most, as far as the cluster grows. Default: teacher.actors."
    )
    cpus: Annotated[float, Field(ge=0.0)] = Field(1.0, description="Logical CPUs of an engine actor.")
    gpus: Annotated[float, Field(ge=0.0)] = Field(
        0.0, description="GPUs of an engine actor: a fraction shares one, tensor_parallel takes at least as many."
    )
    tensor_parallel: Positive = Field(1, description="GPUs that a vLLM engine is spread over.")
    max_sequences: Positive = Field(256, description="Sequences that an engine generates at once.")
    max_model_tokens: Positive = Field(4096, description="Prompt and sample at most, as far as the model goes.")
    kv_cache_gib: Annotated[float, Field(gt=0.0)] = Field(2.0, description="vLLM's cache on a CPU, GiB.")
    gpu_memory_utilization: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        0.9, description="Share of a GPU's memory that vLLM takes."
    )
    threads: Positive | None = Field(None, description="CPU threads of an engine. Default: all cores.")
    precision: Precision = Field("auto", description=f"Precision of a local teacher. {_AUTO}")
    trust_remote_code: bool = Field(False, description="Run Python code that ships with the teacher's model.")
    endpoint: EndpointConfig = Field(default_factory=EndpointConfig)

    @model_validator(mode="before")
    @classmethod
    def _auto_precision(cls, raw: Any) -> Any:
        return _precision_of_machine(raw, "gpus")


class LoraConfig(Section):
    """Low-rank adapters in place of all of the student's weights."""

    rank: NonNegative = Field(0, description="Rank of the adapters that are trained; 0: train all weights.")
    alpha: Annotated[float, Field(gt=0.0)] = Field(32.0, description="Adapters are scaled by alpha / rank.")
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        0.0, description="Dropout of what goes into the adapters, in training."
    )
    targets: list[str] | None = Field(
        None,
        min_length=1,
        description="Names of the linear layers that get adapters, for example [q_proj, v_proj]. Default: all but the "
        "output head.",
    )


class StudentConfig(Section):
    model: str = Field(
        "embedded:smollm2-135m",
        description="Hugging Face name, folder, embedded:smollm2-135m, scratch:t5-tiny or scratch:llama-tiny.",
    )
    trust_remote_code: bool = Field(False, description="Run Python code that ships with the model.")
    max_input_tokens: Positive = Field(1024, description="A question's prompt is cut to this many tokens.")
    max_rationale_tokens: Positive = Field(256, description="A rationale target is cut to this many tokens.")
    max_label_tokens: Positive = Field(64, description="A label target is cut to this many tokens.")
    dropout: Fraction | None = Field(None, description="Dropout of the student. Default: as the model has it.")
    gradient_checkpointing: bool = Field(False, description="Recompute activations in the backward pass.")
    lora: LoraConfig = Field(default_factory=LoraConfig)


class OptimConfig(Section):
    lr: Annotated[float, Field(gt=0.0, le=1.0)] = Field(5e-5, description="Peak learning rate of the student.")
    weight_decay: Annotated[float, Field(ge=0.0)] = Field(0.0, description="AdamW's weight decay.")
    warmup_steps: NonNegative = Field(0, description="Steps of linear warm-up before the linear decay to 0.")
    clip: Annotated[float, Field(ge=0.0)] = Field(1.0, description="Gradient norm to clip at; 0: no clipping.")


class LossConfig(Section):
    beta: Annotated[float, Field(ge=0.0)] = Field(0.2, description="β, weight of the negative part, equation (3).")
    margin: Annotated[float, Field(ge=0.0)] = Field(3.0, description="δ in nats: a negative beyond it is at rest.")
    alpha_label: Annotated[float, Field(ge=0.0)] = Field(0.5, description="α₁ of equation (8).")
    alpha_contrastive: Annotated[float, Field(ge=0.0)] = Field(0.5, description="α₂ of equation (8).")
    alpha_judge: Annotated[float, Field(ge=0.0)] = Field(0.5, description="α₃ of equation (8).")
    alpha_mutual_information: Annotated[float, Field(ge=0.0)] = Field(
        0.1, description="Factor on the mutual information of the tasks, in the methods mi and mi+qcrd."
    )
    judge_decay: Fraction = Field(0.9, description="Factor on α₃ each iteration (section 4.1).")


class TrainConfig(Section):
    max_steps: Positive = Field(10_000, description="Optimizer steps.")
    iteration_steps: Positive = Field(100, description="Optimizer steps an iteration t; a snapshot each.")
    batch_size: Positive = Field(8, description="Questions a step, over all workers.")
    workers: Positive = Field(1, description="Training workers.")
    zero_stage: Annotated[int, Field(ge=0, le=3)] = Field(0, description="DeepSpeed ZeRO stage.")
    precision: Precision = Field("auto", description=f"Precision of the student's training. {_AUTO}")
    seed: NonNegative = Field(0, description="Seed of order, initialisation, dropout and negatives.")
    tokens_per_pass: Positive = Field(
        8192, description="Padded tokens of one forward pass; a batch is cut into passes, a step never changes."
    )
    choice_interval: NonNegative = Field(
        0,
        description="Iterations for which a question keeps its chosen positive (min_max, max_min); 0: it is chosen "
        "anew at every step, as the paper does.",
    )
    eval_interval: NonNegative = Field(
        0, description="Steps between evaluations, each at the next start of an iteration; 0: before and after only."
    )
    checkpoint_interval: Positive = Field(500, description="Steps between checkpoints.")
    checkpoints_kept: Positive = Field(2, description="Newest checkpoints that are kept.")
    keep_snapshots: bool = Field(False, description="Keep every snapshot, to audit where negatives come from.")
    log_interval: Positive = Field(10, description="Steps between two lines of progress.")
    deepspeed: str | None = Field(None, description="DeepSpeed JSON to start from (jobs/deepspeed/).")
    max_failures: NonNegative = Field(3, description="Worker failures after which the run ends.")
    threads: Positive | None = Field(None, description="CPU threads of a worker. Default: cores / workers.")
    cpus_per_worker: Annotated[float, Field(gt=0.0)] = Field(1.0, description="Logical CPUs of a worker.")
    gpus_per_worker: Annotated[float, Field(ge=0.0)] = Field(
        0.0, description="GPUs of a worker; a fraction shares one."
    )
    node_labels: dict[str, str] = Field(
        default_factory=dict, description="Labels of the nodes that workers run on, for example {pool: train}."
    )
    collective_timeout_s: Positive = Field(
        300, description="Seconds after which a collective operation, or a worker that does not answer, has failed."
    )

    @model_validator(mode="before")
    @classmethod
    def _auto_precision(cls, raw: Any) -> Any:
        return _precision_of_machine(raw, "gpus_per_worker")


class NegativesConfig(Section):
    source: NegativeSource = Field("lagged", description="Where the negatives of a step come from.")
    checkpoint: str | None = Field(None, description="Student folder that negatives.source=fixed samples from.")
    lag: NonNegative = Field(5, description="j: iteration t takes its negatives from the snapshot of t - j.")
    count: NonNegative = Field(1, description="k: negatives a question.")
    temperature: Annotated[float, Field(ge=0.0, le=10.0)] = Field(1.5, description="Temperature; 0 is greedy.")
    top_k: NonNegative = Field(50, description="Sample among the likeliest N tokens; 0: the whole vocabulary.")
    max_tokens: Positive | None = Field(None, description="Tokens of a negative. Default: max_rationale_tokens.")


class JudgeConfig(Section):
    enabled: bool = Field(True, description="Weigh rationales with the discriminator.")
    encoder: str = Field(
        "embedded:minilm-l6",
        description="Encoder to start from: Hugging Face name, folder, embedded:minilm-l6, scratch:bert-tiny.",
    )
    update_interval: Positive = Field(1, description="Iterations between online updates of the discriminator.")
    pretrain_steps: NonNegative = Field(500, description="Steps of pretraining on the teacher's rationales.")
    pretrain_batch_size: Positive = Field(8, description="Questions a pretraining step.")
    lr: Annotated[float, Field(gt=0.0, le=1.0)] = Field(5e-5, description="Learning rate of the discriminator.")
    store: str | None = Field(
        None,
        description="Storage path, as run.storage_path, in whose judges/ pretrained discriminators are kept, and taken "
        "from by any run that would pretrain the same one. Default: none.",
    )
    max_tokens: Positive = Field(512, description="Question and rationale are cut to this many tokens.")
    hidden_size: Positive = Field(256, description="Width between the two linear layers.")
    augmentation: Augmentation = Field(
        "auto",
        description="Corrupted positives that balance the teacher's minority in pretraining: word classes by spaCy or "
        "stanza where installed (auto), by one of them, or by rules; none: no corrupted ones.",
    )


class SamplerConfig(Section):
    engine: SamplerEngine = Field(
        "auto",
        description="Engine of the lagged student: vllm for decoder-only ones, t5 for T5, mT5 and UMT5, else "
        "transformers.",
    )
    actors: Positive = Field(1, description="Sampler actors.")
    cpus: Annotated[float, Field(ge=0.0)] = Field(0.5, description="Logical CPUs of a sampler.")
    gpus: Annotated[float, Field(ge=0.0)] = Field(0.0, description="GPUs of a sampler; a fraction shares one.")
    node_labels: dict[str, str] = Field(
        default_factory=dict, description="Labels of the nodes that samplers run on, for example {pool: sample}."
    )
    max_sequences: Positive = Field(64, description="Sequences that an engine generates at once.")
    chunk_questions: Positive = Field(64, description="Questions that are sampled and written together.")
    kv_cache_gib: Annotated[float, Field(gt=0.0)] = Field(1.0, description="vLLM's cache on a CPU, GiB.")
    gpu_memory_utilization: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        0.85, description="Share of a GPU's memory that vLLM takes."
    )
    threads: Positive | None = Field(None, description="CPU threads of a sampler. Default: the library's own.")
    precision: Precision = Field("auto", description=f"Precision of sampling. {_AUTO}")
    ahead_iterations: NonNegative = Field(
        16,
        description="Bound on iterations of negatives that lie ready; 0: sampled when they are asked for, while "
        "training waits, as the paper does it.",
    )
    timeout_s: Positive = Field(600, description="Seconds to wait for an engine or a chunk before an error.")
    verify_weights: bool = Field(
        True,
        description="Compare the log-probability of probe texts under each snapshot, as the engine that holds it "
        "computes it, with the trainer's; the run ends where they differ.",
    )
    verify_tolerance: Annotated[float, Field(gt=0.0)] | None = Field(
        None,
        description="Difference allowed, nats a token. Default: 0.001 in fp32, 0.05 where bf16 is involved, 1 where a "
        "sampler in bf16 rounds what is trained in fp32 or as adapters.",
    )
    sleep: bool = Field(
        False,
        description="Between two pieces of work a vLLM engine on a GPU gives its memory back (vLLM's sleep mode), for "
        "samplers that share the trainers' GPUs.",
    )

    @model_validator(mode="before")
    @classmethod
    def _auto_precision(cls, raw: Any) -> Any:
        return _precision_of_machine(raw, "gpus")


class EvaluationConfig(Section):
    split: Literal["train", "valid", "test"] = Field(
        "valid", description="Split that jobs/evaluate.py, quality.py and judge.py read."
    )
    max_new_tokens: Positive = Field(64, description="Greedy tokens of a predicted label.")
    examples: NonNegative = Field(3, description="Held-out questions whose rationales are shown before and after.")
    observed: Annotated[int, Field(ge=0, le=200)] = Field(
        50,
        description="Held-out questions that the trained student explains at several temperatures for the report, and "
        "as many training questions whose rationales the discriminator scores beside theirs; 0: none.",
    )
    temperatures: list[Annotated[float, Field(ge=0.0, le=10.0)]] = Field(
        default_factory=lambda: [0.0, 0.7, 1.5, 2.0],
        min_length=1,
        max_length=8,
        description="Those temperatures; negatives.temperature is always among them.",
    )


class PredictionConfig(Section):
    """Options of jobs/predict.py; none of them is a key of an experiment."""

    engine: SamplerEngine = Field(
        "auto",
        description="what generates: vllm for decoder-only students (transformers for one question, and where vllm is "
        "not installed), t5 for T5, mT5 and UMT5, else transformers",
    )
    batch: Positive = Field(1024, description="questions that are answered together and written together")
    temperature: Annotated[float, Field(ge=0.0, le=10.0)] = Field(0.0, description="0 is greedy")
    seed: NonNegative = Field(0, description="seed of what is sampled at a temperature")
    precision: Literal["bf16", "fp32"] | None = Field(None, description="precision; default: the student's own")
    max_sequences: Positive = Field(128, description="sequences that the engine generates at once")
    kv_cache_gib: Annotated[float, Field(gt=0.0)] = Field(2.0, description="vllm's cache on a CPU, GiB")
    gpu_memory_utilization: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        0.9, description="share of a GPU's memory that vllm takes"
    )
    threads: Positive | None = Field(None, description="CPU threads; default: all cores")
    linger_s: Annotated[float, Field(ge=0.0)] = Field(
        0.2, description="seconds that the first line of a pipe's batch waits for more"
    )


class QualityConfig(Section):
    """What jobs/quality.py measures."""

    of: Literal["teacher", "student", "both", "file"] = Field(
        "teacher", description="Whose rationales: the teacher's recorded samples, student.model's, or quality.file's."
    )
    file: str | None = Field(
        None,
        description="Rationales for quality.of=file: JSON lines or Parquet (a file, or a folder as the "
        "teacher_samples/ of jobs/sample_teacher.py) with id, rationale and perhaps answer or label.",
    )
    questions: Positive | None = Field(None, description="Questions that are measured; a hash chooses. Default: all.")
    samples: Positive = Field(1, description="Rationales that a student writes for each question.")
    temperature: Annotated[float, Field(ge=0.0, le=10.0)] = Field(
        0.0, description="Temperature of the student's rationales; 0 is greedy, then one sample is all there is."
    )
    tokenizer: str | None = Field(
        None,
        description="Name or folder whose tokenizer counts the tokens of rationales that nobody counted. Default: the "
        "student's, where its rationales are measured.",
    )
    ngram: Positive = Field(4, description="Tokens in a row that count as copied where the question has them too.")
    resamples: Positive = Field(1000, description="Bootstrap resamples of an interval.")
    seed: NonNegative = Field(0, description="Seed of the choice of questions, of sampling and of the bootstrap.")


class ComparisonConfig(Section):
    """What jobs/judge.py compares: two students' rationales, judged by the LLM of `teacher.*`."""

    student_a: str | None = Field(None, description="Folder of student A (embedded:smollm2-135m: the untrained one).")
    student_b: str | None = Field(None, description="Folder of student B.")
    temperatures: list[Annotated[float, Field(ge=0.0, le=10.0)]] = Field(
        default_factory=lambda: [0.0, 0.7],
        min_length=1,
        description="Temperatures that the students are sampled at, a comparison each; 0 is greedy.",
    )
    questions: Positive = Field(50, description="Questions of evaluation.split that are judged; a hash chooses.")
    top_k: NonNegative = Field(50, description="Likeliest tokens that the students sample among; 0: all.")
    max_tokens: Positive = Field(32, description="Tokens of a verdict at most.")
    seed: NonNegative = Field(0, description="Seed of the choice of questions and of the students' samples.")


class RunConfig(Section):
    name: str | None = Field(None, description="Name of the run's folder. Default: task, method and student.")
    storage_path: str = Field(
        "runs",
        description="Where runs are kept: a folder (on a cluster one that all nodes see), or a URI that pyarrow opens, "
        "as s3://bucket/runs or gs://bucket/runs; credentials come from the environment.",
    )
    storage_timeout_s: Annotated[float, Field(ge=0.0)] = Field(
        120.0, description="Seconds for which a storage that fails is tried again before the run ends."
    )
    resume: Literal["auto", "never", "must"] = Field(
        "auto", description="Go on with a run of this name: if there is one, never (refuse), or must."
    )
    verbose: bool = Field(False, description="Show the logs of every Ray worker.")
    placement_timeout_s: Positive = Field(300, description="Seconds to wait for the cluster's resources.")


class WandbConfig(Section):
    project: str | None = Field(None, description="Log to this Weights & Biases project; WANDB_API_KEY holds the key.")
    entity: str | None = Field(None, description="Team or user that owns the project. Default: your own.")
    group: str | None = Field(None, description="Group of the run in the project.")
    mode: Literal["online", "offline"] = Field(
        "online", description="offline: kept in the run's folder, for `wandb sync`."
    )


class MlflowConfig(Section):
    experiment: str | None = Field(
        None, description="Log to this MLflow experiment; MLFLOW_TRACKING_TOKEN, or _USERNAME and _PASSWORD, let in."
    )
    uri: str | None = Field(
        None, description="Tracking server, or sqlite:///FILE. Default: MLFLOW_TRACKING_URI, else MLflow's own."
    )


class TrackingConfig(Section):
    tensorboard: bool = Field(False, description="Write TensorBoard's event files to the run's tensorboard/.")
    wandb: WandbConfig = Field(default_factory=WandbConfig)
    mlflow: MlflowConfig = Field(default_factory=MlflowConfig)


class ExperimentConfig(Section):
    """One experiment. A job reads one YAML file of this shape and dotted overrides."""

    task: TaskName = Field("svamp", description="Benchmark: prompt, answer parsing and answer equality.")
    method: MethodName = Field("qcrd", description="Which losses train the student.")
    output: str | None = Field(None, description="Folder that jobs/sample_teacher.py writes its tables to.")
    positives: Literal["vote", "gold", "first"] = Field(
        "vote", description="Positives by self-consistency, by gold, or the teacher's first sample, unvoted."
    )
    labels: Literal["gold", "teacher_vote", "teacher_sample"] = Field(
        "gold", description="What the label task learns; single_task always learns the first sample's."
    )
    scheme: SchemeName = Field("min_max", description="Many-to-one scheme, section 5.1.")
    data: DataConfig = Field(default_factory=DataConfig)
    custom: TaskConfig = Field(default_factory=TaskConfig)
    teacher: TeacherConfig = Field(default_factory=TeacherConfig)
    student: StudentConfig = Field(default_factory=StudentConfig)
    optim: OptimConfig = Field(default_factory=OptimConfig)
    loss: LossConfig = Field(default_factory=LossConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    negatives: NegativesConfig = Field(default_factory=NegativesConfig)
    judge: JudgeConfig = Field(default_factory=JudgeConfig)
    sampler: SamplerConfig = Field(default_factory=SamplerConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    quality: QualityConfig = Field(default_factory=QualityConfig)
    comparison: ComparisonConfig = Field(default_factory=ComparisonConfig)
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)
    run: RunConfig = Field(default_factory=RunConfig)

    @field_validator("tracking")
    @classmethod
    def _tracking_holds_no_key(cls, tracking: TrackingConfig) -> TrackingConfig:
        if tracking.mlflow.uri and _holds_credentials(tracking.mlflow.uri):
            raise ValueError(
                "mlflow.uri holds a key; MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or "
                "MLFLOW_TRACKING_TOKEN, are taken from the environment"
            )
        return tracking

    @field_validator("run")
    @classmethod
    def _run_name_is_a_folder_name(cls, run: RunConfig) -> RunConfig:
        if run.name is not None and not FOLDER_NAME.fullmatch(run.name):
            raise ValueError(
                f"name {run.name!r} is no folder name; letters, digits, '.', '_', '+' and '-' are, "
                "128 at most, the first a letter or digit"
            )
        if _holds_credentials(run.storage_path):
            raise ValueError("storage_path holds a key; keys are taken from the environment only")
        return run

    @field_validator("judge")
    @classmethod
    def _judge_store_holds_no_key(cls, judge: JudgeConfig) -> JudgeConfig:
        if judge.store is not None and _holds_credentials(judge.store):
            raise ValueError("store holds a key; keys are taken from the environment only")
        return judge

    @model_validator(mode="after")
    def _parts_agree(self) -> ExperimentConfig:
        if self.scheme == "weighted_mean" and not self.judge.enabled and self.is_contrastive:
            raise ValueError("scheme=weighted_mean weighs by the judge's scores; set judge.enabled=true")
        if self.run.storage_timeout_s >= self.train.collective_timeout_s:
            raise ValueError(
                f"run.storage_timeout_s={self.run.storage_timeout_s:g} is no less than train.collective_timeout_s="
                f"{self.train.collective_timeout_s}: other workers would give up on one that waits for the storage"
            )
        if self.sampler.sleep and (not self.sampler.gpus or self.sampler.engine not in ("auto", "vllm")):
            raise ValueError(
                "sampler.sleep=true gives a GPU's memory back between pieces of work; it needs sampler.gpus "
                "and the engine vllm"
            )
        if self.teacher.max_actors is not None and self.teacher.max_actors < self.teacher.actors:
            raise ValueError("teacher.max_actors is less than teacher.actors")
        if self.teacher.engine == "openai" and (self.teacher.max_actors or self.teacher.actors) > 1:
            raise ValueError("teacher.engine=openai asks from one actor; raise teacher.endpoint.max_in_flight instead")
        if self.teacher.engine in ("vllm", "transformers", "openai") and not self.teacher.model:
            raise ValueError(f"teacher.engine={self.teacher.engine} needs teacher.model")
        if self.quality.of == "file" and not self.quality.file:
            raise ValueError("quality.of=file needs quality.file")
        if self.quality.samples > 1 and self.quality.temperature == 0.0:
            raise ValueError("quality.samples above 1 would be all the same at quality.temperature=0; raise that")
        if self.negatives.source.startswith("fixed") and not self.negatives.checkpoint:
            raise ValueError(f"negatives.source={self.negatives.source} needs negatives.checkpoint, a student folder")
        return self

    @property
    def uses_rationales(self) -> bool:
        return self.method != "finetune"

    @property
    def needs_samples(self) -> bool:
        """Whether nothing can be learned from a question that the teacher did not answer."""
        return self.uses_rationales or self.labels != "gold"

    @property
    def is_contrastive(self) -> bool:
        return self.method in ("qcrd", "mi+qcrd")

    @property
    def couples_tasks(self) -> bool:
        """Whether the loss takes the mutual information of label and rationale."""
        return self.method in ("mi", "mi+qcrd")

    @property
    def keeps_choices(self) -> bool:
        """Whether a question keeps its chosen positive over steps."""
        return bool(self.train.choice_interval) and self.is_contrastive and self.scheme in ("min_max", "max_min")

    @property
    def sampled_negatives(self) -> int:
        """Negatives a question that an engine samples (the teacher's minority is not sampled)."""
        if not self.is_contrastive or self.negatives.source in ("self_consistency", "none"):
            return 0
        return self.negatives.count

    @property
    def run_name(self) -> str:
        if self.run.name:
            return self.run.name
        student = re.sub(r"[^A-Za-z0-9.]+", "-", self.student.model.rstrip("/").split("/")[-1])
        return f"{self.task}-{self.method}-{student}"[:100] + f"-{stable_hash(self.identity()) % 16**6:06x}"

    def identity(self) -> dict[str, Any]:
        """Dotted keys and values that decide what is learned; where and how fast it runs is no part of it."""
        # What is switched off decides nothing.
        off = {
            "student.lora.": not self.student.lora.rank,
            "data.share": self.data.share == 1.0,
            "data.unanswered": self.needs_samples or self.teacher.engine != "recorded",
            "loss.alpha_mutual_information": not self.couples_tasks,
            "train.choice_interval": not self.keeps_choices,
        }
        left_out = (*_INFRASTRUCTURE, *(key for key, is_off in off.items() if is_off))
        return {key: value for key, value in self.flat().items() if not key.startswith(left_out)}

    def flat(self) -> dict[str, Any]:
        """Dotted keys and values of all of it. A mapping that is a value, as labels are, is flattened too."""
        return flatten(self.model_dump(mode="json"))


def differing_keys(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The keys in which two identities differ, with both values, for a message; empty where they are equal."""
    differing = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
    shown = ", ".join(f"{key} ({before.get(key)} there, {now.get(key)} here)" for key in differing[:5])
    return f"{shown} and {len(differing) - 5} more" if len(differing) > 5 else shown


def _holds_credentials(uri: str) -> bool:
    """Whether a URI names a user (`https://user:password@host`) or a key among its options."""
    options = r"(?i)[?&](access_key|secret_key|session_token|password|token)="
    return bool(re.match(r"[A-Za-z0-9+.-]+://[^/?#]*@", uri) or re.search(options, uri))


_INFRASTRUCTURE = (
    "output",
    "tracking.",
    "teacher.store",
    "judge.store",
    "teacher.max_failed_share",
    "teacher.actors",
    "teacher.max_actors",
    "teacher.cpus",
    "teacher.gpus",
    "teacher.tensor_parallel",
    "teacher.max_sequences",
    "teacher.kv_cache_gib",
    "teacher.gpu_memory_utilization",
    "teacher.threads",
    "teacher.endpoint.",
    "evaluation.split",
    "evaluation.observed",
    "evaluation.temperatures",
    "run.",
    "sampler.engine",
    "sampler.actors",
    "sampler.cpus",
    "sampler.gpus",
    "sampler.node_labels",
    "sampler.max_sequences",
    "sampler.kv_cache_gib",
    "sampler.gpu_memory_utilization",
    "sampler.threads",
    "sampler.precision",
    "sampler.ahead_iterations",
    "sampler.timeout_s",
    "sampler.verify",
    "sampler.sleep",
    "train.workers",
    "train.zero_stage",
    "train.threads",
    "train.deepspeed",
    "train.checkpoint",
    "train.keep_snapshots",
    "train.log_interval",
    "train.max_failures",
    "train.cpus_per_worker",
    "train.gpus_per_worker",
    "train.node_labels",
    "train.collective_timeout_s",
)


def is_infrastructure(key: str) -> bool:
    """Whether a dotted key decides where and how fast a run goes, and nothing of what is learned."""
    return key.startswith(_INFRASTRUCTURE)


def flatten(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys and values of a nested mapping."""
    return dict(_flatten(dict(raw), ""))


def _flatten(node: Any, prefix: str) -> Any:
    if isinstance(node, dict):
        for name, value in node.items():
            yield from _flatten(value, f"{prefix}.{name}" if prefix else name)
    else:
        yield prefix, node


def load_config(file: str | Path | None, overrides: list[str] | None = None) -> ExperimentConfig:
    """Read a YAML file and dotted overrides into a checked config.

    Raises:
        UserError: a file that is missing or no YAML mapping, an override without '=', an unknown key, a wrong value.
    """
    raw = _read_yaml(Path(file)) if file is not None else {}
    for override in overrides or []:
        _apply_override(raw, override)
    return config_from_dict(raw)


def config_from_dict(raw: dict[str, Any]) -> ExperimentConfig:
    """Check a nested mapping. Raises UserError with one line for the first thing that is wrong."""
    try:
        return ExperimentConfig.model_validate(raw)
    except pydantic.ValidationError as error:
        raise UserError(_one_line(error)) from None


def config_to_yaml(config: ExperimentConfig) -> str:
    """The resolved config, every default written out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def option_lines() -> list[tuple[str, str, str, str]]:
    """(key, type, default, description) of every key, in the order of the config."""
    return section_lines(ExperimentConfig())


def section_lines(section: BaseModel) -> list[tuple[str, str, str, str]]:
    """The same for any section, with its own values as defaults."""
    return list(_walk(section, ""))


def _walk(section: BaseModel, prefix: str) -> Any:
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, Section):
            yield from _walk(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", _type_name(field.annotation), _show(value), field.description or ""


def _type_name(annotation: Any) -> str:
    if getattr(annotation, "__origin__", None) is Literal:
        return "|".join(str(value) for value in get_args(annotation))
    arguments = [a for a in get_args(annotation) if a is not type(None)]
    if (
        arguments
        and not isinstance(annotation, type)
        and "list" not in str(annotation)
        and "dict" not in str(annotation)
    ):
        return _type_name(arguments[0])
    return getattr(annotation, "__name__", str(annotation))


def _show(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, with 1e-4 read as a number (YAML 1.1 wants 1.0e-4) and no key given twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)$"),
    list("-+0123456789."),
)


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        siblings = [str(p) for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        near = difflib.get_close_matches(str(path), siblings, 1, 0.5)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"config file {path}: not found{hint}")
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"config file {path}: no valid YAML: {error}") from None
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise UserError(f"config file {path}: expected a mapping of keys, found {type(raw).__name__}")
    return raw


def parse_value(argument: str, text: str) -> Any:
    """The value of an argument key=text, read as YAML. Raises UserError."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        raise UserError(f"argument {argument!r}: the value is no valid YAML; quote it") from None


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"argument {override!r}: expected key=value, for example optim.lr=1e-4")
    value = parse_value(override, text)
    *sections, leaf = key.split(".")
    node = raw
    for depth, section in enumerate(sections):
        child = node.setdefault(section, {})
        if child is None:
            child = node[section] = {}
        if not isinstance(child, dict):
            raise UserError(f"argument {override!r}: {'.'.join(sections[: depth + 1])} is a value, no section")
        node = child
    if isinstance(value, dict) and isinstance(node.get(leaf), dict):
        node[leaf] = {**node[leaf], **value}
    else:
        node[leaf] = value


def _one_line(error: pydantic.ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in first["loc"])
    count = error.error_count()
    more = f" (and {count - 1} more)" if count > 1 else ""
    if first["type"] == "extra_forbidden":
        known = [name for name, *_ in option_lines()] + list(ExperimentConfig.model_fields)
        near = difflib.get_close_matches(key, known, 1, 0.4)
        if not near:
            near = [name for name in known if name.split(".")[-1] == key.split(".")[-1]][:1]
        hint = f"did you mean {near[0]}?" if near else "see --help for the keys"
        return f"config key {key}: unknown; {hint}{more}"
    message = first["msg"].removeprefix("Value error, ")
    if not key:
        return f"config: {message}{more}"
    if "holds a key" in message:  # which is not shown
        return f"config key {key}: {message}{more}"
    return f"config key {key}: {message}, got {_clip(first.get('input'))}{more}"


def _clip(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
