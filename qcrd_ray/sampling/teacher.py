"""Which teacher a config asks for, and the tables that its samples make."""

from __future__ import annotations

from pathlib import Path

from qcrd_ray.config import ExperimentConfig
from qcrd_ray.errors import UserError
from qcrd_ray.rationales import tables
from qcrd_ray.rationales.counts import Counts
from qcrd_ray.sampling.scripted import ScriptedTeacher


def make_teacher(config: ExperimentConfig) -> tables.Teacher | None:
    """The teacher that is asked, None where recorded samples are read.

    Raises:
        UserError: an engine that does not go with the task or with the source.
    """
    if config.teacher.engine == "scripted":
        return ScriptedTeacher(config)
    if config.data.path and config.data.path.startswith("generated:") and config.uses_rationales:
        raise UserError(f"data.path={config.data.path} has no recorded samples; set teacher.engine=scripted")
    return None


def prepare_tables(config: ExperimentConfig, output: Path) -> Counts:
    """Write the tables of `rationales.tables.prepare_tables` with the config's teacher, or reuse them."""
    return tables.prepare_tables(config, output, make_teacher(config))
