"""e-SNLI: inference over captions of photographs."""

from __future__ import annotations

from qcrd_ray.tasks.nli import Inference


class Esnli(Inference):
    name = "esnli"
