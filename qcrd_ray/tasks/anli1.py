"""ANLI, round 1: inference over short encyclopedic texts, written to mislead."""

from __future__ import annotations

from qcrd_ray.tasks.nli import Inference


class Anli1(Inference):
    name = "anli1"
