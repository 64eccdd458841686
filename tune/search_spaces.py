"""The paper's grids as named spaces, for `python tune/sweep.py --space NAME`.

Two names are crossed: `--space positives_m --space negatives_k` runs every m with every k.
"""

from __future__ import annotations

from typing import Any

from qcrd_ray.sweeps.space import Axis, Choice


def _over(key: str, values: list[Any]) -> tuple[Choice, ...]:
    return tuple(Choice(str(value), {key: value}) for value in values)


def _modules(names: str) -> Choice:
    """A row of table 4: extension and denoising (ED), negative knowledge (NK), quality judge (QJ), on where named."""
    return Choice(
        names or "none",
        {
            **({} if "ED" in names else {"positives": "first"}),
            **({} if "NK" in names else {"negatives.source": "none"}),
            **({} if "QJ" in names else {"judge.enabled": False}),
        },
    )


SPACES: dict[str, tuple[Axis, ...]] = {
    "methods": (
        Axis("method", "method", _over("method", ["finetune", "single_task", "dss", "mi", "qcrd", "mi+qcrd"]), "qcrd",
             "tables 1 and 2, appendix table 5"),
    ),
    "labels": (
        Axis(
            "labels",
            "what the label task learns",
            (
                Choice("dss, teacher_sample", {"method": "dss", "labels": "teacher_sample"}),
                Choice("mi, teacher_sample", {"method": "mi", "labels": "teacher_sample"}),
                Choice("qcrd, teacher_vote", {"method": "qcrd", "labels": "teacher_vote"}),
                Choice("dss, gold", {"method": "dss", "labels": "gold"}),
                Choice("qcrd, gold", {"method": "qcrd", "labels": "gold"}),
            ),
            "qcrd, teacher_vote",
            "table 3",
        ),
    ),
    "positives_m": (
        Axis("m", "m, the teacher's samples", _over("teacher.samples", [1, 5, 10, 20]), "5", "table 6"),
    ),
    "negatives_k": (
        Axis("k", "k, negatives a question", _over("negatives.count", [0, 1, 2, 3]), "1", "table 6"),
    ),
    "temperature": (
        Axis("tau", "τ, temperature of the negatives", _over("negatives.temperature", [0.0, 0.7, 1.5, 2.0]), "1.5",
             "appendix table 6"),
    ),
    "negative_source": (
        Axis(
            "source",
            "where the negatives come from",
            (
                *(Choice(f"j={lag}", {"negatives.source": "lagged", "negatives.lag": lag}) for lag in (3, 5, 10)),
                Choice("fixed", {"negatives.source": "fixed"}, pretrained={"method": "dss"}),
                Choice("self_consistency", {"negatives.source": "self_consistency"}),
            ),
            "j=5",
            "appendix table 3",
        ),
    ),
    "schemes": (
        Axis("scheme", "many-to-one scheme",
             _over("scheme", ["min_max", "max_min", "sampling", "mean", "weighted_mean"]), "min_max", "table 5"),
    ),
    "ablations": (
        Axis("modules", "modules in use", tuple(map(_modules, ["", "ED", "ED+NK", "ED+NK+QJ"])), "ED+NK+QJ", "table 4"),
    ),
    "ablations_all": (
        Axis(
            "modules",
            "modules in use",
            tuple(map(_modules, ["", "ED", "NK", "QJ", "ED+NK", "ED+QJ", "NK+QJ", "ED+NK+QJ"])),
            "ED+NK+QJ",
            "table 4, every combination",
        ),
    ),
    "data_share": (
        Axis("method", "method", _over("method", ["finetune", "qcrd"]), "qcrd", "figure 4"),
        Axis("share", "share of the training data", _over("data.share", [0.125, 0.25, 0.5, 0.75, 1.0]), "1.0",
             "figure 4"),
    ),
}  # fmt: skip
