"""A student's model card: what it does, what it learned from, how well it does it, how to use it. Imports no torch."""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qcrd_ray.config import ExperimentConfig
from qcrd_ray.models.named import hub_name
from qcrd_ray.sampling.predictions import most_tokens
from qcrd_ray.tasks.prompts import EXPLAIN, PREDICT

SHOWN = 600
_SPECIAL = re.compile(r"[\\`*_\[\]~|#@${}^]|:(?=//)")
_PLAIN_IN_SHELL = re.compile(r"[\w .,:;?+*/=%-]+")
_READS = {
    "svamp": ("a word problem", "an equation, whose value is compared"),
    "cqa": ("a question and its choices", "the text of a choice"),
    "anli1": ("a premise and a hypothesis", "entailment, neutral or contradiction"),
    "esnli": ("a premise and a hypothesis", "entailment, neutral or contradiction"),
    "chain_sum": ("a sum or a difference", "the number"),
}
_PAIR = re.compile(r"\\ud[89ab][0-9a-f]{2}\\ud[c-f][0-9a-f]{2}")
"""A character beyond the first 65,536 as JSON writes it in ASCII; Python would read two halves."""
_LABELS = {
    "gold": "the gold answers",
    "teacher_vote": "the answer that most of the teacher's samples give",
    "teacher_sample": "the answer of the teacher's first sample",
}
_POSITIVES = {
    "vote": "the teacher's samples whose answer is the most frequent one",
    "gold": "the teacher's samples whose answer is right",
    "first": "the teacher's first sample",
}


class Markup(str):
    """Text of a card that is Markdown already."""


@dataclass(frozen=True)
class Prompting:
    """How a plain text reaches a student as its trained prompt.

    Attributes:
        seq2seq: whether it is an encoder-decoder.
        special_tokens: whether the tokenizer may add its own, as it does when nobody says otherwise.
        ending: a text behind the prompt that the tokenizer does not add.
    """

    seq2seq: bool
    special_tokens: bool = True
    ending: str = ""

    def text(self, prefix: str, question: str) -> str:
        return f"{prefix} {question}" + ("" if self.seq2seq else "\n")


def model_card(config: ExperimentConfig, result: Mapping[str, Any], prompting: Prompting, adapter: str | None) -> str:
    """The card, in Markdown with YAML front matter. What comes from data, models or the config is escaped.

    Args:
        config: of the run.
        result: as in its `result.json`.
        adapter: folder of the low-rank adapters, where there are some.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("qcrd_ray.reporting"),
        autoescape=False,
        finalize=lambda value: value if isinstance(value, Markup | int | float) else escaped(str(value)),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
    )
    environment.globals |= {"whole": lambda n: Markup(f"{n:,}"), "percent": lambda n: Markup(f"{100 * n:.1f} %")}
    body = environment.get_template("model_card.md.j2").render(**_values(config, result, prompting, adapter))
    return _front_matter(config, result) + re.sub(r"\n{3,}", "\n\n", body)


def _values(
    config: ExperimentConfig, result: Mapping[str, Any], prompting: Prompting, adapter: str | None
) -> dict[str, Any]:
    accuracy, data = result["accuracy"], result["data"]
    examples = result["examples"]
    single = config.method == "single_task"
    reads, writes = _READS.get(config.task, (f"a question, as {config.custom.template}", "its answer"))
    rationales = config.uses_rationales
    n, right = accuracy["n"], accuracy["after"]
    return {
        "result": result,
        "method": Markup(config.method),
        "accuracy": {**accuracy, "split": Markup(accuracy["split"])},
        "error": math.sqrt(right * (1 - right) / n) if n else 0.0,
        "best": accuracy["student"] != "last",
        "scored": _scored(result),
        "example": _shortened(examples[0]) if examples else None,
        "teacher": _teacher(data),
        "simulated": data["simulated"] and rationales,
        "train": data["train"],
        "held_out": data["held_out"],
        "wrong_votes": (data["train"]["wrongly_voted"] or 0) if _learns_the_vote(config) else 0,
        "reads": reads,
        "writes": writes,
        "source": _source(config),
        "labels": _LABELS["teacher_sample" if single else config.labels],
        "positives": _POSITIVES[config.positives if config.is_contrastive else "first"],
        "rationales": rationales,
        "voted": _learns_the_vote(config) or config.labels == "teacher_vote",
        "explains": rationales and not single,
        "single": single,
        "contrastive": config.is_contrastive,
        "settings": _settings(config),
        "sampled": config.sampled_negatives > 0,
        "negatives": result["negatives"],
        "judged": config.judge.enabled and config.is_contrastive,
        "judge": result["judge"],
        "seq2seq": prompting.seq2seq,
        "adapter": adapter,
        "label_tokens": most_tokens(config, PREDICT),
        "rationale_tokens": config.student.max_rationale_tokens,
        "input_tokens": config.student.max_input_tokens,
        "code": _code(config, prompting, examples[0]["question"] if examples else "What is 3 + 4?"),
    }


def _teacher(data: Mapping[str, Any]) -> str:
    name = str(data["teacher"])
    return f"{name} (simulated)" if data["simulated"] and "simulated" not in name else name


def escaped(text: str) -> str:
    """A text as itself in Markdown and HTML: one line, nothing in it that either would read as markup."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    line = line if len(line) <= SHOWN else line[: SHOWN - 1] + "…"
    line = _SPECIAL.sub(lambda match: "\\" + match[0], line.replace("www.", "www\x00"))
    return html.escape(line, quote=False).replace("www\x00", "www\\.")


def _shortened(example: Mapping[str, Any]) -> dict[str, str]:
    return {name: str(value) or "(nothing)" for name, value in example.items()}


def _scored(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What was scored besides the first and the reported student, in order, at most a dozen of them."""
    accuracy = result["accuracy"]
    shown = (0, accuracy["step"])
    found = [e for e in result["evaluations"] if e["split"] != accuracy["split"] or e["step"] not in shown]
    ordered = sorted(found, key=lambda entry: (entry["split"], entry["step"]))
    every = -(-len(ordered) // 12) or 1
    return [{**entry, "split": Markup(entry["split"])} for entry in ordered[::every]]


def _source(config: ExperimentConfig) -> Any:
    """What the data are called, without the place of a folder on somebody's machine."""
    path = config.data.path or ""
    if path.startswith("hub:"):
        return f"{path.removeprefix('hub:')} of the Hugging Face Hub"
    if path.startswith("generated:"):
        return f"{path.removeprefix('generated:')}, made by reasoning-gym with seed {config.teacher.seed}"
    return f"a folder {Path(path).name}"


def _base(config: ExperimentConfig) -> tuple[str, str | None]:
    """(what the student started from, its name on the Hub where it has one)."""
    model = config.student.model
    if model.startswith("scratch:"):
        return f"{model} (random weights, tokenizer learned from the data)", None
    name = hub_name(model)
    return name or f"a folder {Path(model).name}", name


def _front_matter(config: ExperimentConfig, result: Mapping[str, Any]) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    accuracy = result["accuracy"]
    _, base = _base(config)
    path = config.data.path or ""
    hub_data = path.removeprefix("hub:").partition(":")[0] if path.startswith("hub:") else None
    score = EvalResult(
        task_type="text-generation",
        dataset_type=hub_data or config.task,
        dataset_name=config.task,
        dataset_split=accuracy["split"],
        metric_type="accuracy",
        metric_value=round(accuracy["after"], 6),
    )
    data = ModelCardData(
        library_name="transformers",
        # Of what transformers 5 and the Hub know, encoder-decoders fall under this too.
        pipeline_tag="text-generation",
        base_model=base,
        datasets=[hub_data] if hub_data else None,
        tags=[
            "qcrd",
            *(["knowledge-distillation", "rationale"] if config.uses_rationales else []),
            config.task,
            config.method,
        ],
        metrics=["accuracy"],
        model_name=result["name"],
        eval_results=[score],
    )
    return f"---\n{data.to_yaml()}\n---\n\n"


def _settings(config: ExperimentConfig) -> list[tuple[Markup, Any]]:
    """The settings that decide what a run of this method learns."""
    started, _ = _base(config)
    train, loss, negatives = config.train, config.loss, config.negatives
    rows: list[tuple[str, Any]] = [("student before training", started)]
    if config.student.lora.rank:
        rows.append(("low-rank adapters", f"rank {config.student.lora.rank}, alpha {config.student.lora.alpha:g}"))
    rows += [
        ("steps, questions a step", f"{train.max_steps}, {train.batch_size}"),
        ("optimizer", f"AdamW, learning rate {config.optim.lr:g}, linear decay, {config.optim.warmup_steps} warm-up"),
        ("precision, seed", f"{train.precision}, {train.seed}"),
        ("tokens of a prompt at most", config.student.max_input_tokens),
        ("weight of the label", f"{loss.alpha_label:g}"),
    ]
    if config.uses_rationales:
        rows.append(("tokens of a rationale at most", config.student.max_rationale_tokens))
    if config.method in ("mi", "mi+qcrd"):
        rows.append(("weight of the mutual information", f"{loss.alpha_mutual_information:g}"))
    if config.is_contrastive:
        rows += [
            ("scheme", config.scheme),
            ("α₂, β, δ", f"{loss.alpha_contrastive:g}, {loss.beta:g}, {loss.margin:g} nats"),
            ("source of the negatives", negatives.source),
        ]
    if config.sampled_negatives:
        lag = (
            f", lag {negatives.lag} iterations of {train.iteration_steps} steps" if "lagged" in negatives.source else ""
        )
        rows.append(
            (
                "negatives a question",
                f"{negatives.count}, temperature {negatives.temperature:g}, top-k {negatives.top_k}{lag}",
            )
        )
    return [(Markup(name), value) for name, value in rows]


def _code(config: ExperimentConfig, prompting: Prompting, question: str) -> dict[str, Markup]:
    """Literals of the card's code, of Python, JSON and the shell; the question of an example is in them."""
    question = question if len(question) <= SHOWN else "What is 3 + 4?"
    predict, explain = (prompting.text(prefix, question) for prefix in (PREDICT, EXPLAIN))
    request: dict[str, Any] = {"model": "student", "prompt": predict, "temperature": 0}
    request["max_tokens"] = most_tokens(config, PREDICT)
    options = ""
    if not prompting.special_tokens:
        options = ", add_special_tokens=False"
        request["add_special_tokens"] = False
    return {
        "predict": Markup(_python(predict)),
        "explain": Markup(_python(explain)),
        "text": Markup(f"text + {_python(prompting.ending)}" if prompting.ending else "text"),
        "options": Markup(options),
        "request": Markup(_literal(request)),
        "explain_request": Markup(
            _literal({**request, "prompt": explain, "max_tokens": config.student.max_rationale_tokens})
        ),
        "shell": Markup(f'"{question}"' if _PLAIN_IN_SHELL.fullmatch(question) else '"QUESTION"'),
    }


def _learns_the_vote(config: ExperimentConfig) -> bool:
    return config.is_contrastive and config.positives == "vote"


def _python(text: str) -> str:
    """A text as a Python literal in a code block."""
    return _PAIR.sub(lambda pair: f"\\U{ord(json.loads(f'{chr(34)}{pair[0]}{chr(34)}')):08x}", _literal(text))


def _literal(value: Any) -> str:
    """A value as JSON in a code block and in single quotes of a shell: ASCII, no ', no `."""
    text = json.dumps(value).replace("'", "\\u0027").replace("`", "\\u0060")
    # The prompts' own marks stay readable.
    for mark in (PREDICT, EXPLAIN):
        text = text.replace(mark, mark.replace("<", "\x00").replace(">", "\x01"))
    text = text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    return text.replace("\x00", "<").replace("\x01", ">")
