"""A run's tokenizer is the student's own, whether or not torch is needed to load it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from qcrd_ray.config import ExperimentConfig, load_config
from qcrd_ray.models.embedded import embedded_student
from qcrd_ray.models.named import check_student
from qcrd_ray.models.scratch import build_scratch
from qcrd_ray.tasks.prompts import EXPLAIN, load_run_tokenizer, load_tokenizer

TEXTS = ["What is 3 + 4? 3 + 4 = 7.", "How many apples has Ann?"]


def saved(model: str, config: ExperimentConfig, folder: Path) -> str:
    """What `write_models` makes of a student's folder."""
    load_tokenizer(model, config.student).tokenizer.save_pretrained(folder)
    check_student(model, config.student).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("student", ["t5-tiny", "llama-tiny", "embedded"])
def test_it_writes_the_ids_that_the_students_own_does(student: str, tmp_path: Path) -> None:
    config = load_config(None, ["student.max_input_tokens=24"])
    if student == "embedded":
        model = str(embedded_student("smollm2-135m"))
    else:
        model = str(build_scratch(student, TEXTS, tmp_path / "model", seed=0))
    own = load_tokenizer(model, config.student)
    ours = load_run_tokenizer(saved(model, config, tmp_path / "tokenizer"), config.student)
    assert (ours.is_seq2seq, ours.end, ours.pad) == (own.is_seq2seq, own.end, own.pad)
    texts = [*TEXTS, "", "é 漢字 <b>\n\t", "What is " * 30]
    assert ours.prompts(EXPLAIN, texts) == own.prompts(EXPLAIN, texts)
    assert [ours.target(text, 9) for text in texts] == [own.target(text, 9) for text in texts]


def test_it_needs_no_torch(tmp_path: Path) -> None:
    config = load_config(None, [])
    folder = saved(str(build_scratch("t5-tiny", TEXTS, tmp_path / "model", seed=0)), config, tmp_path / "tokenizer")
    code = (
        "import sys; from qcrd_ray.config import load_config; from qcrd_ray.tasks.prompts import load_run_tokenizer;"
        f"load_run_tokenizer({folder!r}, load_config(None, []).student); sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
