"""Students that were taught a few answers, asked by function, by job, and as their model card says."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from qcrd_ray.config import ExperimentConfig, PredictionConfig
from qcrd_ray.errors import UserError
from qcrd_ray.evaluation.predict import Predictor, line, predict_lines, prediction_spec
from qcrd_ray.evaluation.questions import Asked, Bad, Input
from qcrd_ray.models.exported import STUDENT_FILE, check_exported, read_exported
from qcrd_ray.models.student import load_student
from qcrd_ray.run_folder import RunFolder
from qcrd_ray.sampling.engine import Generation, SamplingEngine, start_engine
from qcrd_ray.sampling.predictions import predict
from qcrd_ray.sampling.student_engine import engine_spec
from tests.faults.runs import until
from tests.sampling.tiny_server import server_of
from tests.taught import ANSWERS, CHOSEN, student_config, teach

ROOT = Path(__file__).parents[2]
JOB = ROOT / "jobs" / "predict.py"
TIMEOUT = 480
QUESTIONS = list(ANSWERS)
ASKED = [
    Asked(number, QUESTIONS[number % len(QUESTIONS)], None, (None, f"q{number}", number)[number % 3])
    for number in range(1, 20)
]


class Taught:
    """A student with its engine. `calls` has the number of requests of each call."""

    def __init__(self, run: RunFolder) -> None:
        assert run.root is not None
        self.folder = run.root / "student"
        self.config: ExperimentConfig = read_exported(self.folder).config(str(self.folder))
        self.engine: SamplingEngine = start_engine(prediction_spec(self.config, PredictionConfig(threads=1), True))
        self.calls: list[int] = []
        generate = self.engine.generate

        def counted(requests: Any) -> list[list[Generation]]:
            self.calls.append(len(requests))
            return generate(requests)

        self.engine.generate = counted  # type: ignore[method-assign]

    def answers(
        self, inputs: list[Input], batch: int = 100, rationales: bool = True, skip_bad: bool = False, **options: Any
    ) -> list[dict[str, Any]]:
        written: list[str] = []
        predictor = Predictor(self.engine, self.config, PredictionConfig(**options), rationales)
        batches = [inputs[first : first + batch] for first in range(0, len(inputs), batch)]
        predict_lines(predictor, batches, written.append, skip_bad)
        return [json.loads(text) for text in "".join(written).splitlines()]


@pytest.fixture(scope="module", params=["llama-tiny", "t5-tiny"])
def taught(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Taught:
    return Taught(teach(student_config(request.param, "qcrd"), tmp_path_factory.mktemp("taught")))


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Taught:
    return Taught(teach(student_config("llama-tiny", "single_task"), tmp_path_factory.mktemp("single")))


def expected(one: Asked, rationale: bool = True) -> dict[str, Any]:
    label, reason = ANSWERS[one.question]
    found = {} if one.id is None else {"id": one.id}
    return found | {"question": one.question, "label": label} | ({"rationale": reason} if rationale else {})


def test_every_question_is_answered_in_order_whatever_the_batch(taught: Taught) -> None:
    for batch in (1, 4, 100):
        assert taught.answers(list(ASKED), batch) == [expected(one) for one in ASKED]
    taught.calls.clear()
    assert taught.answers(list(ASKED), 10, rationales=False) == [expected(one, False) for one in ASKED]
    assert taught.calls == [10, 9]
    taught.calls.clear()
    taught.answers(list(ASKED), 10)
    assert taught.calls == [20, 18]  # labels and rationales of a batch are one call


def test_labels_are_those_that_evaluation_scores(taught: Taught) -> None:
    records = [
        {"id": q, "question": q, "choices": None, "answer": answer, "label": answer}
        for q, (answer, _) in ANSWERS.items()
    ]
    records.append({"id": "other", "question": "How is 1 + 9 + 5?", "choices": None, "answer": "15", "label": "15"})
    scored = predict(taught.engine, taught.config, str(taught.folder), records)
    answers = taught.answers([Asked(number, r["question"]) for number, r in enumerate(records)])
    assert [prediction.text for prediction in scored] == [answer["label"] for answer in answers]
    assert [prediction.correct for prediction in scored[:-1]] == [True] * len(ANSWERS)


def test_the_card_loads_the_student_and_gets_the_same_answers(taught: Taught) -> None:
    card = (taught.folder / "README.md").read_text(encoding="utf-8")
    [code] = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    code = code.replace('folder = "student"', f"folder = {str(taught.folder)!r}")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), {})
    answer = expected(Asked(1, "What is 3 + 4?"))
    assert printed.getvalue().splitlines() == [answer["label"], answer["rationale"]]


@pytest.mark.slow
@pytest.mark.beside
@pytest.mark.parametrize("taught", ["llama-tiny"], indirect=True)
def test_the_card_s_requests_get_the_same_answers_of_vllm_serve(taught: Taught, tmp_path: Path) -> None:
    card = (taught.folder / "README.md").read_text(encoding="utf-8")
    requests = re.findall(r"^curl http://localhost:8000(\S+) .*?\\\n +-d '(.*?)'$", card, re.MULTILINE)
    said = []
    with server_of(taught.folder, "student", tmp_path) as url:
        for path, body in requests:
            request = urllib.request.Request(f"{url}{path}", body.encode(), {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
                said.append(json.load(answer)["choices"][0]["text"].strip())
    answer = expected(Asked(1, "What is 3 + 4?"))
    assert said == [answer["label"], answer["rationale"]]


def test_plain_generate_does_what_evaluation_does(taught: Taught) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    seq2seq = taught.engine.is_seq2seq  # type: ignore[attr-defined]
    model = (AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM).from_pretrained(taught.folder)
    tokenizer = AutoTokenizer.from_pretrained(taught.folder)
    question = "How is 6 + 9 - 7 + 1 + 2 + 3?"  # which it was not taught: what it writes has no end
    text = f"<Predict> {question}" + ("" if seq2seq else "\n")
    inputs = tokenizer(text, return_tensors="pt")
    ids = model.generate(inputs.input_ids, attention_mask=inputs.attention_mask)[0]
    new = ids[1:] if seq2seq else ids[inputs.input_ids.shape[1] :]
    assert len(new) <= taught.config.evaluation.max_new_tokens
    [answer] = taught.answers([Asked(1, question)])
    assert tokenizer.decode(new, skip_special_tokens=True).strip() == answer["label"]


def test_a_single_task_students_label_stands_behind_its_rationale(single: Taught) -> None:
    assert single.answers(list(ASKED), 7) == [expected(one) for one in ASKED]
    assert single.answers(list(ASKED), 7, rationales=False) == [expected(one, False) for one in ASKED]
    assert single.calls == [7, 7, 5] * 2  # one text holds both


def test_choices_are_part_of_what_is_asked(tmp_path: Path) -> None:
    student = Taught(teach(student_config("t5-tiny", "dss", "task=cqa", f"data.path={tmp_path}"), tmp_path))
    inputs = [Asked(number, question, choices) for number, (question, choices) in enumerate(CHOSEN, start=1)]
    assert [answer["label"] for answer in student.answers(list(inputs))] == list(CHOSEN.values())
    assert [answer["rationale"] for answer in student.answers(list(inputs))] == ["It is red.", "It is green."]


def test_a_student_of_labels_alone_writes_no_rationale(taught: Taught) -> None:
    config = taught.config.model_copy(update={"method": "finetune"})
    predictor = Predictor(taught.engine, config, PredictionConfig(), True)
    [answer] = predictor.answer(predictor.prepare([ASKED[0]]))
    assert answer == expected(ASKED[0], False)


def test_what_is_sampled_depends_on_the_seed_and_the_line_alone(taught: Taught) -> None:
    first = taught.answers(list(ASKED), 100, temperature=3.0, seed=1)
    assert taught.answers(list(ASKED), 3, temperature=3.0, seed=1) == first
    other = taught.answers(list(ASKED), 100, temperature=3.0, seed=2)
    assert sum(a["rationale"] != b["rationale"] for a, b in zip(first, other, strict=True)) > len(ASKED) // 2
    same_question = [
        answer["rationale"] for one, answer in zip(ASKED, first, strict=True) if one.question == QUESTIONS[0]
    ]
    assert len(set(same_question)) > 1


def test_a_bad_input_ends_it_before_its_batch_or_has_its_error_in_its_place(taught: Taught) -> None:
    inputs: list[Input] = [ASKED[0], ASKED[1], ASKED[2], Bad(4, "questions:4: no valid JSON"), ASKED[3]]
    written: list[str] = []
    taught.calls.clear()
    predictor = Predictor(taught.engine, taught.config, PredictionConfig(), True)
    with pytest.raises(UserError, match=r"^questions:4: no valid JSON; mend it, or give --skip-bad"):
        predict_lines(predictor, [inputs[:2], inputs[2:]], written.append, False)
    assert [json.loads(text) for text in "".join(written).splitlines()] == [expected(one) for one in ASKED[:2]]
    assert taught.calls == [4]
    answers = taught.answers(inputs, 2, skip_bad=True)
    assert answers == [*map(expected, ASKED[:3]), {"error": "questions:4: no valid JSON"}, expected(ASKED[3])]
    assert taught.answers([Bad(1, "a"), Bad(2, "b")], skip_bad=True) == [{"error": "a"}, {"error": "b"}]


def test_a_line_is_one_line_and_nothing_that_a_terminal_obeys() -> None:
    text = "a\nb\r\x1b[31m \x7f\x9b31m\u2028\u2029\x85 é 😀 <b>"
    written = line({"question": text})
    assert written.endswith("\n") and len(written.splitlines()) == 1
    assert json.loads(written) == {"question": text}
    assert all(c.isprintable() for c in written[:-1])
    assert "é 😀 <b>" in written


def test_a_long_question_is_cut_and_counted(taught: Taught) -> None:
    predictor = Predictor(taught.engine, taught.config, PredictionConfig(), True)
    counts = predict_lines(predictor, [[ASKED[0], Asked(2, "What is 3 + 4? " * 400)]], lambda text: None, False)
    assert (counts.answered, counts.cut) == (2, 1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "not found; training writes it at its end"),
        ("{", "no valid JSON"),
        ("[]", "the whole: Input should be a valid dictionary"),
        ('{"format": 2}', "format: Input should be 1, found '2'"),
        ('{"format": 1}', "task: Field required"),
        ("[" * 100_000, "no valid JSON"),
    ],
)
def test_a_folder_that_does_not_say_what_it_is(tmp_path: Path, content: str | None, message: str) -> None:
    with pytest.raises(UserError, match=r"no such folder"):
        read_exported(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no student folder \(no config.json in it\); runs/NAME/student is one"):
        read_exported(tmp_path)
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "config.json").write_text("{}")
    with pytest.raises(UserError, match=re.escape(f"did you mean {tmp_path / 'student'}?")):
        read_exported(tmp_path)
    if content is not None:
        (tmp_path / "student" / STUDENT_FILE).write_text(content)
    with pytest.raises(UserError, match=re.escape(f"{STUDENT_FILE}: {message}")):
        read_exported(tmp_path / "student")
    config = student_config("t5-tiny", "single_task", "train.max_steps=3")
    assert read_exported(tmp_path / "student", config).config("m").method == "single_task"


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("model.safetensors", lambda path: path.unlink(), "no weights in it"),
        ("model.safetensors", lambda path: os.truncate(path, 2000), "cannot be read as safetensors"),
        ("model.safetensors", lambda path: _without_a_layer(path), "its weights are not whole: .* tensors are not in"),
        ("tokenizer.json", lambda path: path.unlink(), "its tokenizer cannot be read"),
        ("tokenizer.json", lambda path: path.write_text("{"), "its tokenizer cannot be read"),
    ],
)
def test_a_folder_that_is_not_whole_is_named(
    taught: Taught, tmp_path: Path, name: str, damage: Callable[[Path], None], message: str
) -> None:
    folder = shutil.copytree(taught.folder, tmp_path / "student")
    config = read_exported(folder).config(str(folder))
    check_exported(folder, config.student)
    damage(folder / name)
    with pytest.raises(UserError, match=message) as caught:
        _load(folder, config)
    assert str(folder) in str(caught.value)
    if "not whole" in message:
        with pytest.raises(UserError, match=message):
            load_student(str(folder), config.student)


def _load(folder: Path, config: ExperimentConfig) -> None:
    check_exported(folder, config.student)
    start_engine(replace(engine_spec(config), precision="fp32", engine="transformers"))


def _without_a_layer(path: Path) -> None:
    weights = {key: value for key, value in load_file(path).items() if "1" not in key.split(".")}
    save_file(weights, path, metadata={"format": "pt"})


# The job


def start(*arguments: str, **options: Any) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [sys.executable, str(JOB), *arguments]
    return subprocess.Popen(command, env=environment, start_new_session=True, **{**pipes, **options})  # type: ignore[call-overload]


def run(*arguments: str, given: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    process = start(*arguments)
    try:
        out, err = process.communicate(given, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.fixture
def folder(taught: Taught) -> str:
    return str(taught.folder)


LINES = "".join(
    json.dumps({"question": one.question, **({} if one.id is None else {"id": one.id})}) + "\n" for one in ASKED
)
ONE_STUDENT = pytest.mark.parametrize("taught", ["t5-tiny"], indirect=True)


@pytest.mark.slow
@pytest.mark.beside
@ONE_STUDENT
def test_the_job_answers_lines_and_a_question(folder: str, tmp_path: Path) -> None:
    done = run("--student", folder, "--batch", "8", given=LINES.encode())
    assert done.returncode == 0, done.stderr.decode()
    assert [json.loads(text) for text in done.stdout.decode().splitlines()] == [expected(one) for one in ASKED]
    assert b"19 answered in" in done.stderr.splitlines()[-1]
    done = run("--student", folder, "--no-rationale", "--output", str(tmp_path / "answers"), "What is 5 + 2?")
    assert (done.returncode, done.stdout) == (0, b""), done.stderr.decode()
    assert json.loads((tmp_path / "answers").read_text()) == {"question": "What is 5 + 2?", "label": "7"}
    assert [path.name for path in tmp_path.iterdir()] == ["answers"]
    done = run("--student", folder, "--no-rationale", "--output", "/dev/stdout", "--", "-5 + 7")
    assert (done.returncode, json.loads(done.stdout)["question"]) == (0, "-5 + 7"), done.stderr.decode()


@pytest.mark.slow
@pytest.mark.beside
@ONE_STUDENT
def test_the_job_answers_while_the_pipe_is_open_and_ends_when_nobody_reads(folder: str) -> None:
    process = start("--student", folder)
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    for one in ASKED[:3]:
        process.stdin.write(one.question.encode() + b"\n")
        process.stdin.flush()
        assert json.loads(process.stdout.readline())["label"] == ANSWERS[one.question][0]
    process.stdout.close()
    process.stdin.write(b"What is 3 + 4?\n")
    process.stdin.flush()
    assert process.wait(TIMEOUT) == 128 + signal.SIGPIPE
    errors = process.stderr.read()
    assert b"Traceback" not in errors and b"Broken" not in errors and b"Exception" not in errors


@pytest.mark.slow
@pytest.mark.beside
@ONE_STUDENT
def test_the_job_is_interrupted_between_two_lines_of_a_terminal(folder: str, tmp_path: Path) -> None:
    process = start("--student", folder, "--output", str(tmp_path / "answers"))
    assert process.stdin is not None and process.stderr is not None
    process.stdin.write(b"What is 3 + 4?\n")
    process.stdin.flush()
    until(lambda: any(path.stat().st_size for path in tmp_path.iterdir()), TIMEOUT)
    assert not (tmp_path / "answers").exists()
    process.send_signal(signal.SIGINT)
    assert process.wait(TIMEOUT) == 130
    errors = process.stderr.read()
    assert errors.splitlines()[-1] == b"interrupted by SIGINT"
    assert b"Traceback" not in errors and b"Fatal" not in errors
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.beside
@ONE_STUDENT
def test_the_job_names_what_is_wrong(folder: str, tmp_path: Path) -> None:
    given = LINES.encode() + b'{"question": 3}\n'
    done = run("--student", folder, "--output", str(tmp_path / "answers"), given=given)
    assert done.returncode == 2
    last = done.stderr.decode().strip().splitlines()[-1]
    assert last.startswith("error: standard input:20: column 'question': expected a string, found a number; mend it")
    assert list(tmp_path.iterdir()) == []
    for arguments, message in (
        ((), "the following arguments are required: --student"),
        (("--student", "/nowhere", "a"), "/nowhere: no such folder"),
        (("--student", folder, "--temperature", "hot", "a"), "--temperature: Input should be a valid number"),
        (("--student", folder, "--engine", "gpt", "a"), "--engine: Input should be 'auto', 'vllm'"),
        (("--student", folder, "--engine", "vllm", "a"), "--engine vllm runs no encoder-decoder student"),
        (("--student", folder, "--file", "/nowhere/q.jsonl"), "/nowhere/q.jsonl: not found"),
        (("--student", folder, "--file", "q.jsonl", "a"), "a question and --file are given"),
        (("--student", folder, "--output", "/nowhere/answers", "a"), "/nowhere/answers: cannot be written"),
        (("--student", folder, " "), "the question is empty"),
        (("--student", folder, os.fsdecode(b"a\xff")), "the question is no valid UTF-8"),
        (("--student", folder, "--output", "/dev/full", "a"), "/dev/full: cannot be written"),
    ):
        done = run(*arguments)
        assert (done.returncode, done.stdout) == (2, b""), (arguments, done.stderr.decode())
        last = done.stderr.decode().strip().splitlines()[-1]
        assert last.startswith(f"error: {message}"), last


@pytest.mark.slow
@pytest.mark.beside
@pytest.mark.parametrize("taught", ["llama-tiny"], indirect=True)
def test_vllm_writes_what_the_reference_engine_does_and_nothing_else(folder: str, tmp_path: Path) -> None:
    (tmp_path / "questions.jsonl").write_text(LINES)
    done = run("--student", folder, "--file", str(tmp_path / "questions.jsonl"), "--kv-cache-gib", "1")
    assert done.returncode == 0, done.stderr.decode()
    assert [json.loads(text) for text in done.stdout.decode().splitlines()] == [expected(one) for one in ASKED]
