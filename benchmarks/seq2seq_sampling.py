"""Generated tokens a second of encoder-decoder students: engine t5 against transformers and CTranslate2.

    python benchmarks/seq2seq_sampling.py [--quick] [--shape t5_small ...] [--case t5 ...] [--json FILE]

Random weights at the shapes of T5-small, T5-base and T5-large (ungated, tied, 32,128 tokens), prompts of 30 to 100
random tokens, temperature 1.5, the 50 likeliest tokens, 64 sequences at once, all cores. Each case runs in a process of
its own, one after another, in an order that turns with the rounds. A measurement during which other processes took more
than a tenth of the machine is made again, `--patience` times at most; `others` tells what they took in the end.

Metrics:
* `fixed`: 64 prompts, each continued by the same number of tokens. The end token does not end a text.
* `varied`: 96 prompts, each continued by a length of its own, 16 to 256 tokens (T5-large: 16 to 160), as rationales
  have them. Engines that take no length a request are left out.
* `swap`: taking the weights of a second snapshot (bfloat16, in the page cache), with all conversion.
* `start`: from nothing to the first eight tokens, imports left out, compilation included.

Cases:
* `t5`: engine t5; `t5_products`: the same without its C++ kernel, as where there is no compiler.
* `transformers`: the engine transformers, which draws each sequence from its own stream.
* `generate_static`: `model.generate` with SDPA and a static cache; `generate_compiled`: the same, compiled. Both draw
  the batch from one stream, so a text depends on its neighbours, and tell no raw log-probabilities.
* `ctranslate2`: `translate_batch`. It takes no seed a request and tells no raw log-probabilities.
A name that ends with _fp32 computes in float32, any other one in bfloat16.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from figures import figure, write_figures

ROOT = Path(__file__).resolve().parents[1]
SHAPES: dict[str, dict[str, int]] = {
    "t5_small": {"d_model": 512, "d_ff": 2048, "num_layers": 6, "num_heads": 8},
    "t5_base": {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12},
    "t5_large": {"d_model": 1024, "d_ff": 4096, "num_layers": 24, "num_heads": 16},
}
CASES = (
    "t5",
    "t5_products",
    "transformers",
    "generate_static",
    "generate_compiled",
    "t5_fp32",
    "transformers_fp32",
    "ctranslate2_fp32",
)
LARGE_CASES = ("t5", "transformers", "t5_fp32")
QUICK_CASES = ("t5", "transformers", "t5_fp32", "ctranslate2_fp32")
TEMPERATURE, TOP_K = 1.5, 50
VOCABULARY = 32128
SEQUENCES, VARIED_SEQUENCES = 64, 96
OTHERS = 0.1
"""Share of the machine that other processes may take during a measurement that counts."""


# The cases, each in a process of its own


class Engine:
    """An engine of the package."""

    takes_lengths = True

    def __init__(self, name: str, folder: Path, precision: str) -> None:
        from qcrd_ray.sampling.engine import EngineSpec, start_engine

        if name == "t5_products":
            from qcrd_ray.sampling.cpu_attention import CpuAttention

            CpuAttention.build = classmethod(lambda cls, size, dtype: None)  # type: ignore[method-assign, assignment]
        kind = "t5" if name.startswith("t5") else "transformers"
        self.engine = start_engine(EngineSpec(kind, str(folder), precision=precision, max_sequences=SEQUENCES))

    def generate(self, prompts: list[list[int]], lengths: list[int]) -> int:
        from qcrd_ray.sampling.engine import Request, SamplingParameters

        requests = []
        for index, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
            parameters = SamplingParameters(TEMPERATURE, TOP_K, max_tokens=length, ignore_end=True)
            requests.append(Request(tuple(prompt), parameters, seed=index))
        return sum(len(generation.token_ids) for [generation] in self.engine.generate(requests))

    def swap(self, folder: Path) -> None:
        self.engine.load_weights(folder)


class Generate:
    """`model.generate` of transformers."""

    takes_lengths = False

    def __init__(self, name: str, folder: Path, precision: str) -> None:
        import torch
        from transformers import AutoModelForSeq2SeqLM, CompileConfig

        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self.model: Any = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").eval()
        self.settings: dict[str, Any] = {"do_sample": True, "temperature": TEMPERATURE, "top_k": TOP_K}
        self.settings["cache_implementation"] = "static"
        if name.startswith("generate_compiled"):
            compilation = CompileConfig(fullgraph=False, mode="default")
            compilation._compile_all_devices = True  # else CPUs are left out
            self.settings["compile_config"] = compilation

    def generate(self, prompts: list[list[int]], lengths: list[int]) -> int:
        import torch

        [length] = set(lengths)
        width = max(map(len, prompts))
        ids = torch.tensor([prompt + [0] * (width - len(prompt)) for prompt in prompts])
        mask = torch.tensor([[1] * len(prompt) + [0] * (width - len(prompt)) for prompt in prompts])
        with torch.inference_mode():
            output = self.model.generate(
                ids, attention_mask=mask, min_new_tokens=length, max_new_tokens=length, **self.settings
            )
        return len(output) * (output.shape[1] - 1)

    def swap(self, folder: Path) -> None:
        from safetensors.torch import load_file

        own = self.model.state_dict()
        for name, value in load_file(folder / "model.safetensors").items():
            own[name].copy_(value)


class CTranslate2:
    """CTranslate2's translator; new weights are a new conversion."""

    takes_lengths = False

    def __init__(self, name: str, folder: Path, precision: str) -> None:
        self.swap(folder)

    def swap(self, folder: Path) -> None:
        import ctranslate2
        from ctranslate2.converters import TransformersConverter

        with tempfile.TemporaryDirectory() as converted:
            TransformersConverter(str(folder)).convert(converted, quantization="float32", force=True)
            self.translator = ctranslate2.Translator(
                converted, compute_type="float32", intra_threads=os.cpu_count() or 1
            )
            self.tokens = json.loads((Path(converted) / "shared_vocabulary.json").read_text())

    def generate(self, prompts: list[list[int]], lengths: list[int]) -> int:
        [length] = set(lengths)
        results = self.translator.translate_batch(
            [[self.tokens[token] for token in prompt] for prompt in prompts],
            max_batch_size=SEQUENCES,
            beam_size=1,
            sampling_topk=TOP_K,
            sampling_temperature=TEMPERATURE,
            min_decoding_length=length,
            max_decoding_length=length,
        )
        return sum(len(result.hypotheses[0]) for result in results)


def run_case(case: str, shape: str, folders: list[Path], number: int, quick: bool, patience: int) -> dict[str, Any]:
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    kinds: dict[str, Callable[..., Any]] = {"t5": Engine, "transformers": Engine, "generate": Generate}
    begin = time.perf_counter()
    kind = kinds.get(case.split("_")[0], CTranslate2)
    engine = kind(case, folders[0], "fp32" if case.endswith("_fp32") else "bf16")
    engine.generate(prompts(8, number), [8] * 8)
    found: dict[str, Any] = {"start": time.perf_counter() - begin, "others": 0.0}
    fixed, shortest, longest = lengths_of(shape, quick)
    varied = random.Random(number)
    work = {"fixed": [fixed] * SEQUENCES}
    if engine.takes_lengths:
        work["varied"] = [varied.randint(shortest, longest) for _ in range(VARIED_SEQUENCES)]
    if case.startswith("generate_compiled"):
        engine.generate(prompts(SEQUENCES, number), work["fixed"])  # compiles for these shapes
        found["start"] = time.perf_counter() - begin
    for metric, lengths in work.items():
        asked = prompts(len(lengths), number + 1)
        count, seconds, others = measured(lambda a=asked, n=lengths: engine.generate(a, n), patience)
        if count != sum(lengths):
            raise SystemExit(f"case {case}: {count} tokens, expected {sum(lengths)}")
        found[metric] = count / seconds
        found["others"] = max(found["others"], others)
    engine.swap(folders[1])  # the first one also copies weights that were mapped from their file
    _, found["swap"], others = measured(lambda: engine.swap(folders[0]), patience)
    found["others"] = max(found["others"], others)
    return found


def lengths_of(shape: str, quick: bool) -> tuple[int, int, int]:
    """Tokens a prompt: all alike, and the least and most of those that differ."""
    if shape == "t5_large":
        return 96, 16, 160
    return (48, 8, 96) if quick else (128, 16, 256)


def measured(work: Callable[[], Any], patience: int) -> tuple[Any, float, float]:
    """What work gives, its seconds, and the share of the machine that others took meanwhile."""
    best: tuple[Any, float, float] | None = None
    for _ in range(patience + 1):
        if best is not None:
            time.sleep(5.0)
        busy, own, begin = _busy_seconds(), time.process_time(), time.perf_counter()
        result = work()
        seconds = time.perf_counter() - begin
        taken = (_busy_seconds() - busy) - (time.process_time() - own)
        others = max(0.0, taken / seconds / (os.cpu_count() or 1))
        if best is None or others < best[2]:
            best = result, seconds, others
        if others <= OTHERS:
            break
    assert best is not None
    return best


def _busy_seconds() -> float:
    """CPU seconds that all processes of the machine have used, cores summed up."""
    import psutil

    times = psutil.cpu_times()
    return sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0)


def prompts(count: int, number: int) -> list[list[int]]:
    numbers = random.Random(number)
    return [[numbers.randrange(300, 32000) for _ in range(numbers.randint(30, 100))] for _ in range(count)]


# The table


def build(shape: str, folder: Path, seed: int) -> Path:
    """Write a Hugging Face folder of random bfloat16 weights, with a tokenizer that nothing is read with."""
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    from qcrd_ray.models.scratch import build_scratch

    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=VOCABULARY, d_kv=64, feed_forward_proj="relu", decoder_start_token_id=0, **SHAPES[shape]
    )
    T5ForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer = build_scratch("t5-tiny", ["What is 1 + 2?"], folder.with_name("tokenizer"), seed=0)
    for file in tokenizer.glob("tokenizer*"):
        shutil.copy(file, folder)
    shutil.rmtree(tokenizer)
    return folder


def measure(case: str, shape: str, folders: list[Path], number: int, arguments: argparse.Namespace) -> dict[str, Any]:
    inner = [case, shape, *map(str, folders), str(number)]
    command = [sys.executable, __file__, "--inner", *inner, "--patience", str(arguments.patience)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run(
        command + ["--quick"] * arguments.quick, capture_output=True, text=True, env=environment, check=False
    )
    if done.returncode:
        raise SystemExit(f"case {case} of {shape} failed:\n{done.stderr[-4000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="T5-small and T5-base, one round, short texts")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, help="these shapes only")
    parser.add_argument("--case", nargs="+", choices=CASES, help="these cases only")
    parser.add_argument("--patience", type=int, default=3, help="times that a disturbed measurement is made again")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--inner", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.patience = min(arguments.patience, 1)
    if arguments.inner:
        case, shape, *folders, number = arguments.inner
        result = run_case(case, shape, [Path(f) for f in folders], int(number), arguments.quick, arguments.patience)
        print(json.dumps(result), flush=True)
        return
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for shape in arguments.shape or (("t5_small", "t5_base") if arguments.quick else SHAPES):
        cases = arguments.case or (QUICK_CASES if arguments.quick else LARGE_CASES if shape == "t5_large" else CASES)
        if importlib.util.find_spec("ctranslate2") is None and "ctranslate2_fp32" in cases:
            print("ctranslate2_fp32 left out: ctranslate2 is not installed", file=sys.stderr)
            cases = tuple(case for case in cases if case != "ctranslate2_fp32")
        with tempfile.TemporaryDirectory() as root:
            folders = [build(shape, Path(root) / name, seed) for seed, name in enumerate(("first", "second"))]
            for number in range(1 if arguments.quick else arguments.rounds):
                turn = number % len(cases)
                for case in (*cases[turn:], *cases[:turn]):
                    result = measure(case, shape, folders, number, arguments)
                    found.setdefault((shape, case), []).append(result)
                    print(f"round {number + 1}, {shape}, {case}: {result}", file=sys.stderr, flush=True)
    report(found, arguments.json)


def report(found: dict[tuple[str, str], list[dict[str, Any]]], file: Path | None) -> None:
    units = {"fixed": "tokens/s", "varied": "tokens/s", "swap": "s", "start": "s", "others": "share"}
    rows = []
    for (shape, case), results in found.items():
        for metric, unit in units.items():
            values = [result[metric] for result in results if metric in result]
            if values:
                rows.append(figure(f"{case}/{shape}", metric, values, unit))
    ratios: dict[str, float] = {}
    for (shape, case), results in found.items():
        for mine in ("t5", "t5_fp32"):
            theirs = case if case.endswith("_fp32") == mine.endswith("_fp32") else mine
            if theirs == mine or (shape, mine) not in found:
                continue
            pairs = list(zip(found[shape, mine], results, strict=True))
            for metric, suffix in (("varied", ""), ("fixed", "_fixed")):
                if all(metric in one for one in results):
                    ratio = statistics.median(my[metric] / their[metric] for my, their in pairs)
                    ratios[f"{mine}_over_{theirs}{suffix}/{shape}"] = ratio
    print("| shape | case | fixed tokens/s | varied tokens/s | swap s | start s | others |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for shape, case in found:
        cells = []
        for metric in units:
            row = next((row for row in rows if (row["case"], row["metric"]) == (f"{case}/{shape}", metric)), None)
            digits = 0 if units[metric] == "tokens/s" else 2
            cells.append(
                f"{row['median']:.{digits}f} ({row['min']:.{digits}f} to {row['max']:.{digits}f})" if row else ""
            )
        print(f"| {shape} | {case} | {' | '.join(cells)} |")
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.2f}")
    write_figures(file, rows, ratios)


if __name__ == "__main__":
    main()
