"""The sizing calculator against the modules, against DeepSpeed's estimator and against what workers really take."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qcrd_ray.config import load_config
from qcrd_ray.models.student import Item
from qcrd_ray.sampling.student_engine import engine_spec
from qcrd_ray.sizing import Machine, estimate
from qcrd_ray.sizing.__main__ import main
from qcrd_ray.sizing.estimate import model_states
from qcrd_ray.sizing.shapes import known_config, outline
from qcrd_ray.sizing.simulate import pass_memory, without_data

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "jobs" / "configs"
GIBIBYTE = 2**30


@pytest.mark.parametrize("workers", [1, 2, 8])
def test_model_states_are_those_of_deepspeed(workers: int) -> None:
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    trained, largest = 800_000_000, 40_000_000
    _, theirs = estimate_zero2_model_states_mem_needs(trained, workers, 1, cpu_offload=False)
    ours = model_states(trained, workers, 2, 2)
    # Theirs has the gradients a second time, in fp32, as they are while the optimizer steps.
    assert sum(ours.values()) + 4 * trained / workers == pytest.approx(theirs)
    _, theirs, _ = estimate_zero3_model_states_mem_needs(
        trained, largest, workers, 1, cpu_offload=False, cpu_offload_params=False, zero_init=False
    )
    ours = model_states(trained, workers, 3, 2)
    # Theirs has the gradients in fp32, and the largest layer gathered.
    assert sum(ours.values()) + 2 * trained / workers + 4 * largest == pytest.approx(theirs)


def test_without_data_counts_what_a_pass_really_allocates() -> None:
    from transformers import LlamaConfig, T5Config

    shapes = [
        T5Config(vocab_size=999, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, decoder_start_token_id=0),
        LlamaConfig(vocab_size=999, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4),
    ]
    items = [Item([5] * 40, [[6] * 20, [7] * 30]) for _ in range(3)]
    for shape in shapes:
        config = load_config(CONFIGS / "tiny.yaml", [])
        peaks = []
        with without_data():
            student = outline(config, shape, torch.float32)
            peaks.append(pass_memory(lambda: student(items), 150, backward=True).peak)
        student = outline(config, shape, torch.float32)
        assert sum(p.numel() for p in student.parameters()) > 0
        peaks.append(pass_memory(lambda: student(items), 150, backward=True).peak)
        assert peaks[0] == pytest.approx(peaks[1], rel=0.02), shape.model_type


@pytest.mark.parametrize(("name", "millions"), [("google-t5/t5-large", 737.7), ("Qwen/Qwen2.5-7B", 7615.6)])
def test_shapes_of_the_presets_have_the_published_numbers_of_parameters(name: str, millions: float) -> None:
    config = load_config(CONFIGS / "t5_large.yaml", [f"student.model={name}"])
    with without_data():
        student = outline(config, known_config(name, config.student), torch.bfloat16)
        assert sum(p.numel() for p in student.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)


@pytest.mark.slow
@pytest.mark.beside
@pytest.mark.parametrize("name", ["t5_large", "qwen2.5_0.5b", "qwen2.5_7b"])
def test_presets_say_what_the_calculator_says(name: str) -> None:
    file = CONFIGS / f"{name}.yaml"
    rows = re.findall(r"^#\s+(.*?)\s*\| (\d+) GiB\s*\| (\d+|none)\s*\|", file.read_text(), re.MULTILINE)
    assert len(rows) >= 3
    for keys, memory, number in rows if name == "qwen2.5_0.5b" else rows[-1:]:  # a large one takes long
        found = [*(key for key in keys.split() if "=" in key), "train.gpus_per_worker=1", "sampler.gpus=1"]
        machine, most = Machine(int(memory) * GIBIBYTE), 64 if number == "none" else int(number)
        enough = estimate(load_config(file, [*found, f"train.workers={most}"]), machine)
        assert (enough.worker.peak_bytes <= int(memory) * GIBIBYTE) == (number != "none"), (keys, memory)
        assert enough.sampler.peak_bytes <= int(memory) * GIBIBYTE
        if number not in ("1", "none"):
            fewer = estimate(load_config(file, [*found, f"train.workers={most // 2}"]), machine)
            assert fewer.worker.peak_bytes > int(memory) * GIBIBYTE, (keys, memory)


def test_adapters_leave_little_to_train_and_zero_partitions() -> None:
    full, adapted = (
        estimate(load_config(CONFIGS / "qwen2.5_7b.yaml", ["train.workers=4", *more]), Machine(80 * GIBIBYTE))
        for more in ([], ["student.lora.rank=16"])
    )
    assert adapted.trained < full.trained / 100
    assert adapted.parameters > full.parameters
    assert adapted.worker.parts["optimizer"] < full.worker.parts["optimizer"] / 100


def test_dropout_is_counted_as_training_applies_it() -> None:
    without, student, adapters = (
        estimate(
            load_config(CONFIGS / "tiny.yaml", ["student.model=scratch:llama-tiny", "student.lora.rank=4", *more]),
            lengths=(200, 40, 8),
        ).worker.parts["activations"]
        for more in ([], ["student.dropout=0.1"], ["student.lora.dropout=0.1"])
    )
    assert student > without
    assert adapters > without


@pytest.mark.parametrize("model", ["scratch:t5-tiny", "scratch:llama-tiny"])
def test_sampler_has_room_for_the_longest_sequence_of_its_engine(model: str) -> None:
    config = load_config(CONFIGS / "tiny.yaml", [f"student.model={model}", "evaluation.max_new_tokens=90"])
    sampler = estimate(config, lengths=(20, 10, 4)).sampler
    # 3 layers of keys and values of 4 or 2 heads of 32, fp32.
    token = 3 * 2 * 32 * 4 * (4 if model == "scratch:t5-tiny" else 2)
    spec = engine_spec(config)
    assert sampler.parts["cache"] == spec.max_sequences * spec.max_model_tokens * token


def test_command_prints_parts_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--config", str(CONFIGS / "qwen2.5_0.5b.yaml"), "--gpus", "2", "--gpu-memory", "1"]
    assert main([*arguments, "--lengths", "60,40,8"]) == 0
    text = capsys.readouterr().out
    for part in ("weights", "gradients", "optimizer", "activations", "snapshot", "does not fit"):
        assert part in text
    assert main([*arguments, "--json", "--lengths", "60,40,8"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] is False
    assert found["worker"]["peak_bytes"] == max(found["worker"]["phases"].values())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["student.model=nobody/nothing"], "no config.json of 'nobody/nothing'"),
        (["--gpus", "2"], "--gpu-memory is missing"),
        (["--gpus", "0", "--gpu-memory", "80"], "--gpus 0"),
        (["--lengths", "1,2"], "--lengths 1,2"),
        (["--gpu-memory", "-1"], "--gpu-memory -1"),
        (["train.worker=2"], "did you mean train.workers"),
        (["student.model=scratch:t6"], "scratch:t6 is unknown"),
    ],
)
def test_mistakes_are_told_in_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert said in line


def test_data_that_are_there_decide_the_lengths() -> None:
    found = estimate(load_config(CONFIGS / "tiny.yaml", ["train.workers=2"]))
    longest = estimate(load_config(CONFIGS / "tiny.yaml", ["train.workers=2"]), lengths=(1024, 48, 8))
    assert found.lengths == "the config's data"
    assert found.worker.peak_bytes < longest.worker.peak_bytes


@pytest.mark.slow
@pytest.mark.beside
def test_a_worker_takes_what_was_calculated(tmp_path: Path) -> None:
    """A scratch T5 at ZeRO 0, 2 and 3, two workers, in processes. (SmolLM2: benchmarks/memory.py.)"""
    file = tmp_path / "memory.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "memory.py"), "--quick", "--json", str(file)]
    subprocess.run(command, check=True, timeout=480, capture_output=True)
    ratios = json.loads(file.read_text())["ratios"]
    assert len(ratios) == 3
    for case, ratio in ratios.items():
        assert 0.85 <= ratio <= 1.15, (case, ratio)
