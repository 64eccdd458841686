"""Peak memory of a training worker on a CPU, measured, against what `python -m qcrd_ray.sizing` says beforehand.

    python benchmarks/memory.py [--quick] [--case tiny/2 ...] [--through ray] [--json FILE]

A case is a preset (`tiny`: the scratch T5, `llama`: the same config with the scratch Llama, `smollm2`) at a ZeRO
stage, trained for a few steps by two workers. Measured is the peak of a worker's resident
set (VmHWM in /proc/self/status) above that of the same process when it was idle: the training loop and the libraries
imported, the process group up, no model. The larger of the two workers counts.

* `--through processes` (the default): two processes in a gloo group go through what a worker allocates: student,
  engine, judge and its pretraining, a snapshot, steps with negatives of the config's full length, a checkpoint.
* `--through ray`: `jobs/train.py` itself, with Ray Train's workers, a sampler and the driver.

Metrics: `predicted` and `measured` in MiB; ratios `predicted_over_measured/<case>`.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from figures import figure, write_figures

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "jobs" / "configs"
FEW_QUESTIONS = ["data.generated.train=64", "data.generated.valid=4", "data.generated.test=4"]
PRESETS = {
    "tiny": ("tiny.yaml", []),
    "llama": ("tiny.yaml", ["student.model=scratch:llama-tiny"]),
    "smollm2": (
        "quickstart.yaml",
        [*FEW_QUESTIONS, "train.max_steps=6", "train.iteration_steps=2", "train.checkpoint_interval=3",
         "judge.pretrain_steps=3", "negatives.lag=1", "sampler.engine=transformers"],
    ),
}  # fmt: skip
STAGES = (0, 2, 3)
WORKERS = 2
MEBIBYTE = 2**20


def status(key: str) -> int:
    """A size of this process in bytes: VmHWM (peak resident set), VmRSS."""
    with open("/proc/self/status", encoding="ascii") as file:
        for line in file:
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    raise KeyError(key)


def import_everything() -> None:
    """Import what training uses. What libraries import by themselves when they start is counted as training's."""
    import deepspeed  # noqa: F401
    import ray.data
    from deepspeed.runtime.zero import stage3  # noqa: F401
    from ray.data.datasource import Datasource, ReadTask  # noqa: F401
    from transformers import BertModel, LlamaForCausalLM, T5ForConditionalGeneration  # noqa: F401

    import qcrd_ray.training.loop  # noqa: F401

    assert ray.data


# Two processes


def worker(rank: int, world: int, port: int, config_file: str, root: str) -> None:
    """What a worker of a run allocates, in the order of `qcrd_ray.training.loop`; writes its sizes to a file."""
    import_everything()
    import torch.distributed as dist

    from qcrd_ray.config import load_config
    from qcrd_ray.models.discriminator import Discriminator
    from qcrd_ray.models.named import local_model
    from qcrd_ray.rationales.streaming import StepBatch, StreamSpec, TrainingRow, read_steps
    from qcrd_ray.run_folder import INITIAL_JUDGE, RunFolder
    from qcrd_ray.sampling.negatives import Negative
    from qcrd_ray.training import loop
    from qcrd_ray.training.checkpoint import Progress, build_student, save_checkpoint
    from qcrd_ray.training.judge import OnlineJudge
    from qcrd_ray.training.snapshots import SnapshotPublisher
    from qcrd_ray.training.step import candidates, train_on_batch

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    idle = status("VmRSS")

    config = load_config(config_file)
    run = RunFolder(root, config.run_name)
    loop._set_up_process(config)
    model = local_model(run, config.student.model)
    student = build_student(model, config.student, loop._dtype(config), None)
    engine = loop._student_engine(student, config)
    judge = OnlineJudge(Discriminator.load(run.get_folder(INITIAL_JUDGE)), config) if config.judge.enabled else None
    publisher = SnapshotPublisher(run, config, engine, student, model, lambda: None)
    publisher.publish(0, 0, lambda number, folder, digest: None)
    if judge:
        judge.pretrain(run, rank, world)
    spec = StreamSpec(run, config, rank, world)
    length = min(
        config.negatives.max_tokens or config.student.max_rationale_tokens, config.student.max_rationale_tokens
    )
    negative = Negative([5] * length, "1 + 1 is 2. " * (length // 12 + 1), 1)
    progress = Progress(0)
    for step in range(config.train.max_steps):
        [record] = read_steps([step], spec).to_pylist()
        rows = [TrainingRow(**row) for row in record.pop("rows")]
        batch = StepBatch(rows=rows, **record)
        found = candidates(config, rows, [[negative] * config.sampled_negatives] * len(rows))
        train_on_batch(engine, config, batch, found, judge)
        engine.step(config.optim.lr)
        if (step + 1) % config.train.iteration_steps == 0:
            publisher.publish(step + 1, step + 1, lambda number, folder, digest: None)
            loop._update_judge(config, loop.Schedule.of(config), judge, step + 1, found)
        if (step + 1) % config.train.checkpoint_interval == 0:
            publisher.wait()
            save_checkpoint(run, engine, student, judge, progress, config.train.checkpoints_kept, lambda: None)
    publisher.wait()
    write_sizes(Path(root), rank, idle)
    dist.barrier()
    dist.destroy_process_group()


def write_sizes(folder: Path, rank: int, idle: int) -> None:
    (folder / f"sizes-{rank}.json").write_text(json.dumps({"idle": idle, "peak": status("VmHWM")}))


def through_processes(overrides: list[str], file: Path, folder: Path) -> None:
    from qcrd_ray.config import config_to_yaml, load_config
    from qcrd_ray.run_folder import DATA, RunFolder
    from qcrd_ray.sampling.teacher import prepare_tables
    from qcrd_ray.training.initial_models import write_models

    config = load_config(file, [*overrides, f"run.storage_path={folder}"])
    run = RunFolder(str(folder), config.run_name)
    run.create()
    prepare_tables(config, run.working_folder(DATA))
    write_models(config, run)
    resolved = folder / "config.yaml"
    resolved.write_text(config_to_yaml(config))
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    command = [sys.executable, __file__, "--worker"]
    workers = [
        subprocess.Popen([*command, str(rank), str(WORKERS), str(port), str(resolved), str(folder)],
                         stdout=sys.stderr, env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"})
        for rank in range(WORKERS)
    ]  # fmt: skip
    codes = [process.wait() for process in workers]
    if any(codes):
        raise SystemExit("a worker failed; its error is above")


# Ray


def through_ray(overrides: list[str], file: Path, folder: Path) -> None:
    from qcrd_ray.config import load_config
    from qcrd_ray.training import fit
    from qcrd_ray.training.trainer import train

    def measured(settings: dict[str, Any]) -> None:
        import torch.distributed as dist

        from qcrd_ray.training.loop import train_worker

        import_everything()
        idle = status("VmRSS")
        train_worker(settings["spec"])
        write_sizes(folder, dist.get_rank(), idle)

    fit._train_loop = measured  # sent to the workers by value, as this script is no module
    train(load_config(file, [*overrides, f"run.storage_path={folder}", "run.name=memory"]))


def measure(preset: str, stage: int, through: str) -> tuple[int, int]:
    """(predicted, measured) bytes above the idle worker."""
    from qcrd_ray.config import load_config
    from qcrd_ray.sizing import estimate

    name, overrides = PRESETS[preset]
    overrides = [*overrides, f"train.workers={WORKERS}", f"train.zero_stage={stage}"]
    predicted = estimate(load_config(CONFIGS / name, overrides)).worker.peak_bytes
    with tempfile.TemporaryDirectory(prefix="memory-", ignore_cleanup_errors=True) as place:
        folder = Path(place)
        (through_ray if through == "ray" else through_processes)(overrides, CONFIGS / name, folder)
        sizes = [json.loads(file.read_text()) for file in folder.glob("sizes-*.json")]
    return predicted, max(size["peak"] - size["idle"] for size in sizes)


def rows(case: str, values: dict[str, float], unit: str) -> Iterator[dict[str, Any]]:
    for metric, value in values.items():
        yield figure(case, metric, [value], unit)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = [f"{preset}/{stage}" for preset in PRESETS for stage in STAGES]
    parser.add_argument("--case", action="append", choices=known, help="preset/ZeRO stage; default: all of them")
    parser.add_argument("--through", choices=("processes", "ray"), default="processes")
    parser.add_argument(
        "--quick", action="store_true", help="the scratch T5 only, which the calculator's constants were set from"
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--worker", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        rank, world, port, config_file, root = arguments.worker
        # As in Ray Train, beside the main thread: malloc keeps another heap for each thread.
        with ThreadPoolExecutor(1) as thread:
            thread.submit(worker, int(rank), int(world), int(port), config_file, root).result()
        return
    cases = arguments.case or [case for case in known if not arguments.quick or case.startswith("tiny")]
    found: list[dict[str, Any]] = []
    ratios: dict[str, float] = {}
    print(f"{'case':12} {'predicted':>10} {'measured':>10} {'ratio':>6}   MiB above an idle worker", flush=True)
    for case in cases:
        preset, stage = case.split("/")
        predicted, measured = measure(preset, int(stage), arguments.through)
        ratios[f"predicted_over_measured/{case}"] = predicted / measured
        values = {"predicted": predicted / MEBIBYTE, "measured": measured / MEBIBYTE}
        found += rows(case, values, "MiB")
        print(
            f"{case:12} {values['predicted']:10.0f} {values['measured']:10.0f} {predicted / measured:6.2f}", flush=True
        )
    write_figures(arguments.json, found, ratios)


if __name__ == "__main__":
    main()
