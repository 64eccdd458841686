"""What a training run starts from: the student, its tokenizer, the discriminator, written once."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

from qcrd_ray.config import ExperimentConfig
from qcrd_ray.models.discriminator import build_discriminator
from qcrd_ray.models.named import check_student, local_model
from qcrd_ray.rationales.tables import open_rationale_table
from qcrd_ray.run_folder import FIXED_STUDENT, INITIAL_JUDGE, MANIFEST, SCRATCH_STUDENT, TOKENIZER, RunFolder
from qcrd_ray.sampling.snapshot import DESCRIPTION
from qcrd_ray.tasks.prompts import load_tokenizer


def write_models(config: ExperimentConfig, run: RunFolder) -> None:
    """What workers and samplers start from, written once so that all of them start from the same."""
    source = config.student.model
    if source.startswith("scratch:") and not run.has_folder(SCRATCH_STUDENT):
        from qcrd_ray.models.scratch import write_scratch

        with run.new_folder(SCRATCH_STUDENT) as folder:
            write_scratch(source.removeprefix("scratch:"), task_texts(config, run), folder, config.train.seed)
    model = local_model(run, source)
    if not run.has_folder(TOKENIZER):
        tokenizer = load_tokenizer(model, config.student).tokenizer
        hub_config = check_student(model, config.student)
        with run.new_folder(TOKENIZER) as folder:
            tokenizer.save_pretrained(folder)
            hub_config.save_pretrained(folder)
    if config.negatives.source.startswith("fixed") and not run.has_folder(FIXED_STUDENT):
        with run.new_folder(FIXED_STUDENT) as folder:
            # The probe of another run's snapshot says nothing about this run's.
            ours = shutil.ignore_patterns(DESCRIPTION, MANIFEST)
            shutil.copytree(config.negatives.checkpoint or "", folder, ignore=ours, dirs_exist_ok=True)
    if uses_judge(config) and not run.has_folder(INITIAL_JUDGE):
        discriminator = build_discriminator(config.judge, seed=config.train.seed, texts=task_texts(config, run))
        run.write_folder(INITIAL_JUDGE, discriminator.save)


def task_texts(config: ExperimentConfig, run: RunFolder, limit: int = 2000) -> Iterator[str]:
    """Questions, labels and first samples of the first rows of the training table: what all methods have in common."""
    from qcrd_ray.tasks import get_task
    from qcrd_ray.tasks.prompts import EXPLAIN, PREDICT

    task = get_task(config)
    for record in open_rationale_table(run.table("train")).slice(0, limit).to_pylist():
        text = task.student_input(record["question"], record["choices"])
        yield from (f"{PREDICT} {text}\n", f"{EXPLAIN} {text}\n", record["label"], record["sample0"])


def uses_judge(config: ExperimentConfig) -> bool:
    return config.judge.enabled and config.is_contrastive
