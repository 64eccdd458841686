"""How much memory a training worker and a sampler take, from the config alone: no weights are loaded."""

from qcrd_ray.sizing.estimate import Estimate, Machine, Sizing, estimate

__all__ = ["Estimate", "Machine", "Sizing", "estimate"]
