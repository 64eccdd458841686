"""jobs/predict.py against its engine alone: the same prompts, the same engine settings, questions a second.

    python benchmarks/predict.py                      # SmolLM2-135M on vllm, a random T5-small on t5
    python benchmarks/predict.py --quick              # a first answer in under five minutes
    python benchmarks/predict.py --student runs/NAME/student --questions 2000 --json results/predict.json

`engine`: all requests, a label and a rationale each, in one call of the engine. `vllm`: the same by `vllm.LLM.generate`
itself. `predict`: JSON lines through a pipe into what the job does after its engine is up, and JSON lines out of it:
reading, tokenizing, batches, writing. Every case and round has questions of its own, so that no cache of prompts helps
the later one; the order turns with the rounds. Texts go on to their full length, so that all cases generate as much.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from figures import figure, median_ratio, write_figures

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from qcrd_ray.config import PredictionConfig  # noqa: E402
from qcrd_ray.evaluation.predict import Predictor, predict_lines, prediction_spec  # noqa: E402
from qcrd_ray.evaluation.questions import read_questions  # noqa: E402
from qcrd_ray.models.exported import STUDENT_FILE, ExportedStudent, read_exported  # noqa: E402
from qcrd_ray.sampling.engine import SamplingEngine, start_engine  # noqa: E402

LABEL_TOKENS, RATIONALE_TOKENS = 8, 48


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", type=Path, nargs="+", help="student folders; default: the two above")
    parser.add_argument("--questions", type=int, default=512, help="questions a round and case")
    parser.add_argument("--batch", type=int, default=PredictionConfig().batch, help="of predict")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one round, 96 questions")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--inner", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.rounds, arguments.questions = 1, min(arguments.questions, 96)
    if arguments.inner:
        stdout = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what engines print
        stdout.write(json.dumps(measure(arguments.inner, arguments)) + "\n")
        stdout.flush()
        return
    with tempfile.TemporaryDirectory() as folder:
        students = arguments.student or made_students(Path(folder))
        report([in_own_process(student, arguments) for student in students], arguments.json)


def in_own_process(student: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    import subprocess

    command = [sys.executable, __file__, "--inner", str(student), "--questions", str(arguments.questions)]
    command += ["--batch", str(arguments.batch), "--rounds", str(arguments.rounds)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{student} could not be measured")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def made_students(folder: Path) -> list[Path]:
    """SmolLM2-135M as it ships, and a T5 of T5-small's shape with random weights."""
    import shutil

    import torch
    from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

    from qcrd_ray.config import EvaluationConfig, ExperimentConfig, StudentConfig
    from qcrd_ray.models.embedded import embedded_student
    from qcrd_ray.models.scratch import build_scratch

    causal = folder / "smollm2_135m"
    shutil.copytree(embedded_student("smollm2-135m"), causal)
    t5 = build_scratch("t5-tiny", ["What is 1 + 2?"], folder / "t5_small", seed=0)
    torch.manual_seed(0)
    shape = T5Config(
        vocab_size=32128, d_model=512, d_kv=64, d_ff=2048, num_layers=6, num_heads=8, decoder_start_token_id=0,
        pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    T5ForConditionalGeneration(shape).to(torch.bfloat16).save_pretrained(t5)
    assert len(AutoTokenizer.from_pretrained(t5)) <= shape.vocab_size
    config = ExperimentConfig(
        task="chain_sum",
        student=StudentConfig(max_rationale_tokens=RATIONALE_TOKENS),
        evaluation=EvaluationConfig(max_new_tokens=LABEL_TOKENS),
    )
    for student in (causal, t5):
        (student / STUDENT_FILE).write_text(ExportedStudent.of(config).text(), encoding="utf-8")
    return [causal, t5]


def measure(student: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Questions a second of each case and round."""
    config = read_exported(student).config(str(student))
    options = PredictionConfig(batch=arguments.batch)
    spec = prediction_spec(config, options, one_question=False)
    engine = FullLength(start_engine(spec))
    predictor = Predictor(engine, config, options, rationales=True)
    cases: dict[str, Callable[[list[str]], Callable[[], Any]]] = {
        "engine": lambda texts: bare(predictor, texts),
        "predict": lambda texts: piped(predictor, texts, options),
    }
    if spec.engine == "vllm":
        cases["vllm"] = lambda texts: bare_vllm(predictor, texts)
    for work in cases.values():  # warm
        work(questions(8, -1))()
    found: dict[str, list[float]] = {case: [] for case in cases}
    for number in range(arguments.rounds):
        order = list(cases)[number % len(cases) :] + list(cases)[: number % len(cases)]
        for case in order:
            texts = questions(arguments.questions, number * len(cases) + order.index(case))
            timed = cases[case](texts)
            begin = time.perf_counter()
            timed()
            found[case].append(arguments.questions / (time.perf_counter() - begin))
            print(f"{student.name}, round {number + 1}, {case}: {found[case][-1]:.2f} questions/s", file=sys.stderr)
    engine.close()
    return {"student": student.name, "engine": spec.engine, "found": found}


class FullLength:
    """An engine whose texts all go on to their full length."""

    def __init__(self, engine: SamplingEngine) -> None:
        self.engine = engine

    def generate(self, requests: Any) -> Any:
        whole = [
            dataclasses.replace(one, parameters=dataclasses.replace(one.parameters, ignore_end=True))
            for one in requests
        ]
        return self.engine.generate(whole)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)


def questions(count: int, number: int) -> list[str]:
    """Questions of some thirty tokens that no other number has."""
    return [
        f"In round {number + 7} shelf {index} holds {index * 7 % 89} red boxes and {index * 13 % 97} blue ones, and "
        f"somebody takes {index % 11} of them away. How many boxes are left there?"
        for index in range(count)
    ]


def bare(predictor: Predictor, texts: list[str]) -> Callable[[], Any]:
    """One call of the engine, whose prompts are tokenized already."""
    from qcrd_ray.evaluation.questions import Asked

    work = predictor.prepare([Asked(number, text) for number, text in enumerate(texts)])
    return lambda: predictor.engine.generate(work.requests)


def bare_vllm(predictor: Predictor, texts: list[str]) -> Callable[[], Any]:
    """The same by vLLM's own class, with texts for prompts."""
    from vllm import SamplingParams

    llm = predictor.engine.llm  # type: ignore[attr-defined]
    prompts = [f"{prefix} {text}\n" for prefix in ("<Predict>", "<Explain>") for text in texts]
    label, rationale = predictor.config.evaluation.max_new_tokens, predictor.config.student.max_rationale_tokens
    parameters = [
        SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True)
        for length in [label] * len(texts) + [rationale] * len(texts)
    ]
    return lambda: llm.generate(prompts, parameters, use_tqdm=False)


def piped(predictor: Predictor, texts: list[str], options: PredictionConfig) -> Callable[[], Any]:
    """JSON lines through a pipe in, JSON lines out to a file."""
    return lambda: _piped(predictor, texts, options)


def _piped(predictor: Predictor, texts: list[str], options: PredictionConfig) -> None:
    from qcrd_ray.evaluation import questions as reader

    source, sink = os.pipe()

    def feed() -> None:
        with os.fdopen(sink, "w") as file:
            for number, text in enumerate(texts):
                file.write(json.dumps({"id": number, "question": text}) + "\n")

    writer = threading.Thread(target=feed)
    writer.start()
    reader.STANDARD_INPUT = source
    with tempfile.TemporaryFile("w+") as out:

        def write(text: str) -> None:
            out.write(text)
            out.flush()

        counts = predict_lines(predictor, read_questions(None, "auto", options.batch, options.linger_s), write, False)
        out.seek(0)
        assert [json.loads(text)["id"] for text in out] == list(range(len(texts)))
    assert counts.answered == len(texts)
    writer.join()
    os.close(source)


def report(results: list[dict[str, Any]], file: Path | None) -> None:
    rows = []
    ratios: dict[str, float] = {}
    print("| student | case | questions/s |")
    print("|---|---|---:|")
    for result in results:
        found = result["found"]
        for case, values in found.items():
            name = f"{case}/{result['student']}"
            summary = figure(name, "questions", values, "questions/s")
            rows.append(summary)
            spread = f" ({summary['min']:.2f} to {summary['max']:.2f})" if len(values) > 1 else ""
            print(f"| {result['student']} ({result['engine']}) | {case} | {summary['median']:.2f}{spread} |")
        for other in (case for case in found if case != "predict"):
            ratios[f"predict_over_{other}/{result['student']}"] = median_ratio(found["predict"], found[other])
    ratios["predict_over_engine"] = min(value for name, value in ratios.items() if name.startswith("predict_over_"))
    for name, value in ratios.items():
        print(f"{name}: {value:.2f}")
    write_figures(file, rows, ratios)


if __name__ == "__main__":
    main()
