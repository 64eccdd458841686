"""Low-rank adapters against peft itself: what is trained, what is written, and what goes on from a checkpoint."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from qcrd_ray.config import StudentConfig, config_from_dict
from qcrd_ray.errors import UserError
from qcrd_ray.models.lora import ADAPTER, check_lora
from qcrd_ray.models.scratch import SCRATCH_MODELS, build_scratch
from qcrd_ray.models.student import Item, Student, load_student
from qcrd_ray.run_folder import RunFolder
from qcrd_ray.training.checkpoint import (
    Progress,
    build_student,
    checkpoint_name,
    network_state,
    restore_optimizer,
    save_checkpoint,
)
from qcrd_ray.training.engine import TrainEngine
from qcrd_ray.training.snapshots import SnapshotPublisher

ROOT = Path(__file__).parents[2]
ITEMS = [Item([5, 6, 7, 8], [[9, 10, 1], [11, 1]]), Item([12, 13], [[14, 15, 16, 1]])]
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("scratch")
    texts = [f"{a} apples and {b} pears are {a + b} pieces of fruit" for a in range(20) for b in range(20)]
    return {name: build_scratch(name, texts, folder / name, seed=0) for name in SCRATCH_MODELS}


def config_of(model: object, **lora: Any) -> StudentConfig:
    return StudentConfig.model_validate({"model": str(model), "lora": {"rank": 4, "alpha": 8, **lora}})


def make_student(folder: Path, precision: str = "fp32", seed: int = 0, **lora: Any) -> Student:
    torch.manual_seed(seed)
    return build_student(str(folder), config_of(folder, **lora), PRECISIONS[precision], None)


def make_engine(student: Student, stage: int = 0, precision: str = "fp32") -> TrainEngine:
    return TrainEngine(student, lr=1e-2, weight_decay=0.0, clip=1.0, zero_stage=stage, precision=precision)


def train(engine: TrainEngine, steps: range) -> list[float]:
    losses = []
    for step in steps:
        torch.manual_seed(step)
        loss = engine.forward(ITEMS).mean()
        engine.backward(loss, last=True)
        engine.step(1e-2)
        losses.append(float(loss.detach()))
    return losses


def make_run(folder: Path) -> RunFolder:
    run = RunFolder(str(folder), "run", patience_s=1.0)
    run.create()
    return run


def publish(engine: TrainEngine, student: Student, folder: Path) -> Path:
    """The student as samplers get it."""
    run = make_run(folder)
    config = config_from_dict({"method": "dss"})
    publisher = SnapshotPublisher(run, config, engine, student, "", lambda: None)
    publisher.publish(1, 0, lambda *_: None)
    publisher.wait()
    return run.get_folder(run.snapshot(1))


@pytest.mark.parametrize("name", SCRATCH_MODELS)
@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (3, "fp32"), (2, "bf16")])
def test_a_snapshot_is_what_peft_merges(
    name: str, stage: int, precision: str, scratch: dict[str, Path], one_rank: None, tmp_path: Path
) -> None:
    from peft import PeftModel

    student = make_student(scratch[name], precision)
    engine = make_engine(student, stage, precision)
    losses = train(engine, range(8))
    assert losses[-1] < losses[0] - 0.1
    snapshot = publish(engine, student, tmp_path)

    plain = load_student(str(snapshot), StudentConfig(), PRECISIONS[precision])
    base = load_student(str(scratch[name]), StudentConfig(), PRECISIONS[precision])
    merged = PeftModel.from_pretrained(copy.deepcopy(base.model), snapshot / ADAPTER).merge_and_unload()
    theirs, ours = merged.state_dict(), plain.model.state_dict()
    assert theirs.keys() == ours.keys() == base.model.state_dict().keys()
    changed = {key for key, value in base.model.state_dict().items() if not torch.equal(value, ours[key])}
    assert changed == {f"{n}.weight" for n, m in base.model.named_modules() if isinstance(m, nn.Linear)} - {
        "lm_head.weight"
    }
    tolerance = 1e-6 if precision == "fp32" else 1e-3
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, atol=tolerance, rtol=tolerance)
    ids = torch.tensor([[5, 6, 7]])
    decoder = {"decoder_input_ids": ids} if student.is_seq2seq else {}
    with torch.no_grad():
        logits = plain.model.eval()(input_ids=ids, **decoder).logits
        expected = merged.eval()(input_ids=ids, **decoder).logits
    torch.testing.assert_close(logits, expected, atol=10 * tolerance, rtol=10 * tolerance)
    # Tied embeddings are in the file once.
    stored = load_file(snapshot / "model.safetensors")
    assert sum(value.shape == base.model.lm_head.weight.shape for value in stored.values()) == 1


@pytest.mark.parametrize("name", SCRATCH_MODELS)
def test_only_adapters_are_trained_and_the_untouched_student_is_itself(
    name: str, scratch: dict[str, Path], one_rank: None
) -> None:
    base = load_student(str(scratch[name]), StudentConfig())
    student = make_student(scratch[name])
    linear = [m for n, m in base.model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    expected = sum(4 * (module.in_features + module.out_features) for module in linear)
    engine = make_engine(student)
    assert sum(p.numel() for p in engine.parameters) == expected
    torch.testing.assert_close(student.eval()(ITEMS), base.eval()(ITEMS), atol=1e-5, rtol=0)

    before = base.state_dict()
    train(engine, range(2))
    assert {p for p in student.parameters() if p.grad is not None} <= set(engine.parameters)
    assert len(list(engine.full_state())) == 2 * len(linear)
    for key, value in student.state_dict().items():
        if ".lora_" not in key:
            assert torch.equal(value, before[key.replace(".base_layer.", ".")]), key


def test_the_seed_decides_where_adapters_start(scratch: dict[str, Path]) -> None:
    def start(seed: int) -> torch.Tensor:
        student = make_student(scratch["llama-tiny"], seed=seed)
        return torch.cat([p.detach().flatten() for p in student.parameters() if p.requires_grad])

    assert torch.equal(start(1), start(1))
    assert not torch.equal(start(1), start(2))


def test_targets_choose_the_layers(scratch: dict[str, Path]) -> None:
    student = make_student(scratch["llama-tiny"], targets=["layers.1.mlp.up_proj", "q_proj"])
    trained = {name.split(".lora_")[0] for name, p in student.named_parameters() if p.requires_grad}
    layers = {f"model.model.layers.{n}.self_attn.q_proj" for n in range(3)}
    assert trained == {*layers, "model.model.layers.1.mlp.up_proj"}


@pytest.mark.parametrize(
    ("model", "target", "expected"),
    [
        ("scratch:t5-tiny", "q_proj", "no layer 'q_proj'; the linear layers of scratch:t5-tiny are k, o, q, v, wi_0"),
        ("scratch:t5-tiny", "shared", "'shared' is no torch.nn.Linear but Embedding"),
        ("scratch:llama-tiny", "lm_head", "'lm_head' shares its weight with the embedding"),
    ],
)
def test_a_target_that_cannot_be_is_named(model: str, target: str, expected: str) -> None:
    with pytest.raises(UserError) as raised:
        check_lora(config_of(model, targets=[target]))
    assert expected in str(raised.value)
    assert "\n" not in str(raised.value)


def test_layers_of_another_kind_get_no_adapters(tmp_path: Path) -> None:
    from transformers import GPT2Config

    GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no torch.nn.Linear"):
        check_lora(config_of(tmp_path))
    with pytest.raises(UserError, match="Conv1D"):
        check_lora(config_of(tmp_path, targets=["c_attn"]))


def test_peft_is_asked_for_where_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    check_lora(config_of("scratch:t5-tiny", rank=0))
    with pytest.raises(UserError, match=r'pip install "qcrd_ray\[lora\]"'):
        check_lora(config_of("scratch:t5-tiny"))


@pytest.mark.parametrize("name", SCRATCH_MODELS)
def test_recomputed_activations_give_the_same_gradients(name: str, scratch: dict[str, Path]) -> None:
    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        config = config_of(scratch[name]).model_copy(update={"gradient_checkpointing": checkpointing})
        torch.manual_seed(0)
        student = build_student(str(scratch[name]), config, torch.float32, None).train()
        with torch.no_grad():
            for key, parameter in student.named_parameters():
                if ".lora_B" in key:
                    parameter.normal_(std=0.02)
        recomputed = 0

        def count(*_: Any) -> None:
            nonlocal recomputed
            recomputed += 1

        first = next(m for m in student.modules() if type(m).__name__ in ("T5LayerFF", "LlamaDecoderLayer"))
        first.register_forward_pre_hook(count)
        student(ITEMS).mean().backward()
        assert recomputed == (2 if checkpointing else 1)
        return {key: p.grad for key, p in student.named_parameters() if p.requires_grad and p.grad is not None}

    plain, checkpointed = gradients(False), gradients(True)
    assert plain.keys() == checkpointed.keys()
    for key, gradient in plain.items():
        assert gradient.abs().max() > 0, key
        torch.testing.assert_close(checkpointed[key], gradient, atol=1e-5, rtol=1e-3)


def test_dropout_of_adapters_is_of_training_only(scratch: dict[str, Path], one_rank: None) -> None:
    student = make_student(scratch["llama-tiny"], dropout=0.5)
    assert student.has_dropout
    assert not make_student(scratch["llama-tiny"]).has_dropout
    engine = make_engine(student)
    train(engine, range(1))  # B is no longer 0
    with torch.no_grad():
        assert not torch.equal(engine.forward(ITEMS), engine.forward(ITEMS))
        engine.train(False)
        assert torch.equal(engine.forward(ITEMS), engine.forward(ITEMS))


def checkpoint(engine: TrainEngine, student: Student, run: RunFolder, step: int) -> Path:
    save_checkpoint(run, engine, student, None, Progress(step=step), keep=2, fence=lambda: None)
    return run.get_folder(checkpoint_name(step))


@pytest.mark.parametrize(("stages", "precision"), [((0, 3), "fp32"), ((3, 2), "fp32"), ((2, 2), "bf16")])
def test_a_resumed_run_goes_on_as_if_nothing_had_been(
    stages: tuple[int, int], precision: str, scratch: dict[str, Path], one_rank: None, tmp_path: Path
) -> None:
    source, dtype = scratch["llama-tiny"], PRECISIONS[precision]
    config = config_of(source, dropout=0.1)
    torch.manual_seed(0)
    student = build_student(str(source), config, dtype, None)
    engine = make_engine(student, stages[0], precision)
    train(engine, range(4))
    folder = checkpoint(engine, student, make_run(tmp_path), 4)
    whole = train(engine, range(4, 10))
    end = network_state(engine.weights() or {})

    torch.manual_seed(99)
    again = build_student(str(source), config, dtype, folder)
    resumed = make_engine(again, stages[1], precision)
    restore_optimizer(folder, resumed, None, Progress(step=4))
    tolerance = 2e-4
    assert train(resumed, range(4, 10)) == pytest.approx(whole, abs=tolerance)
    for name, value in network_state(resumed.weights() or {}).items():
        torch.testing.assert_close(value, end[name], atol=tolerance, rtol=0.02)


def test_adapters_go_on_with_their_own_base_only(scratch: dict[str, Path], one_rank: None, tmp_path: Path) -> None:
    source = scratch["llama-tiny"]
    student = make_student(source)
    engine = make_engine(student)
    train(engine, range(1))
    folder = checkpoint(engine, student, make_run(tmp_path), 1)
    texts = ["another text of another tokenizer"] * 20
    other = build_scratch("llama-tiny", texts, tmp_path / "other", seed=1)
    with pytest.raises(UserError, match="not those that the adapters of this run were trained on"):
        build_student(str(other), config_of(other), torch.float32, folder)


@pytest.mark.slow
@pytest.mark.beside
def test_a_whole_run_ends_with_a_plain_student_and_its_adapter(tmp_path: Path) -> None:
    """The engine that samples proves each snapshot's weights; the student needs nothing of peft."""
    from peft import PeftModel
    from transformers import AutoModelForSeq2SeqLM

    command = [
        sys.executable, str(ROOT / "jobs/train.py"), "--config", str(ROOT / "jobs/configs/tiny.yaml"),
        "student.lora.rank=4", "optim.lr=1e-2", "train.workers=2", "train.zero_stage=3", f"run.storage_path={tmp_path}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=480, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["steps"] == 12
    assert result["negatives"]["used"] > 0
    run = Path(result["run"])
    for number in (0, 6):
        assert json.loads((run / f"snapshots/{number:06d}/snapshot.json").read_text())["probe_logprob"] < 0

    student = AutoModelForSeq2SeqLM.from_pretrained(run / "student")
    start = AutoModelForSeq2SeqLM.from_pretrained(run / "scratch_student")
    assert {type(module) for module in student.modules()} == {type(module) for module in start.modules()}
    assert any(not torch.equal(a, b) for a, b in zip(student.parameters(), start.parameters(), strict=True))
    merged = PeftModel.from_pretrained(start, run / "student" / ADAPTER).merge_and_unload().state_dict()
    for name, value in student.state_dict().items():
        torch.testing.assert_close(merged[name], value, atol=1e-6, rtol=1e-6)
