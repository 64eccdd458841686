"""A student's folder as training leaves it: the card, and what `generate` is told."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoTokenizer, GenerationConfig

from qcrd_ray.config import StudentConfig
from qcrd_ray.models.exported import STUDENT_FILE, read_exported
from qcrd_ray.models.scratch import build_scratch, train_tokenizer, write_scratch
from qcrd_ray.reporting.model_card import Prompting, escaped, model_card
from qcrd_ray.run_folder import RunFolder
from qcrd_ray.sampling.schedule import Schedule
from qcrd_ray.tasks.prompts import EXPLAIN, PREDICT, SEPARATOR_TOKENS, StudentTokenizer, load_tokenizer
from qcrd_ray.training.export import export, prompting_of
from tests.s3_server import s3_server
from tests.taught import TEACHER, result_of_a_run, student_config

HOSTILE = '<script>alert(1)</script> [x](http://y.z) ![i](j) `a` **b** | # @c www.d.e $f$ &amp; "g" {{ h }}\n\n# i'
SEQ2SEQ, CAUSAL = Prompting(True), Prompting(False)


def card(method: str = "qcrd", prompting: Prompting = CAUSAL, *overrides: str, **result: Any) -> str:
    config = student_config("llama-tiny", method, *overrides)
    return model_card(config, {**result_of_a_run(config), **result}, prompting, None)


def front_matter(text: str) -> dict[str, Any]:
    match = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    assert match is not None
    return dict(yaml.safe_load(match[1]))


def test_the_front_matter_is_what_the_hub_reads() -> None:
    from huggingface_hub import ModelCard

    found = front_matter(card())
    assert found["library_name"] == "transformers"
    assert found["pipeline_tag"] == "text-generation"
    assert {"qcrd", "chain_sum"} <= set(found["tags"])
    assert "base_model" not in found  # random weights
    [score] = ModelCard(card()).data.eval_results
    assert (score.metric_type, score.metric_value, score.dataset_split) == ("accuracy", 0.25, "test")
    assert front_matter(card("qcrd", CAUSAL, "student.model=Qwen/Qwen2.5-0.5B"))["base_model"] == "Qwen/Qwen2.5-0.5B"
    embedded = front_matter(card("qcrd", CAUSAL, "student.model=embedded:smollm2-135m"))
    assert embedded["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert front_matter(card("qcrd", CAUSAL, "data.path=hub:ChilleD/SVAMP"))["datasets"] == ["ChilleD/SVAMP"]


def test_a_folder_of_somebodys_machine_is_not_told(tmp_path: Path) -> None:
    text = card("qcrd", CAUSAL, f"student.model={tmp_path}", f"data.path={tmp_path}", "teacher.engine=recorded")
    assert str(tmp_path.parent) not in text
    assert "base_model" not in front_matter(text)


def test_the_body_says_what_came_of_it() -> None:
    text = card()
    for part in (
        "| before training | 0.000 |", "| this student, step 12 of 12 | 0.250 (standard error 0.108) |",
        "60 of 64 training questions were used, 4 left out (no\\_samples); held out: 16 valid, 16 test.",
        "**The teacher is simulated**", "40 of 48 that were sampled with t5 were used", "0 to 2 iterations before",
        "50.0 % of the chosen ones lay inside the margin", "pretrained for 5 steps, 3 updates in training",
        "| α₂, β, δ | 0.5, 0.2, 3 nats |", "300 samples were voted on, 80.0 % of them right",
    ):  # fmt: skip
        assert part in text, part
    assert "simulated" not in card("qcrd", CAUSAL, "teacher.engine=recorded", "data.path=x")
    plain = card("finetune", SEQ2SEQ)
    for part in ("Teacher", "<Explain>", "Negatives", "Judge", "simulated", "vllm serve", "rationale"):
        assert part not in plain, part
    assert "by the method `single_task`." in card("single_task")
    assert "behind `The answer is:`" in card("single_task")
    assert "add_special_tokens=False" in card("qcrd", Prompting(False, special_tokens=False))
    assert 'tokenizer(text + "\\u003c/s\\u003e", return_tensors' in card("qcrd", Prompting(True, False, "</s>"))


def test_what_was_learned_is_told_by_the_method() -> None:
    first, vote = (
        "* Positives: the teacher's first sample.",
        "* Positives: the teacher's samples whose answer is the most",
    )
    learned = "their rationales were learned all the same"
    for method in ("dss", "mi", "single_task"):
        text = card(method)
        assert first in text and vote not in text and learned not in text, method
    for method in ("qcrd", "mi+qcrd"):
        assert vote in card(method) and learned in card(method), method
    assert learned not in card("qcrd", CAUSAL, "positives=gold")
    assert "* Labels: the answer of the teacher's first sample." in card("single_task")
    assert "* Labels: the gold answers." in card("dss")


def test_pythons_texts_are_pythons() -> None:
    config = student_config("llama-tiny", "qcrd")
    result = result_of_a_run(config)
    asked = "Is 😀 \\ud83d\\ude00 é ' or \""
    examples = [{**example, "question": asked} for example in result["examples"]]
    text = model_card(config, {**result, "examples": examples}, CAUSAL, None)
    literals = [ast.literal_eval(found) for found in re.findall(r'"<Predict>(?:[^"\\]|\\.)*"', text)]
    assert [found for found in literals if asked in found and found.encode()]


def test_texts_from_outside_stay_texts() -> None:
    result = result_of_a_run(student_config("llama-tiny", "qcrd"))
    example = dict.fromkeys(result["examples"][0], HOSTILE)
    data = {**result["data"], "teacher": HOSTILE}
    data["train"] = {**data["train"], "dropped": {HOSTILE: {"count": 1, "ids": []}}}
    text = card("qcrd", CAUSAL, examples=[example], data=data, name=HOSTILE)
    front = front_matter(text)
    assert front["model-index"][0]["name"] == HOSTILE
    body = text[text.index("\n---\n") + 5 :].lstrip()
    assert body.startswith("# ")
    prose = re.sub(r"```.*?```", "", body, flags=re.DOTALL)
    for raw in (
        "<script>",
        "[x](",
        "![i]",
        " `a`",
        "**b**",
        " # ",
        " @c",
        "www.d",
        ":smile:",
        "$f$",
        " &amp; ",
        "\n# i",
    ):
        assert raw not in prose, raw
    assert "&lt;script&gt;" in prose
    assert len(re.findall(r"(?m)^# ", prose)) == 1
    for code in re.findall(r"```\w+\n(.*?)```", body, re.DOTALL):
        assert "<script>" not in code and "`" not in code
    rows = [row for row in prose.splitlines() if row.startswith("| question")]
    assert len(rows) == 1 and len(re.findall(r"(?<!\\)\|", rows[0])) == 3


def test_escaped_is_one_line() -> None:
    assert escaped("a\n\x1b[31m\u2028b") == "a \\[31m b"
    assert len(escaped("x" * 5000)) == 600


@pytest.mark.parametrize("model", ["llama-tiny", "t5-tiny"])
@pytest.mark.parametrize("remote", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["folder", "s3"])
def test_the_folder_is_whole_wherever_it_is(tmp_path: Path, model: str, remote: bool, request: Any) -> None:
    if remote:
        request.getfixturevalue("monkeypatch").setenv("QCRD_CACHE", str(tmp_path / "cache"))
        where = request.getfixturevalue("bucket")
    else:
        where = str(tmp_path / "runs")
    config = student_config(model, "single_task" if model == "llama-tiny" else "qcrd")
    run = RunFolder(where, model)
    run.create()
    last = Schedule.of(config).iterations
    for number in (2, last):
        with run.new_folder(run.snapshot(number)) as folder:
            write_scratch(model, ["What is 3 + 4?", "<Predict> 3"], folder, seed=number)
            stale = GenerationConfig(
                temperature=0.6, do_sample=True, repetition_penalty=1.1, top_k=20, eos_token_id=[1, 2]
            )
            stale.save_pretrained(folder)
            (folder / "snapshot.json").write_text("{}")
            (folder / "chat_template.jinja").write_text("{{ messages }}")
    export(config, run, 2, result_of_a_run(config))
    student, other = run.get_folder("student"), run.get_folder("last_student")  # checked against their manifests
    assert (student / "model.safetensors").read_bytes() == (
        run.get_folder(run.snapshot(2)) / "model.safetensors"
    ).read_bytes()
    assert (other / "model.safetensors").read_bytes() != (student / "model.safetensors").read_bytes()
    assert TEACHER.split()[0] in (student / "README.md").read_text(encoding="utf-8")
    assert not (other / "README.md").exists()
    assert not (student / "snapshot.json").exists() and not (student / "chat_template.jinja").exists()
    for folder in (student, other):
        assert read_exported(folder).method == config.method
        found = json.loads((folder / "generation_config.json").read_text())
        longest = 32 + SEPARATOR_TOKENS + 8 if config.method == "single_task" else 8
        seq2seq = {"decoder_start_token_id": 0} if model == "t5-tiny" else {}
        found.pop("transformers_version")
        assert found == {"do_sample": False, "eos_token_id": 1, "pad_token_id": 0, "max_new_tokens": longest, **seq2seq}
    export(config, run, last, result_of_a_run(config))  # as a run does that was killed before its result
    assert json.loads((run.get_folder("student") / STUDENT_FILE).read_text())["task"] == "chain_sum"


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with s3_server("bucket") as server:
        yield server.uri("bucket/runs")


def test_a_prompt_is_its_text_for_every_tokenizer(tmp_path: Path) -> None:
    texts = ["What is 3 + 4?", "Which is it?\nAnswer Choices: (a) red (b) blue", "x.", "é 😀"]
    for name in ("llama-tiny", "t5-tiny"):
        folder = build_scratch(name, texts, tmp_path / name, seed=0)
        tokenizer = load_tokenizer(str(folder), StudentConfig())
        result = {"examples": [{"question": text} for text in texts]}
        assert prompting_of(tokenizer, result) == Prompting(name == "t5-tiny")
        for text in texts:
            for prefix in (PREDICT, EXPLAIN):
                given = Prompting(name == "t5-tiny").text(prefix, text)
                ids, cut = tokenizer.prompt(prefix, text)
                assert (AutoTokenizer.from_pretrained(folder)(given)["input_ids"], False) == (ids, cut)


def test_a_tokenizer_that_joins_a_stop_and_a_line_break_is_asked_as_it_was_trained() -> None:
    from tokenizers import Regex, pre_tokenizers

    own = train_tokenizer(["What is 3 + 4?\n"] * 50)
    # As Qwen's and Llama 3's do: a stop takes the line breaks behind it.
    split = pre_tokenizers.Split(Regex(r"[^\s\w]+[\r\n]*|\s?\w+|\s+"), "isolated")
    own.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(False, False, False)]
    )
    own.backend_tokenizer.train_from_iterator(["What is 3 + 4?\n"] * 50, _trainer())
    tokenizer = StudentTokenizer(own, StudentConfig(), False)
    ids, cut = tokenizer.prompt(PREDICT, "What is 3 + 4?")
    assert own.decode(ids[-1:]) == "?\n"
    assert not cut
    assert prompting_of(tokenizer, {"examples": []}) == CAUSAL
    short = StudentTokenizer(own, StudentConfig(max_input_tokens=len(ids) - 1), False)
    cut_ids, cut = short.prompt(PREDICT, "What is 3 + 4?")
    assert cut and len(cut_ids) <= len(ids) - 1 and own.decode(cut_ids).endswith("\n")


def _trainer() -> Any:
    from tokenizers import pre_tokenizers, trainers

    special = ["<pad>", "</s>", "<unk>"]
    return trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )


def test_a_tokenizer_that_ends_a_decoders_prompt_is_told_not_to(tmp_path: Path) -> None:
    folder = build_scratch("t5-tiny", ["What is 3 + 4?"], tmp_path / "t5", seed=0)
    own = AutoTokenizer.from_pretrained(folder)  # adds its end token
    assert prompting_of(StudentTokenizer(own, StudentConfig(), False), {"examples": []}) == Prompting(False, False)
