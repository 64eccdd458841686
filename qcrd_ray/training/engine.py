"""One module under DeepSpeed: several backward passes a step, full states in and out, whatever ZeRO stage holds them.

DeepSpeed's own checkpoints are pickles and tied to a number of workers. Here a state is gathered to plain tensors by
name (weights in fp32, Adam's two moments) and given back to any stage and any number of workers.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from qcrd_ray.config import TrainConfig
from qcrd_ray.errors import UserError

MOMENTS = ("exp_avg", "exp_avg_sq")
IN_CACHE = 2**18
"""Numbers that are taken together on a CPU."""


def import_deepspeed() -> ModuleType:
    """DeepSpeed. Its autotuner, which nothing here uses, imports mlflow where it is installed, and takes seconds."""
    hidden = "mlflow" not in sys.modules
    if hidden:
        sys.modules["mlflow"] = None  # type: ignore[assignment]  # an import of it fails, as where it is missing
    try:
        import deepspeed
    finally:
        if hidden:
            del sys.modules["mlflow"]
    return deepspeed


class TrainEngine:
    """A module, its AdamW and DeepSpeed.

    Every use of the module's parameters goes through `forward`. A step is any number of `backward` calls, the last
    with `last=True`, then `step`. All ranks make the same calls.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        lr: float,
        weight_decay: float,
        clip: float,
        zero_stage: int,
        precision: str,
        overrides: Mapping[str, Any] | None = None,
    ) -> None:
        deepspeed = import_deepspeed()
        # With bf16 the fp32 master weights live in ZeRO's optimizer; stage 0 has none, and stage 1 on one worker is it.
        self.stage = max(1, zero_stage) if precision == "bf16" else zero_stage
        self.clip = clip
        self.module = module.to(torch.bfloat16 if precision == "bf16" else torch.float32)
        self.parameters = [p for p in self.module.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(self.parameters, lr=lr, weight_decay=weight_decay, fused=True)
        settings: dict[str, Any] = {
            **(overrides or {}),
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": clip if self.stage else 0.0,  # there it is done here: DeepSpeed forgets the norm
            "bf16": {"enabled": precision == "bf16"},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 10**9,
        }
        settings["zero_optimization"] = {
            **dict((overrides or {}).get("zero_optimization", {})),
            "stage": self.stage,
            "stage3_gather_16bit_weights_on_model_save": True,
        }
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=self.module, optimizer=optimizer, config=settings, dist_init_required=False
        )
        alone = dist.get_world_size() == 1
        offloads = getattr(self.optimizer, "cpu_offload", False)
        on_cpu = next(self.module.parameters()).device.type == "cpu" and not offloads
        self._gives_gradients = self.stage == 1 and alone and on_cpu and not self.optimizer.overlap_comm
        if (self.stage == 0 and alone) or self._gives_gradients:
            # There is nobody to take a mean with, and DeepSpeed would copy all gradients there and back.
            self.engine.enable_backward_allreduce = False
        if self.stage in (1, 2):
            self.optimizer.get_grad_norm_direct = self._norm_of_partition
            if on_cpu:
                self._flat_gradients: dict[int, Tensor] = {}
                self.optimizer._get_preflattened_grad_partition = self._flat_gradient
        self.engine.train(True)  # a network that was loaded is in evaluation mode
        self.adam: torch.optim.AdamW = getattr(self.optimizer, "optimizer", self.optimizer)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.engine(*args, **kwargs)

    def train(self, mode: bool = True) -> None:
        self.engine.train(mode)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradients of `loss` to the step's. DeepSpeed takes the mean over ranks."""
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss)

    def step(self, lr: float) -> float:
        """Update the weights with this learning rate. Returns the norm of the gradient before it was clipped."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        for group in self.adam.param_groups:
            group["lr"] = lr
        self.engine.set_gradient_accumulation_boundary(True)
        if self._gives_gradients:
            for group, parameters in enumerate(self.optimizer.params_in_partition):
                gradients = [(self.optimizer.get_gradient_for_reduction(one), one) for one in parameters]
                self.optimizer.averaged_gradients[group] = [
                    torch.zeros_like(parameter) if gradient is None else gradient for gradient, parameter in gradients
                ]
        clipped = None if self.stage else torch.nn.utils.clip_grad_norm_(self.parameters, self.clip or float("inf"))
        self.engine.step()
        norm = self.engine.get_global_grad_norm() if self.stage else clipped
        return float(norm) if norm is not None else float("nan")

    def _norm_of_partition(self, gradients: Iterable[Tensor], _: Any, norm_type: float = 2) -> Tensor:
        """The gradient's norm over all ranks, -1 where it is not finite, in DeepSpeed's place.

        DeepSpeed copies every gradient into float64, which takes longer than AdamW does. Here sums over pieces are in
        float32, and added up in float64.
        """
        squares = [_sum_of_squares(g) for g in gradients if not getattr(g, "_zero_padding", False)]
        total = torch.stack(squares).sum() if squares else torch.zeros((), dtype=torch.float64)
        total = total.float().to(self.optimizer.device)
        dist.all_reduce(total, group=self.optimizer.dp_process_group)
        norm = total.sqrt()
        return torch.where(torch.isfinite(norm), norm, -1.0)

    def _flat_gradient(self, group: int) -> Tensor:
        """The gradient of this rank's partition of a group, flat, in the masters' precision, in DeepSpeed's place.

        DeepSpeed makes it anew each step, twice. On a CPU that is fresh memory of the system, and clearing it takes
        longer than AdamW does. Here the memory is kept, and written once.
        """
        masters = self.optimizer.single_partition_of_fp32_groups[group]
        if group not in self._flat_gradients:
            self._flat_gradients[group] = torch.zeros_like(masters)
        flat, place = self._flat_gradients[group], 0
        for gradient in self.optimizer.averaged_gradients[group]:
            flat[place : place + gradient.numel()].copy_(gradient.flatten())
            place += gradient.numel()
        flat[place:].zero_()
        return flat

    # States

    def weights(self) -> dict[str, Tensor] | None:
        """The module's weights as they are used: on rank 0, else None. A collective under ZeRO-3.

        They may share their memory with the module's own.
        """
        if self.stage == 3:
            state = self.engine._zero3_consolidated_16bit_state_dict()
            return None if state is None else {name: value.contiguous() for name, value in state.items()}
        if dist.get_rank() != 0:
            return None
        return {name: value.detach() for name, value in self.module.state_dict().items()}

    def full_state(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """(name, {"weight", "exp_avg", "exp_avg_sq"}) of each parameter, fp32, whole. All ranks iterate."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        for name, parameter in self.module.named_parameters():
            if not parameter.requires_grad:
                continue
            if self.stage == 0:
                state = self.adam.state[parameter]
                tensors = {"weight": parameter.detach(), **{key: state[key] for key in MOMENTS}}
            else:
                tensors = {"weight": safe_get_full_fp32_param(parameter)}
                tensors.update({key: safe_get_full_optimizer_state(parameter, key) for key in MOMENTS})
            yield name, {key: value.detach().float().cpu().contiguous() for key, value in tensors.items()}

    def load_full_state(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """Take back what `full_state` gave, under keys `name/weight` and so on, after `step` updates.

        The module itself must have been built from the same weights: only the fp32 masters and the moments are set.
        """
        flat = self._flat_partitions()
        for group in flat.values():
            state = self.adam.state[group]
            state["step"] = torch.tensor(float(step))
            for key in MOMENTS:
                state.setdefault(key, torch.zeros_like(group))
        with torch.no_grad():
            for name, parameter in self.module.named_parameters():
                if not parameter.requires_grad:
                    continue
                for key in ("weight", *MOMENTS):
                    self._set(parameter, flat, key, tensors[f"{name}/{key}"])

    def _flat_partitions(self) -> dict[int, Tensor]:
        """The tensors that Adam updates on this rank, by an index that `_set` knows."""
        if self.stage == 0:
            return {id(parameter): parameter for parameter in self.parameters}
        if self.stage == 3:
            return dict(enumerate(self.optimizer.fp32_partitioned_groups_flat))
        return dict(enumerate(self.optimizer.single_partition_of_fp32_groups))

    def _set(self, parameter: nn.Parameter, flat: dict[int, Tensor], key: str, value: Tensor) -> None:
        def stored(tensor: Tensor) -> Tensor:
            return tensor if key == "weight" else self.adam.state[tensor][key]

        value = value.to(torch.float32)
        if self.stage == 0:
            stored(parameter).copy_(value)
        elif self.stage == 3:
            group, start, size = self.optimizer.grad_position[self.optimizer.get_param_id(parameter)]
            rank, whole = dist.get_rank(), value.flatten()
            part = whole[rank * size : (rank + 1) * size].to(flat[group].device)
            stored(flat[group]).narrow(0, start, part.numel()).copy_(part)
        elif parameter._hp_mapping is not None:  # type: ignore[attr-defined]
            mapping = parameter._hp_mapping  # type: ignore[attr-defined]
            group = next(
                index for index, group in enumerate(self.optimizer.bit16_groups) if any(p is parameter for p in group)
            )
            source, place = mapping.lp_fragment_address, mapping.hp_fragment_address
            part = value.flatten().narrow(0, source.start, source.numel).to(flat[group].device)
            stored(flat[group]).narrow(0, place.start, place.numel).copy_(part)


def _sum_of_squares(gradient: Tensor) -> Tensor:
    """Float64, of a gradient in any precision. On a CPU piece by piece, each small enough for its cache."""
    flat = gradient.detach().flatten()
    pieces = flat.split(IN_CACHE) if flat.is_cpu else [flat]
    return torch.stack([piece.float().square().sum() for piece in pieces]).double().sum()


# Keys of a DeepSpeed JSON that the config decides, and where.
_DECIDED = {
    "train_batch_size": "train.batch_size",
    "train_micro_batch_size_per_gpu": "train.batch_size",
    "gradient_accumulation_steps": "train.tokens_per_pass",
    "gradient_clipping": "optim.clip",
    "optimizer": "optim.lr and optim.weight_decay",
    "scheduler": "optim.warmup_steps",
}


def read_deepspeed_json(config: TrainConfig, clip: float) -> dict[str, Any]:
    """The DeepSpeed settings of `train.deepspeed`, checked against the config.

    Raises:
        UserError: missing, no JSON object, or it says something else than the config.
    """
    if config.deepspeed is None:
        return {}
    path = Path(config.deepspeed)
    where = f"config key train.deepspeed: {path}"
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{where}: not found; expected a DeepSpeed JSON, such as those in jobs/deepspeed/") from None
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{where}: no valid JSON: {error}") from None
    if not isinstance(settings, dict):
        raise UserError(f"{where}: expected a JSON object, found {type(settings).__name__}")
    stage = settings.get("zero_optimization", {}).get("stage", config.zero_stage)
    if stage != config.zero_stage:
        raise UserError(f"{where}: zero_optimization.stage is {stage}, but train.zero_stage is {config.zero_stage}")
    bf16 = settings.get("bf16", {}).get("enabled", config.precision == "bf16")
    if bf16 != (config.precision == "bf16"):
        raise UserError(f"{where}: bf16.enabled is {bf16}, but train.precision is {config.precision}")
    if settings.get("fp16", {}).get("enabled"):
        raise UserError(f"{where}: fp16.enabled is true; T5 overflows in fp16, train.precision is bf16 or fp32")
    for key, owner in _DECIDED.items():
        value = settings.get(key, "auto")
        if value != "auto" and not (key == "gradient_clipping" and float(value) == clip):
            raise UserError(f'{where}: {key} is decided by {owner}; remove it or set it to "auto"')
    return {key: value for key, value in settings.items() if key not in _DECIDED}
