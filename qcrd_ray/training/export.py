"""The student as others get it: weights, tokenizer, generation config, model card and `qcrd_ray.json`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qcrd_ray.config import ExperimentConfig
from qcrd_ray.models.exported import STUDENT_FILE, ExportedStudent
from qcrd_ray.models.lora import ADAPTER
from qcrd_ray.reporting.model_card import Prompting, model_card
from qcrd_ray.run_folder import LAST_STUDENT, STUDENT, RunFolder
from qcrd_ray.sampling.predictions import most_tokens
from qcrd_ray.sampling.schedule import Schedule
from qcrd_ray.sampling.snapshot import DESCRIPTION
from qcrd_ray.tasks.prompts import PREDICT, StudentTokenizer, load_tokenizer

CARD = "README.md"
LEFT_OUT = (DESCRIPTION, CARD, STUDENT_FILE, "generation_config.json", "chat_template.jinja")
"""A base model's chat template would ask the student in a form that it was not trained on."""
PROBE = "What is 3 + 4?"


def export(config: ExperimentConfig, run: RunFolder, snapshot: int, result: Mapping[str, Any]) -> None:
    """Write `student/` from the snapshot that was chosen, and `last_student/` where that is another one.

    Each is there whole or not at all, and says in its manifest what it holds. The card is of the chosen one.

    Args:
        result: of the run, as in its `result.json`.
    """
    last = Schedule.of(config).iterations

    def with_card(folder: Path) -> None:
        tokenizer = _describe(folder, config)
        adapter = ADAPTER if (folder / ADAPTER).is_dir() else None
        card = model_card(config, result, prompting_of(tokenizer, result), adapter)
        (folder / CARD).write_text(card, encoding="utf-8")

    def without_card(folder: Path) -> None:
        _describe(folder, config)

    run.copy_folder(run.snapshot(snapshot), STUDENT, LEFT_OUT, with_card)
    if snapshot != last:
        run.copy_folder(run.snapshot(last), LAST_STUDENT, LEFT_OUT, without_card)


def _describe(folder: Path, config: ExperimentConfig) -> StudentTokenizer:
    """Write what generation needs into a student's folder. Returns its tokenizer."""
    (folder / STUDENT_FILE).write_text(ExportedStudent.of(config).text(), encoding="utf-8")
    tokenizer = load_tokenizer(str(folder), config.student)
    generation_config(folder, tokenizer, config).save_pretrained(folder)
    return tokenizer


def generation_config(folder: Path, tokenizer: StudentTokenizer, config: ExperimentConfig) -> Any:
    """With it `generate` does what evaluation did: greedy, to the end token, nothing of a base model's own config."""
    from transformers import AutoConfig, GenerationConfig

    settings = {
        "do_sample": False,
        "max_new_tokens": most_tokens(config, PREDICT),
        "eos_token_id": tokenizer.end,
        "pad_token_id": tokenizer.pad,
        "bos_token_id": tokenizer.tokenizer.bos_token_id,
    }
    if tokenizer.is_seq2seq:
        shape = AutoConfig.from_pretrained(folder, trust_remote_code=config.student.trust_remote_code)
        settings["decoder_start_token_id"] = shape.decoder_start_token_id
    return GenerationConfig(**settings)


def prompting_of(tokenizer: StudentTokenizer, result: Mapping[str, Any]) -> Prompting:
    """How plain text has to be given to the tokenizer to become the prompt that was trained."""
    texts = [PROBE, *(example["question"] for example in result["examples"])]
    plain = Prompting(tokenizer.is_seq2seq)
    end = str(tokenizer.tokenizer.eos_token) if tokenizer.is_seq2seq else ""
    for way in (plain, Prompting(tokenizer.is_seq2seq, False, end)):
        if all(_reads(tokenizer, way, text) for text in texts):
            return way
    return plain


def _reads(tokenizer: StudentTokenizer, way: Prompting, text: str) -> bool:
    """Whether a text is cut, or becomes the ids of its prompt."""
    ids, cut = tokenizer.prompt(PREDICT, text)
    given = way.text(PREDICT, text) + way.ending
    found = tokenizer.tokenizer(given, add_special_tokens=way.special_tokens)["input_ids"]
    return cut or list(found) == ids
