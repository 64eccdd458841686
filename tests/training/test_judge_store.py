"""Discriminators that runs share: the same ones, and no others. Real engines, on one rank."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from qcrd_ray.config import ExperimentConfig, config_from_dict
from qcrd_ray.errors import UserError
from qcrd_ray.models.discriminator import Discriminator, build_discriminator
from qcrd_ray.rationales.augmentation import AUGMENTED
from qcrd_ray.rationales.schema import RATIONALE_SETS
from qcrd_ray.run_folder import DATA, INITIAL_JUDGE, RunFolder
from qcrd_ray.training.judge import JudgeUpdate, OnlineJudge
from qcrd_ray.training.judge_store import check_store, open_store, pretrain, pretraining_key

SMALL = {"encoder": "scratch:bert-tiny", "hidden_size": 16, "pretrain_steps": 3, "pretrain_batch_size": 4, "lr": 1e-3}


def config_of(folder: Path, **changes: dict[str, Any]) -> ExperimentConfig:
    sections = {
        "judge": {**SMALL, "store": str(folder / "store"), **changes.pop("judge", {})},
        "run": {"storage_path": str(folder / "runs")},
    }
    return config_from_dict({**sections, **changes})


def rows(count: int = 12) -> list[dict[str, Any]]:
    return [
        {
            "id": f"q{i}", "question": f"How many are {i} and {i + 1}?", "choices": None, "answer": str(2 * i + 1),
            "label": str(2 * i + 1), "positives": [f"{i} and {i + 1} make {2 * i + 1}.", f"The sum is {2 * i + 1}."],
            "negatives": [f"{i} and {i + 1} make {i}."], "agreement": 0.7, "votes_gold": True, "sample0": "",
            "sample0_label": None,
        }
        for i in range(count)
    ]  # fmt: skip


def run_of(folder: Path, name: str, records: list[dict[str, Any]] | None = None, seed: int = 0) -> RunFolder:
    """A run in which pretraining would begin."""
    run = RunFolder(str(folder / "runs"), name)
    run.create()
    records = rows() if records is None else records
    write_table(run, "train", pa.Table.from_pylist(records, schema=RATIONALE_SETS))
    # Of the same texts whatever the records are: its tokenizer is trained on them.
    texts = [text for row in rows() for text in (row["question"], *row["positives"], *row["negatives"])]
    discriminator = build_discriminator(config_of(folder).judge, seed=seed, texts=texts)
    run.write_folder(INITIAL_JUDGE, discriminator.save)
    return run


def write_table(run: RunFolder, name: str, table: pa.Table) -> None:
    assert run.root is not None
    path = run.root / DATA / f"{name}.arrow"
    path.parent.mkdir(exist_ok=True)
    with pa.ipc.new_file(str(path), table.schema) as file:
        file.write_table(table)


def pretrained(config: ExperimentConfig, run: RunFolder) -> tuple[OnlineJudge, JudgeUpdate | None]:
    torch.manual_seed(3)
    judge = OnlineJudge(Discriminator.load(run.get_folder(INITIAL_JUDGE)), config)
    return judge, pretrain(judge, config, run)


def state_of(judge: OnlineJudge) -> dict[str, torch.Tensor]:
    return {
        f"{name}/{key}": value.clone()
        for name, tensors in judge.engine.full_state()
        for key, value in tensors.items()
    }  # fmt: skip


def test_equal_inputs_have_one_key(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    one, two = run_of(tmp_path, "one"), run_of(tmp_path, "two")
    assert pretraining_key(config, one) == pretraining_key(config, two)
    # What has no part in pretraining changes nothing: the samplers, how the student learns, what voting thought.
    other = config_of(tmp_path, optim={"lr": 0.01}, sampler={"actors": 3}, judge={"update_interval": 4})
    assert pretraining_key(other, two) == pretraining_key(config, one)
    voted = [{**row, "agreement": 0.1, "sample0": "x"} for row in rows()]
    assert pretraining_key(config, run_of(tmp_path, "three", voted)) == pretraining_key(config, one)


@pytest.mark.parametrize(
    "changes",
    [
        {"judge": {"pretrain_steps": 4}},
        {"judge": {"pretrain_batch_size": 3}},
        {"judge": {"lr": 2e-3}},
        {"judge": {"max_tokens": 64}},
        {"train": {"tokens_per_pass": 4096}},
        {"train": {"seed": 5}},
        {"train": {"workers": 2}},
        {"task": "cqa"},
    ],
    ids=str,
)
def test_each_setting_that_decides_has_a_key_of_its_own(tmp_path: Path, changes: dict[str, Any]) -> None:
    run = run_of(tmp_path, "one")
    assert pretraining_key(config_of(tmp_path, **changes), run) != pretraining_key(config_of(tmp_path), run)


def test_questions_without_a_negative_pretrain_nothing(tmp_path: Path, one_rank: None) -> None:
    run = run_of(tmp_path, "alone", [{**row, "negatives": []} for row in rows()])
    judge, update = pretrained(config_of(tmp_path, judge={"store": None}), run)
    assert update is not None and judge.pretrained_steps == 0
    assert update.loss == 0.0 and math.isnan(update.positive_score) and math.isnan(update.negative_score)


@pytest.mark.parametrize(
    ("positive", "negative", "alike"), [(1.0, 1.0, True), (0.2, 0.9, True), (0.9, 0.4, False), (math.nan, 0.4, False)]
)
def test_scores_are_alike_unless_positives_have_clearly_more(positive: float, negative: float, alike: bool) -> None:
    assert JudgeUpdate(0.0, positive, negative).scores_alike is alike


def changed_row(**changes: Any) -> list[dict[str, Any]]:
    first, *rest = rows()
    return [{**first, **changes}, *rest]


def add_corrupted(run: RunFolder) -> None:
    write_table(run, f"train.{AUGMENTED}", pa.table({"negatives": [["0 and 1 make 9."]] * len(rows())}))


@pytest.mark.parametrize(
    "make",
    [
        lambda folder: run_of(folder, "two", seed=1),
        lambda folder: run_of(folder, "two", rows(11)),
        lambda folder: run_of(folder, "two", rows()[::-1]),
        lambda folder: run_of(folder, "two", changed_row(question="How many?")),
        lambda folder: run_of(folder, "two", changed_row(choices=["1", "2"])),
        lambda folder: run_of(folder, "two", changed_row(positives=["1."])),
        lambda folder: run_of(folder, "two", changed_row(negatives=[])),
    ],
    ids=["start", "fewer", "order", "question", "choices", "positives", "negatives"],
)
def test_what_it_starts_from_and_what_it_sees_decide(
    tmp_path: Path, make: Callable[[Path], RunFolder], request: pytest.FixtureRequest
) -> None:
    config = config_of(tmp_path)
    one, two = run_of(tmp_path, "one"), make(tmp_path)
    same_start = one.digest(INITIAL_JUDGE) == two.digest(INITIAL_JUDGE)
    assert same_start is ("[start]" not in request.node.name)
    assert pretraining_key(config, one) != pretraining_key(config, two)


def test_corrupted_positives_decide(tmp_path: Path) -> None:
    config, run = config_of(tmp_path), run_of(tmp_path, "one")
    before = pretraining_key(config, run)
    add_corrupted(run)
    assert pretraining_key(config, run) != before


def test_a_taken_discriminator_is_the_one_that_was_pretrained(tmp_path: Path, one_rank: None) -> None:
    config = config_of(tmp_path)
    made, update = pretrained(config, run_of(tmp_path, "one"))
    taken, same = pretrained(config, run_of(tmp_path, "two"))
    assert (made.reused, taken.reused) == (False, True)
    assert update is not None and same == update
    assert (taken.steps, taken.pretrained_steps) == (made.steps, made.pretrained_steps) == (3, 3)
    ours, theirs = state_of(made), state_of(taken)
    assert ours.keys() == theirs.keys()
    assert {name.rpartition("/")[2] for name in ours} > {"weight"}  # the moments too
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert (tmp_path / "store" / "judges" / pretraining_key(config, run_of(tmp_path, "two"))).is_dir()
    # Both go on alike.
    questions, texts = ["How many are 1 and 2?"], ["1 and 2 make 3."]
    assert torch.equal(made.score(questions, texts), taken.score(questions, texts))


def test_a_damaged_one_is_made_again(tmp_path: Path, one_rank: None) -> None:
    config = config_of(tmp_path)
    made, _ = pretrained(config, run_of(tmp_path, "one"))
    store = open_store(config)
    assert store is not None and store.root is not None
    (key,) = store.list("")
    (file, *_) = sorted((store.root / key).glob("judge_optimizer-*.safetensors"))
    file.write_bytes(file.read_bytes()[:-8])
    again, _ = pretrained(config, run_of(tmp_path, "two"))
    assert not again.reused
    ours, theirs = state_of(made), state_of(again)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    taken, _ = pretrained(config, run_of(tmp_path, "three"))
    assert taken.reused


def test_one_that_another_run_has_made_meanwhile_stays(
    tmp_path: Path, one_rank: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(tmp_path)
    pretraining = OnlineJudge.pretrain
    depth: list[int] = []

    def slow(judge: OnlineJudge, *arguments: Any) -> JudgeUpdate | None:
        if not depth:  # while the first one pretrains, a second one begins and ends
            depth.append(1)
            pretrained(config, run_of(tmp_path, "two"))
        return pretraining(judge, *arguments)

    monkeypatch.setattr(OnlineJudge, "pretrain", slow)
    store = open_store(config)
    assert store is not None and store.root is not None
    stamps: list[int] = []
    write = RunFolder.new_folder

    def counted(run: RunFolder, name: str) -> Any:
        stamps.extend([1] * (run.key == "judge.store"))
        return write(run, name)

    monkeypatch.setattr(RunFolder, "new_folder", counted)
    first, _ = pretrained(config, run_of(tmp_path, "one"))
    assert not first.reused
    assert len(stamps) == len(store.list("")) == 1


def test_a_store_that_cannot_be_is_found_early(tmp_path: Path) -> None:
    check_store(config_of(tmp_path))
    assert not (tmp_path / "store").exists()
    check_store(config_of(tmp_path, judge={"store": None}))
    with pytest.raises(UserError, match="config key judge.store: nowhere://x is no folder and no URI"):
        check_store(config_of(tmp_path, judge={"store": "nowhere://x"}))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="config key judge.store: .*/file is no folder"):
        check_store(config_of(tmp_path, judge={"store": str(tmp_path / "file")}))


def test_the_store_is_below_its_path(tmp_path: Path) -> None:
    uri = "s3://b/shared?scheme=http&endpoint_override=127.0.0.1:9000"
    store = open_store(config_of(tmp_path, judge={"store": uri}))
    assert store is not None and (store.storage_path, store.name) == (uri, "judges")
    assert store.where("x") == "s3://b/shared/judges/x"
    local = open_store(config_of(tmp_path, judge={"store": f"file://{tmp_path}"}))
    assert local is not None and local.root == tmp_path / "judges"
