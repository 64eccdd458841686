"""How well students learn by each method: the same steps, the same tuning, several seeds, on real questions.

    python benchmarks/accuracy.py --data FOLDER [--only NAME] [--seeds N] [--output runs/accuracy] [--pieces FOLDER]
        [key=value ...]

FOLDER holds the benchmark data: `svamp`, `cqa`, `esnli`, each with `train.jsonl` and `valid.jsonl`. A comparison begins
with a sweep that trains every method once with every learning rate, for half the steps, from a seed of its own; the
rate that is best on the validation split is the method's. With one rate alone nothing is tuned. Then a sweep over N
seeds trains every method with its rate. The student that is reported is the best of its run on the validation split,
scored on the test split.

No split of the benchmark was chosen by: FOLDER's `valid.jsonl` is the test split here, and a validation split is taken
from `train.jsonl` by a hash of the ids. Of SVAMP, questions that this teacher was never asked train nothing in any
method and are in the test split too.

Whatever ends it, the same command goes on, with `--pieces` also where the runs are not: what has ended is kept there, a
file for the tuning and one a seed. `OUTPUT/NAME.json` holds what `docs/results.md` shows: means over seeds with 95 %
intervals by Student's t, and for each pair of methods the paired difference: of the two means of a question over seeds,
its 95 % interval over questions, and the p of a sign-flip test.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from pieces import LAST, LAST_STEPS, all_trials, p_value, paired, right_answers, shown

from qcrd_ray.config import config_to_yaml, load_config
from qcrd_ray.run_folder import write_text_atomic
from qcrd_ray.seeding import stable_hash
from qcrd_ray.sweeps.space import Axis, Choice
from qcrd_ray.sweeps.summary import mean_and_interval
from qcrd_ray.training.methods import METHODS
from qcrd_ray.training.methods.base import contrasted_rationales, no_rationales

ROOT = Path(__file__).resolve().parents[1]
TUNING_SEED = 100


@dataclass(frozen=True)
class Comparison:
    """One task and student.

    Attributes:
        teacher: of the recorded samples that are used; questions without one of its samples go to the test split.
        valid: share of the training questions that the validation split takes.
        methods: settings by the names that the table has.
        rates: learning rates that each method is tried with; with a single one nothing is tuned.
        settings: beyond `config`, the same for all methods.
        tuning: beyond those, of the runs that a learning rate is chosen by.
    """

    task: str
    teacher: str
    valid: float
    methods: Mapping[str, Mapping[str, Any]]
    rates: tuple[float, ...]
    config: str
    settings: tuple[str, ...]
    tuning: tuple[str, ...]


TWO_AT_ONCE = (
    "train.cpus_per_worker=0.6", "sampler.cpus=0.1", "train.threads=1", "sampler.threads=1",
)  # fmt: skip
"""On two cores. While one run starts or is evaluated, the other trains."""

SCRATCH = (
    "train.max_steps=800", "train.iteration_steps=40", "train.eval_interval=200", "train.batch_size=16",
    "train.log_interval=50", "negatives.lag=5", "negatives.max_tokens=64", "student.max_rationale_tokens=64",
    "judge.pretrain_steps=100", "judge.lr=1e-3", *TWO_AT_ONCE,
)  # fmt: skip

SMOLLM2 = (
    "train.max_steps=40", "train.iteration_steps=5", "train.eval_interval=20", "train.log_interval=5",
    "negatives.lag=2", "student.max_rationale_tokens=128", "evaluation.max_new_tokens=24", "evaluation.observed=0",
    "train.precision=fp32", "sampler.precision=fp32", "sampler.kv_cache_gib=0.6", *TWO_AT_ONCE,
)  # fmt: skip

METHODS_OF_ALL = {method: {"method": method} for method in ("finetune", "dss", "qcrd")}

TAUGHT = {
    "judge.encoder": "embedded:minilm-l6", "judge.lr": 1e-4, "judge.pretrain_steps": 50, "loss.judge_decay": 1.0,
}  # fmt: skip
"""A pretrained judge that goes on learning: by 0.9^t all its updates together would count for ten of the first."""

COMPARISONS = {
    "svamp": Comparison(
        "svamp", "gpt35turbo-mcckd", 0.12, METHODS_OF_ALL, (5e-5, 2e-4), "smollm2_135m.yaml", SMOLLM2,
        ("train.max_steps=20",),
    ),
    "esnli": Comparison(
        "esnli", "palm540b", 0.05, METHODS_OF_ALL, (1e-3, 3e-3), "tiny.yaml", SCRATCH,
        ("train.max_steps=400",),
    ),
    "esnli_judge": Comparison(
        "esnli", "palm540b", 0.05,
        {
            "dss": {"method": "dss"},
            "qcrd without judge": {"method": "qcrd", "judge.enabled": False},
            "qcrd, judge taught": {"method": "qcrd", **TAUGHT},
        },
        (1e-3,), "tiny.yaml", (*SCRATCH, "train.iteration_steps=10", "negatives.lag=20"), (),
    ),
    "cqa": Comparison(
        "cqa", "palm540b", 0.05, METHODS_OF_ALL, (1e-4,), "smollm2_135m.yaml",
        (*SMOLLM2, "data.eval_limit=200", "train.precision=bf16", "sampler.precision=bf16"), (),
    ),
}  # fmt: skip
"""CommonsenseQA takes a student that knows English: one from scratch writes the same word for every question."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--only", choices=COMPARISONS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("runs/accuracy"))
    parser.add_argument(
        "--pieces",
        type=Path,
        help="where trials that have ended are kept, and found by a later start; default: --output",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    for name in [arguments.only] if arguments.only else COMPARISONS:
        found = compare(name, arguments)
        write_text_atomic(arguments.output / f"{name}.json", json.dumps(found, indent=1) + "\n")
        print("\n".join(lines_of(found)), flush=True)


def compare(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    comparison, place = COMPARISONS[name], arguments.output.absolute() / name
    counts = split(comparison, arguments.data / comparison.task, place / "data")
    file, settings = ROOT / "jobs" / "configs" / comparison.config, [
        f"task={comparison.task}", "teacher.engine=recorded", "teacher.precision=fp32", f"data.path={place / 'data'}",
        f"data.teachers=[{comparison.teacher}]", f"run.storage_path={place}", *comparison.settings,
    ]  # fmt: skip
    base = load_config(file, [*settings, *arguments.overrides])
    brief = load_config(file, [*settings, *comparison.tuning, *arguments.overrides])
    pieces = arguments.pieces or arguments.output
    tuning: list[dict[str, Any]] = []
    if len(comparison.rates) > 1:
        tuned = Axis("method", "method and learning rate", tuple(_choices(comparison)))
        tuning = all_trials(brief, tuned, {TUNING_SEED: pieces / f"{name}-tuning.json"})
    rates = {
        method: max(comparison.rates, key=lambda rate: _valid(tuning, _label(method, rate)) if tuning else rate)
        for method in comparison.methods
    }
    chosen = Axis("method", "method", tuple(Choice(m, {**comparison.methods[m], "optim.lr": rates[m]}) for m in rates))
    seeds = range(base.train.seed, base.train.seed + arguments.seeds)
    trials = all_trials(base, chosen, {seed: pieces / f"{name}-seed-{seed}.json" for seed in seeds})
    used = {trial.get("used", counts["train"]) for trial in trials}
    if len(used) > 1:
        raise SystemExit(
            f"error: {pieces}: trials of {sorted(used)} training questions do not compare; remove {name}-*"
        )
    counts["train"] = used.pop()
    if base.data.eval_limit is not None:
        counts |= {name: min(counts[name], base.data.eval_limit) for name in ("valid", "test")}
    answers = {
        method: right_answers(row for row in trials if row["labels"]["method"] == method)
        for method in comparison.methods
    }
    rows = [{key: value for key, value in trial.items() if key != "answers"} for trial in trials]
    return {
        "name": name,
        "command": " ".join(
            ["python", "benchmarks/accuracy.py", "--data", "DATA", "--only", name, *arguments.overrides]
        ),
        "config": config_to_yaml(shown(base)),
        "data": counts,
        "tuning": [{"point": row["point"], "valid": row["valid_accuracy"]} for row in tuning],
        "rates": rates,
        "trials": rows,
        "methods": [_method(method, rows) for method in comparison.methods],
        "pairs": [
            {"a": a, "b": b, **paired(answers[a], answers[b])} for b, a in itertools.combinations(comparison.methods, 2)
        ],
    }


def _choices(comparison: Comparison) -> Iterator[Choice]:
    for method, settings in comparison.methods.items():
        for rate in comparison.rates:
            yield Choice(_label(method, rate), {**settings, "optim.lr": rate})


def _label(method: str, rate: float) -> str:
    return f"{method}, {rate:g}"


def _valid(rows: Sequence[Mapping[str, Any]], label: str) -> float:
    return float(next(row["valid_accuracy"] for row in rows if row["point"] == f"method={label}"))


def split(comparison: Comparison, source: Path, target: Path) -> dict[str, int]:
    """Write train, valid and test to `target`. Returns their numbers of questions."""
    rows = {name: _read(source / f"{name}.jsonl") for name in ("train", "valid")}
    parts: dict[str, list[dict[str, Any]]] = {"train": [], "valid": [], "test": rows["valid"]}
    for row in rows["train"]:
        if all(sample["teacher"] != comparison.teacher for sample in row["teacher_samples"]):
            parts["test"].append(row)
        else:
            drawn = stable_hash("valid", row["id"]) % 10**6 < comparison.valid * 10**6
            parts["valid" if drawn else "train"].append(row)
    for name, part in parts.items():
        write_text_atomic(target / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in part))
    return {name: len(part) for name, part in parts.items()}


def _read(file: Path) -> list[dict[str, Any]]:
    if not file.exists():
        raise SystemExit(f"error: --data: {file} not found")
    with file.open(encoding="utf-8") as lines:  # a text may hold what `splitlines` takes for the end of a line
        return [json.loads(line) for line in lines]


def _method(method: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    own = [row for row in rows if row["labels"]["method"] == method]
    mean, std, half = mean_and_interval([row["accuracy"] for row in own])
    found = {"method": method, "seeds": len(own), "n": own[0]["n"], "mean": mean, "std": std, "half": half}
    return found | {"seconds": float(np.mean([row["seconds"] for row in own]))}


def lines_of(found: Mapping[str, Any]) -> Iterator[str]:
    """The tables, in Markdown."""
    data = found["data"]
    yield f"{data['train']} questions to train on, {data['valid']} to choose by, {data['test']} to report on.\n"
    yield "| method | learning rate | test accuracy, 95 % over seeds | std | active negatives | s a run |"
    yield "|---|---|---|---|---|---|"
    for row in found["methods"]:
        spread = "" if row["half"] is None else f" ± {row['half']:.3f}"
        std = "" if row["std"] is None else f"{row['std']:.3f}"
        rate = found["rates"][row["method"]]
        yield (
            f"| {row['method']} | {rate:g} | {row['mean']:.3f}{spread} | {std} | {_active(found, row['method'])} "
            f"| {row['seconds']:.0f} |"
        )
    steps = yaml.safe_load(found["config"])["train"]["max_steps"]
    over = f"the last {LAST_STEPS}" if steps > LAST_STEPS else f"all {steps}"
    yield f"\nMeans over {over} steps:\n\n| method | {' | '.join(LAST)} |"
    yield "|---" * (len(LAST) + 1) + "|"
    for method in found["rates"]:
        own = [row for row in found["trials"] if row["labels"]["method"] == method]
        means = [[row["last"][key] for row in own if key in row["last"] and _takes(row, key)] for key in LAST]
        yield f"| {method} | {' | '.join(f'{np.mean(m):.3f}' if m else '' for m in means)} |"
    judged = [row for row in found["trials"] if row.get("judge")]
    if judged:
        yield "\nThe judge's mean scores, positives / negatives:\n"
        yield "| run | end of pretraining | first update | last update |\n|---|---|---|---|"
        for row in judged:
            cells = [row["judge"].get(moment) for moment in ("pretrained", "first", "last")]
            shown = [" / ".join(f"{score:.2f}" for score in cell) if cell else "" for cell in cells]
            yield f"| {row['labels']['method']}, seed {row['seed']} | {' | '.join(shown)} |"
    yield "\n| | difference, 95 % over questions | p |\n|---|---|---|"
    for row in found["pairs"]:
        yield f"| {row['a']} − {row['b']} | {row['difference']:+.3f} ± {row['half']:.3f} | {p_value(row['p'])} |"


def _takes(trial: Mapping[str, Any], key: str) -> bool:
    """Whether a term is one of its method's loss; the others are recorded as 0."""
    rationales = METHODS[trial["settings"]["method"]].rationales
    takes = {"loss_positive": rationales is not no_rationales, "loss_negative": rationales is contrasted_rationales}
    return takes.get(key, True)


def _active(found: Mapping[str, Any], method: str) -> str:
    """The share of negatives inside the margin, over the method's runs."""
    own = [row for row in found["trials"] if row["labels"]["method"] == method and row["negatives_used"]]
    return f"{np.mean([row['active_fraction'] for row in own]):.2f}" if own else ""


if __name__ == "__main__":
    main()
