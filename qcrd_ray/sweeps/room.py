"""How many trials a cluster has room for at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qcrd_ray.config import ExperimentConfig
from qcrd_ray.rationales.streaming import DATA_CPUS


@dataclass(frozen=True)
class Need:
    """What one worker or sampler takes, on a node with these labels."""

    resources: Mapping[str, float]
    labels: Mapping[str, str]


def needs_of(config: ExperimentConfig) -> list[Need]:
    """What a trial takes: its workers, its samplers, and a share of a CPU for its data."""
    train, sampler = config.train, config.sampler
    worker = Need({"CPU": train.cpus_per_worker, "GPU": train.gpus_per_worker}, train.node_labels)
    engine = Need({"CPU": sampler.cpus, "GPU": sampler.gpus}, sampler.node_labels)
    return [worker] * train.workers + [engine] * sampler.actors + [Need({"CPU": DATA_CPUS}, {})]


def concurrent_trials(config: ExperimentConfig) -> int:
    """Trials of this config that the cluster's nodes hold at once, as they are now; at least one.

    All of a trial's workers and samplers are placed together or not at all, so trials in a number that fits never wait
    for each other's resources.
    """
    import ray

    nodes = [(dict(node["Resources"]), dict(node.get("Labels") or {})) for node in ray.nodes() if node["Alive"]]
    return max(1, count_that_fit(needs_of(config), nodes))


def count_that_fit(needs: Sequence[Need], nodes: Sequence[tuple[dict[str, float], Mapping[str, str]]]) -> int:
    """How often `needs` fit on nodes of (resources, labels): the largest first, each on the first with room."""
    free = [(dict(resources), labels) for resources, labels in nodes]
    ordered = sorted(needs, key=lambda need: (-need.resources.get("GPU", 0.0), -need.resources.get("CPU", 0.0)))
    if not any(amount for need in needs for amount in need.resources.values()):
        return 1
    count = 0
    while all(_place(need, free) for need in ordered):
        count += 1
    return count


def _place(need: Need, free: list[tuple[dict[str, float], Mapping[str, str]]]) -> bool:
    for resources, labels in free:
        fits = all(resources.get(name, 0.0) + 1e-9 >= amount for name, amount in need.resources.items())
        if fits and all(labels.get(key) == value for key, value in need.labels.items()):
            for name, amount in need.resources.items():
                if amount:
                    resources[name] -= amount
            return True
    return False
