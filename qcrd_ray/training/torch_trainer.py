"""Ray Train's trainer without what this package has no use for. Imports torch."""

from __future__ import annotations

from typing import Any

from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

UNUSED = (DatasetsCallback, PlacementGroupCleanerCallback)
"""Each starts a process, which imports for seconds as the workers do: one to share out data sets, of which Ray Train is
given none, and one to remove a placement group of Ray Train's own, where workers are in the driver's."""


class LeanTrainer(TorchTrainer):
    def _create_default_callbacks(self) -> list[Any]:
        return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, UNUSED)]
