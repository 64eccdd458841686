"""Memory of a training worker and of a sampler, calculated from a config.

    python -m qcrd_ray.sizing --config jobs/configs/t5_large.yaml --gpu-memory 80 [--gpus N] [key=value ...]

Without --gpu-memory (and with train.gpus_per_worker=0) it is the memory on a CPU above that of an idle worker.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import NoReturn

from qcrd_ray.config import ExperimentConfig, load_config
from qcrd_ray.errors import UserError, find_user_error
from qcrd_ray.sizing.estimate import GIBIBYTE, MEBIBYTE, Machine, Sizing, estimate


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; options are written key=value, for example train.workers=4, see --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m qcrd_ray.sizing",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with keys of the config")
    parser.add_argument("--gpus", type=int, metavar="N", help="GPUs for training, one a worker: train.workers=N")
    parser.add_argument("--gpu-memory", type=float, metavar="GIB", help="memory of a GPU: size GPUs, and say what fits")
    parser.add_argument("--lengths", metavar="P,R,L", help="tokens of a prompt, a rationale and a label")
    parser.add_argument("--json", action="store_true", help="print one line of JSON, in bytes")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override a key of the config")
    return parser


def _lengths(text: str | None) -> tuple[int, int, int] | None:
    if text is None:
        return None
    try:
        prompt, rationale, label = (int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--lengths {text}: expected three numbers of tokens, for example 120,80,12") from None
    if min(prompt, rationale, label) < 1:
        raise UserError(f"--lengths {text}: expected numbers of 1 or more")
    return prompt, rationale, label


def sized(arguments: argparse.Namespace) -> tuple[ExperimentConfig, Sizing]:
    overrides = list(arguments.overrides)
    if arguments.gpus is not None:
        if arguments.gpus < 1:
            raise UserError(f"--gpus {arguments.gpus}: expected 1 or more")
        overrides.append(f"train.workers={arguments.gpus}")
    config = load_config(arguments.config, overrides)
    memory = arguments.gpu_memory
    if memory is not None and not config.train.gpus_per_worker:
        config = load_config(arguments.config, [*overrides, "train.gpus_per_worker=1", "sampler.gpus=1"])
    if memory is not None and memory <= 0:
        raise UserError(f"--gpu-memory {memory:g}: expected GiB above 0")
    if memory is None and (arguments.gpus is not None or config.train.gpus_per_worker):
        raise UserError("--gpu-memory is missing: the GiB of a GPU, for example --gpu-memory 80")
    lengths = _lengths(arguments.lengths)
    return config, estimate(config, Machine(None if memory is None else int(memory * GIBIBYTE)), lengths)


def report(config: ExperimentConfig, sizing: Sizing) -> str:
    memory = sizing.machine.memory
    where = "a CPU, above an idle worker" if memory is None else f"GPUs of {memory / GIBIBYTE:g} GiB"
    lines = [
        f"{config.student.model}: {sizing.parameters / 1e6:.1f} M parameters, {sizing.trained / 1e6:.1f} M trained, "
        f"{config.train.precision}",
        f"{config.train.workers} workers, ZeRO {config.train.zero_stage}, on {where}; lengths of {sizing.lengths}",
        "",
        f"{'MiB':12} {'worker':>10} {'sampler':>10}",
    ]
    worker, sampler = sizing.worker, sizing.sampler
    for name in dict.fromkeys([*worker.parts, *sampler.parts]):
        cells = [
            f"{part[name] / MEBIBYTE:10.1f}" if name in part else f"{'':10}" for part in (worker.parts, sampler.parts)
        ]
        lines.append(f"{name:12} {cells[0]} {cells[1]}")
    lines.append(f"{'peak':12} {worker.peak_bytes / MEBIBYTE:10.1f} {sampler.peak_bytes / MEBIBYTE:10.1f}")
    lines.append(f"{'in phase':12} {worker.phase:>10} {sampler.phase:>10}")
    if memory is not None:
        fits = ["fits" if e.peak_bytes <= memory else "does not fit" for e in (worker, sampler)]
        lines.append(f"{'':12} {fits[0]:>10} {fits[1]:>10}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported, which is not yet
    logging.disable(logging.WARNING)
    try:
        arguments = _parser().parse_intermixed_args(argv)
        config, sizing = sized(arguments)
    except Exception as error:
        told = find_user_error(error)
        if told is None:
            raise
        print(f"error: {told}", file=sys.stderr, flush=True)
        return 2
    if arguments.json:
        print(json.dumps({**asdict(sizing), "fits": sizing.fits, "peak_bytes": sizing.worker.peak_bytes}))
    else:
        print(report(config, sizing))
    return 0


if __name__ == "__main__":
    sys.exit(main())
