"""How well students learn by each method: the same steps, the same tuning, several seeds, on real questions.

    python benchmarks/accuracy.py --data FOLDER [--only NAME] [--seeds N] [--output runs/accuracy] [--pieces FOLDER]
        [key=value ...]

FOLDER holds the benchmark data: `svamp`, `cqa`, `esnli`, each with `train.jsonl` and `valid.jsonl`. A comparison begins
with a sweep that trains every method once with every learning rate, for half the steps, from a seed of its own; the
rate that is best on the validation split is the method's. Then a sweep over N seeds trains every method with its rate.
The student that is reported is the best of its run on the validation split, scored on the test split.

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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from qcrd_ray.config import ExperimentConfig, config_from_dict, config_to_yaml, load_config
from qcrd_ray.errors import UserError
from qcrd_ray.reporting.run_record import read_predictions
from qcrd_ray.run_folder import EVALUATIONS, METRICS, RESULT, RunFolder, write_text_atomic
from qcrd_ray.seeding import stable_hash
from qcrd_ray.sweeps.driver import sweep
from qcrd_ray.sweeps.plan import Plan
from qcrd_ray.sweeps.settings import SweepSettings
from qcrd_ray.sweeps.space import Axis, Choice, Space
from qcrd_ray.sweeps.summary import mean_and_interval
from qcrd_ray.sweeps.trial import FINISHED
from qcrd_ray.training.methods import METHODS
from qcrd_ray.training.methods.base import contrasted_rationales, no_rationales

ROOT = Path(__file__).resolve().parents[1]
TUNING_SEED = 100
FLIPS = 20_000
LAST_STEPS = 100
LAST = ("loss_label", "loss_positive", "loss_negative", "active_fraction", "score_positive", "score_negative")


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
"""A pretrained judge that goes on learning at its full rate: with α₃ 0.9^t, all its updates count for ten."""

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
        "cqa", "palm540b", 0.05, METHODS_OF_ALL, (5e-5, 2e-4), "smollm2_135m.yaml",
        (*SMOLLM2, "data.eval_limit=200"), ("train.max_steps=20",),
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
    answers = {method: right_answers(trials, method) for method in comparison.methods}
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


def shown(config: ExperimentConfig) -> ExperimentConfig:
    """Without the folders of the machine that it ran on."""
    data = config.data.model_copy(update={"path": f"DATA/{config.task}"})
    return config.model_copy(update={"run": type(config.run)(), "data": data})


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


class Piece:
    """The trials of one seed that have ended well, in a file that goes from machine to machine.

    Attributes:
        base: the config of all trials.
        trials: by the labels of their choices: a sweep's row, with `settings`, `last` and `answers`.
    """

    def __init__(self, base: ExperimentConfig, axis: Axis, seed: int, file: Path) -> None:
        self.base = base.model_copy(update={"train": base.train.model_copy(update={"seed": seed})})
        self.axis, self.seed, self.file = axis, seed, file
        self.config = config_to_yaml(shown(self.base))
        found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"config": self.config, "trials": []}
        if _as_now(found["config"]) != self.config:
            raise SystemExit(f"error: {file} is of another config; give another --pieces or remove it")
        settings = {choice.label: dict(choice.settings) for choice in axis.choices}
        labelled = {trial["labels"][axis.name]: trial for trial in found["trials"]}
        self.trials = {label: trial for label, trial in labelled.items() if trial["settings"] == settings.get(label)}

    def rows(self) -> list[dict[str, Any]]:
        """In the order of the axis."""
        return [self.trials[choice.label] for choice in self.axis.choices if choice.label in self.trials]

    def write(self) -> None:
        write_text_atomic(self.file, json.dumps({"config": self.config, "trials": self.rows()}, indent=1) + "\n")


def _as_now(text: str) -> str:
    """A config with the keys that it was written without."""
    try:
        return config_to_yaml(config_from_dict(yaml.safe_load(text)))
    except UserError:
        return text


def all_trials(base: ExperimentConfig, axis: Axis, files: Mapping[int, Path]) -> list[dict[str, Any]]:
    """Rows of every choice with every seed, as the seeds' `files` have them, else by sweeps, several seeds at once.

    Whatever ends a sweep, the files have the trials that had ended well.
    """
    pieces = {seed: Piece(base, axis, seed, file) for seed, file in files.items()}
    missing: dict[tuple[int, ...], list[Choice]] = {}
    for choice in axis.choices:
        for seeds in _in_a_row(seed for seed, piece in pieces.items() if choice.label not in piece.trials):
            missing.setdefault(seeds, []).append(choice)
    for seeds, choices in missing.items():
        _sweep([pieces[seed] for seed in seeds], tuple(choices))
    return [row for piece in pieces.values() for row in piece.rows()]


def _in_a_row(seeds: Iterable[int]) -> list[tuple[int, ...]]:
    """Ascending numbers, as groups of which each is without a gap: what one sweep can have as seeds."""
    groups: list[tuple[int, ...]] = []
    for seed in seeds:
        if groups and groups[-1][-1] == seed - 1:
            groups[-1] = (*groups[-1], seed)
        else:
            groups.append((seed,))
    return groups


def _sweep(pieces: Sequence[Piece], choices: tuple[Choice, ...]) -> None:
    """Run choices with the pieces' seeds, which follow on each other."""
    first, axis = pieces[0], replace(pieces[0].axis, choices=choices)
    options, space = SweepSettings(name=first.file.stem, seeds=len(pieces)), Space((axis,))
    plan = Plan(options, first.base, space)
    try:
        sweep(options, first.base, space)
    finally:
        rows = [row for row in plan.rows() if row.status == FINISHED]
        settings = {choice.label: dict(choice.settings) for choice in choices}
        for row in rows:
            label, run = row.labels[axis.name], plan.run(row.trial)
            more = {
                "settings": settings[label],
                "used": _used(run),
                "last": last_steps(run),
                "judge": judge_scores(run),
            }
            more["answers"] = _answers(run)
            pieces[row.seed - first.seed].trials[label] = vars(row) | more
        for piece in pieces:
            piece.write()
    failed = len(pieces) * len(choices) - len(rows)
    if failed:
        raise SystemExit(f"error: {plan.folder}: {failed} trials failed; see its outcomes.json")


def _used(run: RunFolder) -> int:
    """Questions that it was trained on."""
    result = run.read_json(RESULT)
    assert result is not None
    return int(result["data"]["train"]["used"])


def _metrics(run: RunFolder) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run.read(METRICS).decode().splitlines()]


def judge_scores(run: RunFolder) -> dict[str, list[float]]:
    """The judge's mean scores of positives and of negatives: at the end of pretraining, before its online updates.

    The negatives are the minority and corrupted positives in pretraining, then those that the student is trained on.
    """
    rows = _metrics(run)
    pretrained = [row for row in rows if "judge_pretrained_steps" in row]
    updates = [row for row in rows if "judge_loss" in row]
    moments = {"pretrained": pretrained[-1:], "first": updates[:1], "last": updates[-1:]}
    prefixes = {"pretrained": "judge_pretrain"}
    return {
        moment: [row[f"{prefixes.get(moment, 'judge')}_{side}_score"] for side in ("positive", "negative")]
        for moment, found in moments.items()
        for row in found
    }


def last_steps(run: RunFolder) -> dict[str, float]:
    """Means over the last steps of training of what its metrics say."""
    rows = [row for row in _metrics(run) if "loss" in row][-LAST_STEPS:]
    values = {key: [row[key] for row in rows if row.get(key) is not None] for key in LAST}
    return {key: float(np.mean(found)) for key, found in values.items() if found}


def right_answers(trials: Sequence[Mapping[str, Any]], method: str) -> dict[str, float]:
    """For each test question the share of the method's seeds that answer it."""
    of_seeds = [trial["answers"] for trial in trials if trial["labels"]["method"] == method]
    return {key: float(np.mean([answers[key] for answers in of_seeds])) for key in of_seeds[0]}


def _answers(run: RunFolder) -> dict[str, int]:
    """1 for each question that the student that the run reports answers, 0 for the others."""
    result = run.read_json(RESULT)
    assert result is not None
    split, step = result["accuracy"]["split"], result["accuracy"]["step"]
    [number] = [e["snapshot"] for e in result["evaluations"] if (e["split"], e["step"]) == (split, step)]
    found = read_predictions(run, f"{EVALUATIONS}/{split}-{number:06d}.jsonl")
    return {key: int(correct) for key, (_, correct) in found.items()}


def paired(a: Mapping[str, float], b: Mapping[str, float]) -> dict[str, float]:
    """a - b over the same questions: its mean, half its 95 % interval, the p of flipping the signs of differences."""
    differences = np.array([a[key] - b[key] for key in sorted(a)])
    mean, _, half = mean_and_interval(differences.tolist())
    moving = differences[differences != 0.0]
    signs = np.random.default_rng(0).choice((-1.0, 1.0), size=(FLIPS, len(moving)))
    beyond = int(np.sum(np.abs(signs @ moving) >= abs(moving.sum()) - 1e-9))
    return {"difference": mean or 0.0, "half": half or 0.0, "p": (1 + beyond) / (1 + FLIPS), "n": len(differences)}


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
    yield f"\nMeans over the last {LAST_STEPS} steps:\n\n| method | {' | '.join(LAST)} |"
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
        yield f"| {row['a']} − {row['b']} | {row['difference']:+.3f} ± {row['half']:.3f} | {row['p']:.3f} |"


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
