"""Generated tokens a second of a teacher with K samples a question: ours against bare vLLM, ray.data.llm, transformers.

    QCRD_BENCHMARK_DATA=DATA python benchmarks/teacher_sampling.py [--quick] [--json FILE]

40 questions of SVAMP (generated sums where QCRD_BENCHMARK_DATA is not set), the few-shot prompt of the task,
SmolLM2-135M in bfloat16, K = 5, temperature 0.7, exactly 64 tokens a sample, all cores. Each case runs in a process of
its own, one after another, in an order that turns with the rounds. Starting an engine, with all that it compiles at
its first step, is reported apart.

* `ours`: what `jobs/sample_teacher.py` runs: Ray Data, the actor pool, every sample written to the store.
* `ours_double`: the same with twice the questions.
* `vllm`: `vllm.LLM.generate`, called bare with `n` = K, with vLLM's own settings for a CPU (blocks of 128 tokens).
* `vllm_tuned`: the same with the engine settings of ours (blocks of 32 tokens): what the pool and the store cost.
* `ray_data_llm`: `ray.data.llm` with the engine settings of ours and every row repeated K times, as it keeps one output
  a request.
* `transformers`: `generate` in batches of 40 sequences, as one would write it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from figures import figure, median_ratio, write_figures

ROOT = Path(__file__).resolve().parents[1]
MODEL = "embedded:smollm2-135m"
QUESTIONS, SAMPLES, TOKENS, TEMPERATURE = 40, 5, 64, 0.7
QUICK_QUESTIONS, QUICK_TOKENS = 20, 32
SEQUENCES = 256
CONTEXT = 2048
CASES = ("ours", "vllm", "vllm_tuned", "ray_data_llm", "transformers", "ours_double")
QUICK_CASES = ("ours", "vllm", "ray_data_llm", "transformers")
PEERS = CASES[1:5]


# The cases, each in a process of its own


def run_ours(questions: int, tokens: int, number: int) -> dict[str, Any]:
    import functools
    from dataclasses import replace

    from qcrd_ray.ray_session import ray_session
    from qcrd_ray.sampling import teacher
    from qcrd_ray.sampling.sample_store import SampleSet
    from qcrd_ray.sampling.teacher_pool import sample_missing, sampling_parameters

    config = _config(questions, tokens, number)
    live = teacher.LiveTeacher(config)
    parameters = replace(sampling_parameters(config, live.builder.stop), ignore_end=True)
    start = functools.partial(teacher.start_local, config, parameters)
    with tempfile.TemporaryDirectory() as folder:
        sample_set = SampleSet(Path(folder) / live.fingerprint)
        with ray_session(teacher.teacher_cpus(config)), sample_set.locked() as lock:
            sample_set.create(live.description)
            outcome = sample_missing(config, sample_set, live.builder, lambda spent: start, lambda *_: None, lock)
    assert outcome.sampled == questions * SAMPLES, outcome
    return {
        "tokens": outcome.usage.completion_tokens,
        "seconds": outcome.seconds,
        "start_seconds": outcome.engine_start_seconds,
    }


def run_vllm(questions: int, tokens: int, number: int, tuned: bool = False) -> dict[str, Any]:
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "2"}
    import torch
    from vllm import LLM, SamplingParams

    begin = time.monotonic()
    torch.set_num_threads(os.cpu_count() or 1)
    settings = _engine_settings()
    if not tuned:
        settings = {
            key: settings[key] for key in ("model", "dtype", "max_model_len", "enforce_eager", "generation_config")
        }
    llm = LLM(**settings, disable_log_stats=True)
    llm.generate(["warm up"], SamplingParams(max_tokens=4), use_tqdm=False)
    started = time.monotonic()
    parameters = SamplingParams(n=SAMPLES, temperature=TEMPERATURE, max_tokens=tokens, ignore_eos=True)
    outputs = llm.generate(_prompts(questions, number), parameters, use_tqdm=False)
    seconds = time.monotonic() - started
    generated = sum(len(one.token_ids) for output in outputs for one in output.outputs)
    return {"tokens": generated, "seconds": seconds, "start_seconds": started - begin}


def run_ray_data_llm(questions: int, tokens: int, number: int) -> dict[str, Any]:
    import ray
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    # The first batch warms the engine up, the second one is measured: from its first request to its last answer.
    prompts = [prompt for prompt in _prompts(questions, number) for _ in range(SAMPLES)]
    sampling = {"temperature": TEMPERATURE, "ignore_eos": True, "detokenize": True}
    rows = [{"prompt": "warm up", "sampling_params": {**sampling, "max_tokens": 4}, "warm": True}] * len(prompts)
    rows += [{"prompt": p, "sampling_params": {**sampling, "max_tokens": tokens}, "warm": False} for p in prompts]
    settings = _engine_settings()
    environment = {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    environment |= {"OMP_NUM_THREADS": str(os.cpu_count() or 1), "OMP_WAIT_POLICY": "PASSIVE"}
    ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False, object_store_memory=1 << 30)
    begin = time.monotonic()
    processor = build_processor(
        vLLMEngineProcessorConfig(
            model_source=settings.pop("model"),
            engine_kwargs=settings,
            runtime_env={"env_vars": environment},
            batch_size=len(prompts),
            max_concurrent_batches=1,
            concurrency=1,
            log_engine_metrics=False,
            placement_group_config={"bundles": [{"CPU": 1}]},
            chat_template_stage=False,
            tokenize_stage=False,
            detokenize_stage=False,
        ),
        preprocess=lambda row: {"prompt": row["prompt"], "sampling_params": row["sampling_params"]},
        postprocess=lambda row: {
            "tokens": row["num_generated_tokens"],
            "warm": row["warm"],
            "seconds": row["time_taken_llm"],
        },
    )
    results = processor(ray.data.from_items(rows, override_num_blocks=2)).take_all()
    measured = [row for row in results if not row["warm"]]
    seconds = max(row["seconds"] for row in measured)
    total = time.monotonic() - begin
    return {"tokens": sum(row["tokens"] for row in measured), "seconds": seconds, "start_seconds": total - seconds}


def run_transformers(questions: int, tokens: int, number: int) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    begin = time.monotonic()
    torch.set_num_threads(os.cpu_count() or 1)
    model = AutoModelForCausalLM.from_pretrained(_model_folder(), dtype=torch.bfloat16).eval()
    tokenizer = AutoTokenizer.from_pretrained(_model_folder(), padding_side="left")
    generate = {"do_sample": True, "temperature": TEMPERATURE, "top_k": 0, "pad_token_id": tokenizer.pad_token_id}
    with torch.inference_mode():
        model.generate(**tokenizer("warm up", return_tensors="pt"), max_new_tokens=4, **generate)
        started = time.monotonic()
        prompts = [prompt for prompt in _prompts(questions, number) for _ in range(SAMPLES)]
        generated = 0
        for first in range(0, len(prompts), 40):
            batch = tokenizer(prompts[first : first + 40], return_tensors="pt", padding=True)
            output = model.generate(**batch, min_new_tokens=tokens, max_new_tokens=tokens, **generate)
            generated += len(output) * (output.shape[1] - batch["input_ids"].shape[1])
            tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return {"tokens": generated, "seconds": time.monotonic() - started, "start_seconds": started - begin}


def run_vllm_tuned(questions: int, tokens: int, number: int) -> dict[str, Any]:
    return run_vllm(questions, tokens, number, tuned=True)


RUNS = {
    "vllm": run_vllm,
    "vllm_tuned": run_vllm_tuned,
    "ray_data_llm": run_ray_data_llm,
    "transformers": run_transformers,
}


def run_case(case: str, questions: int, tokens: int, number: int) -> dict[str, Any]:
    if case.startswith("ours"):
        return run_ours(questions * (2 if case == "ours_double" else 1), tokens, number)
    return RUNS[case](questions, tokens, number)


# What they share


def _model_folder() -> str:
    from qcrd_ray.models.embedded import embedded_student

    return str(embedded_student(MODEL.removeprefix("embedded:")))


def _engine_settings() -> dict[str, Any]:
    """vLLM's settings in `qcrd_ray/sampling/vllm.py`."""
    from qcrd_ray.sampling.vllm import CPU_BLOCK_TOKENS, CPU_STEP_TOKENS

    return {
        "model": _model_folder(),
        "dtype": "bfloat16",
        "max_model_len": CONTEXT,
        "max_num_seqs": SEQUENCES,
        "max_num_batched_tokens": CPU_STEP_TOKENS,
        "enable_chunked_prefill": False,
        "block_size": CPU_BLOCK_TOKENS,
        "enable_prefix_caching": True,
        "enforce_eager": True,
        "generation_config": "vllm",
        "seed": 0,
    }


def _config(questions: int, tokens: int, number: int) -> Any:
    from qcrd_ray.config import config_from_dict

    data = os.environ.get("QCRD_BENCHMARK_DATA")
    source = {"path": f"{data}/svamp"} if data else {"path": "generated:chain_sum", "generated": {"train": 720}}
    teacher = {"engine": "vllm", "model": MODEL, "samples": SAMPLES, "temperature": TEMPERATURE, "max_tokens": tokens}
    teacher |= {
        "prompt": "few_shot",
        "max_model_tokens": CONTEXT,
        "max_sequences": SEQUENCES,
        "seed": number,
        "stop": [],
    }
    return config_from_dict(
        {"task": "svamp" if data else "chain_sum", "data": {**source, "limit": questions}, "teacher": teacher}
    )


def _prompts(questions: int, number: int) -> list[str]:
    from qcrd_ray.rationales.sources import read_rows
    from qcrd_ray.sampling.teacher_prompt import PromptBuilder
    from qcrd_ray.tasks import get_task

    config = _config(questions, 1, number)
    builder = PromptBuilder(config, chat=False)
    rows = zip(range(questions), read_rows(config, get_task(config), "train", samples=False), strict=False)
    return [str(builder.build(row.question).text) for _, row in rows]


# The table


def measure(case: str, questions: int, tokens: int, number: int) -> dict[str, Any]:
    """Run a case in a process of its own. Adds the peak of its whole process tree's memory, GiB."""
    import psutil

    command = [sys.executable, __file__, "--inner", case, str(questions), str(tokens), str(number)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
        peak, ended = 0, threading.Event()

        def watch() -> None:
            nonlocal peak
            while not ended.wait(5.0):  # reading the maps of a large process holds it up
                total = 0
                try:
                    tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
                except psutil.Error:
                    continue
                for one in tree:
                    try:
                        total += one.memory_full_info().pss
                    except psutil.Error:
                        continue
                peak = max(peak, total)

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        output, _ = process.communicate()
        ended.set()
        thread.join()
        if process.returncode:
            errors.seek(0)
            raise SystemExit(f"case {case} failed:\n{errors.read()[-4000:]}")
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    return {**result, "memory_gib": peak / 2**30, "speed": result["tokens"] / result["seconds"]}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one short round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--case", nargs="+", choices=CASES, help="run these cases only")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--inner", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.inner:
        case, *numbers = arguments.inner
        print(json.dumps(run_case(case, *map(int, numbers))), flush=True)
        return
    cases = arguments.case or (QUICK_CASES if arguments.quick else CASES)
    rounds = 1 if arguments.quick else arguments.rounds
    questions, tokens = (QUICK_QUESTIONS, QUICK_TOKENS) if arguments.quick else (QUESTIONS, TOKENS)
    found: dict[str, list[dict[str, Any]]] = {case: [] for case in cases}
    for number in range(rounds):
        turn = number % len(cases)
        for case in (*cases[turn:], *cases[:turn]):
            result = measure(case, questions, tokens, number)
            found[case].append(result)
            print(f"round {number + 1}, {case}: {result}", file=sys.stderr, flush=True)
    report(found, arguments.json)


def report(found: dict[str, list[dict[str, Any]]], file: Path | None) -> None:
    metrics = {"speed": "tokens/s", "seconds": "s", "start_seconds": "s", "memory_gib": "GiB"}
    rows = []
    for case, results in found.items():
        for metric, unit in metrics.items():
            rows.append(figure(case, metric, [result[metric] for result in results], unit))
    median = {(row["case"], row["metric"]): row["median"] for row in rows}
    ratios = {
        f"ours_over_{peer}": median_ratio(*([result["speed"] for result in found[case]] for case in ("ours", peer)))
        for peer in PEERS
        if peer in found and "ours" in found
    }
    if "ours" in found and "ours_double" in found:
        ratios["double_questions_time"] = median["ours_double", "seconds"] / median["ours", "seconds"]
        ratios["double_questions_memory"] = median["ours_double", "memory_gib"] / median["ours", "memory_gib"]
    print("| case | generated tokens/s (min to max) | sampling s | engine start s | peak memory GiB |")
    print("|---|---:|---:|---:|---:|")
    for case in found:
        speed = next(row for row in rows if row["case"] == case and row["metric"] == "speed")
        start, memory = median[case, "start_seconds"], median[case, "memory_gib"]
        print(
            f"| {case} | {speed['median']:.0f} ({speed['min']:.0f} to {speed['max']:.0f}) "
            f"| {median[case, 'seconds']:.1f} | {start:.1f} | {memory:.1f} |"
        )
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.2f}")
    write_figures(file, rows, ratios)


if __name__ == "__main__":
    main()
