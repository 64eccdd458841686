"""The teacher behind a server: a real vLLM, through a proxy that spoils a share of what it answers."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from qcrd_ray.config import TeacherConfig
from qcrd_ray.errors import UserError
from qcrd_ray.sampling import rate_limit
from qcrd_ray.sampling.openai import OpenAiTeacher
from qcrd_ray.sampling.teacher_engine import Answered, Ask, Prompt
from tests.sampling.faulty_proxy import FAULTS, FaultyProxy, most_in_a_window
from tests.sampling.tiny_server import CONTEXT, MODEL, tiny_server

KEY = "sk-quite-secret-0123456789"


def config(url: str | None, max_tokens: int = 12, model: str = MODEL, **endpoint: Any) -> TeacherConfig:
    settings = {"base_url": url, "max_in_flight": 8, "timeout_s": 20.0, "max_backoff_s": 0.2, "max_attempts": 25}
    settings["send_seed"] = True
    return TeacherConfig(
        engine="openai", model=model, temperature=1.0, max_tokens=max_tokens, endpoint={**settings, **endpoint}
    )


def chat(number: int) -> Prompt:
    return Prompt(messages=(("system", "Add."), ("user", f"What is {number} + 4?")))


def plain(number: int) -> Prompt:
    return Prompt(text=f"What is {number} + 4?")


def asks(count: int, indices: tuple[int, ...] = (0, 1, 2, 4)) -> list[Ask]:
    """Chats and plain texts in turn; no seed is asked twice."""
    return [
        Ask(f"q{number}", (chat if number % 2 else plain)(number), indices, 1000 * number) for number in range(count)
    ]


def run(
    config: TeacherConfig, asked: Sequence[Ask], stop: tuple[str, ...] = ()
) -> tuple[OpenAiTeacher, list[Answered]]:
    teacher = OpenAiTeacher(config, stop)

    async def work() -> list[Answered]:
        try:
            return await asyncio.gather(*(teacher.ask(ask) for ask in asked))
        finally:
            await teacher.close()

    return teacher, asyncio.run(asyncio.wait_for(work(), 120))


def texts(answers: Sequence[Answered]) -> list[dict[int, str]]:
    return [{index: reply.text for index, reply in answer.replies.items()} for answer in answers]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with tiny_server(tmp_path_factory.mktemp("server")) as url:
        yield url


@pytest.fixture(scope="module")
def module_proxy(server: str) -> Iterator[FaultyProxy]:
    proxy = FaultyProxy(server)
    yield proxy
    proxy.close()


@pytest.fixture
def proxy(module_proxy: FaultyProxy) -> FaultyProxy:
    module_proxy.reset()
    return module_proxy


@pytest.fixture
def refusing() -> Iterator[FaultyProxy]:
    """A proxy with no server behind it, that answers every request with its `error`."""
    proxy = FaultyProxy("http://127.0.0.1:9")
    proxy.share, proxy.faults = 1.0, ("error",)
    yield proxy
    proxy.close()


def test_a_key_is_wanted_by_the_default_server_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "TEACHER_KEY"):
        monkeypatch.delenv(name, raising=False)
    for url in (None, "https://api.openai.com/v1"):
        with pytest.raises(UserError, match="TEACHER_KEY"):
            OpenAiTeacher(config(url, api_key_env="TEACHER_KEY"), ())
    OpenAiTeacher(config("http://host:8000/v1"), ())
    monkeypatch.setenv("OPENAI_BASE_URL", "http://host:8000/v1")
    OpenAiTeacher(config(None), ())
    monkeypatch.setenv("TEACHER_KEY", f"{KEY}\u2026")
    with pytest.raises(UserError, match="TEACHER_KEY") as error:
        OpenAiTeacher(config(None, api_key_env="TEACHER_KEY"), ())
    assert KEY not in str(error.value)
    for url in ("host:8000/v1", "http://", "http://[host/v1", "http://host:port/v1"):
        with pytest.raises(UserError, match="base_url"):
            OpenAiTeacher(config(url), ())


@pytest.mark.parametrize(
    ("status", "body", "named"),
    [
        (401, {"error": {"message": f"Incorrect API key provided: {KEY}", "code": "invalid_api_key"}}, "TEACHER_KEY"),
        (403, {"error": {"message": "not allowed"}}, "TEACHER_KEY"),
        (404, {"error": {"message": f"no model `{MODEL}`", "code": "model_not_found"}}, "teacher.model"),
        (404, {"detail": "Not Found"}, "teacher.endpoint.base_url"),
        (429, {"error": {"message": "quota", "code": "insufficient_quota"}}, "TEACHER_KEY"),
    ],
)
def test_what_no_question_can_be_answered_with_ends_all(
    refusing: FaultyProxy,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    status: int,
    body: dict[str, Any],
    named: str,
) -> None:
    monkeypatch.setenv("TEACHER_KEY", KEY)
    refusing.error = (status, body, {})
    refusing.delay = 0.2
    with caplog.at_level(logging.DEBUG), pytest.raises(UserError, match=named) as error:
        run(config(refusing.url, api_key_env="TEACHER_KEY"), asks(30))
    assert str(status) in str(error.value)
    assert {seen.headers["Authorization"] for seen in refusing.seen} == {f"Bearer {KEY}"}
    assert len(refusing.seen) <= 8
    shown = caplog.text + repr(error.value) + str(error.getrepr(style="long", showlocals=False))
    assert KEY not in shown
    chain: BaseException | None = error.value
    while chain is not None:
        assert KEY not in repr(chain) and not hasattr(chain, "request")
        chain = chain.__cause__ or chain.__context__


@pytest.mark.parametrize(
    ("status", "error", "reason"),
    [
        (400, {"message": "too much", "code": "context_length_exceeded"}, "prompt too long"),
        (400, {"message": "flagged", "code": "content_filter"}, "content filter"),
        (400, {"message": "temperature: no\nsuch"}, "http 400: temperature: no such"),
        (413, {"message": "large"}, "http 413: large"),
        (422, {"message": "x" * 999}, "http 422: " + "x" * 200),
    ],
)
def test_what_is_wrong_with_a_request_is_not_asked_again(
    refusing: FaultyProxy, status: int, error: dict[str, Any], reason: str
) -> None:
    refusing.error = (status, {"error": error}, {})
    _, [answer] = run(config(refusing.url, use_n="always"), asks(1, (3, 4)))
    assert answer == Answered({}, {3: reason, 4: reason})
    assert len(refusing.seen) == 1


def test_attempts_end(refusing: FaultyProxy) -> None:
    refusing.error = (429, {}, {"Retry-After-Ms": "10"})
    teacher, [answer] = run(config(refusing.url, max_attempts=3), asks(1, (0, 1)))
    assert answer.failed == {0: "rate limited", 1: "rate limited"}
    assert teacher.requests == len(refusing.seen) == 3
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    teacher, [answer] = run(config(f"http://127.0.0.1:{port}/v1", max_attempts=2), asks(1, (0,)))
    assert answer.failed == {0: "connection"} and teacher.requests == 2


def test_an_attempt_waits_as_long_as_the_server_asks(refusing: FaultyProxy) -> None:
    refusing.error = (500, {}, {"Retry-After": "1"})
    _, [answer] = run(config(refusing.url, max_attempts=2), asks(1, (0,)))
    assert answer.failed == {0: "http 500"}
    first, second = refusing.seen
    assert 1.0 <= second.arrived - first.arrived < 3.0


@pytest.mark.slow
def test_every_sample_comes_once_whatever_goes_wrong(proxy: FaultyProxy, server: str) -> None:
    asked = asks(64)
    _, expected = run(config(f"{server}/v1", max_attempts=1), asked)
    # A few are empty with their seed, whenever they are asked.
    asked, expected = zip(*[(a, e) for a, e in zip(asked, expected, strict=True) if not e.failed], strict=True)
    assert len(asked) >= 50

    proxy.reset(share=0.3, seed=1)
    proxy.retry_after = 0.5
    teacher, answers = run(config(proxy.url, timeout_s=4.0), asked)
    assert [sorted(answer.replies) for answer in answers] == [[0, 1, 2, 4]] * len(asked)
    assert texts(answers) == texts(expected)
    assert not any(answer.failed for answer in answers)
    assert teacher.requests == len(proxy.seen)
    assert {seen.fault for seen in proxy.seen} >= set(FAULTS)

    answered: set[int] = set()
    for seen in proxy.seen:
        assert not answered & set(range(seen.body["seed"], seen.body["seed"] + seen.n))
        answered.update(seen.answered)
    assert answered == {ask.seed + index for ask in asked for index in ask.indices}
    assert 4 < max(seen.in_flight for seen in proxy.seen) <= 8
    assert {seen.body["top_p"] for seen in proxy.seen} == {1.0}
    assert not any("stop" in seen.body for seen in proxy.seen)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["refuse", "one"])
def test_a_server_without_n_is_asked_for_single_samples(proxy: FaultyProxy, mode: str) -> None:
    asked = asks(16, (0, 1, 2))
    _, expected = run(config(proxy.url), asked)
    assert {seen.n for seen in proxy.seen} == {3}
    assert all(reply.completion_tokens is None for answer in expected for reply in answer.replies.values())

    proxy.reset(share=0.3, seed=2)
    proxy.faults, proxy.n_mode = ("server_error", "cut_inside", "empty"), mode
    _, answers = run(config(proxy.url, max_in_flight=4), asked)
    assert texts(answers) == texts(expected)
    assert 1 <= sum(seen.n > 1 and seen.fault is None for seen in proxy.seen) <= 4
    assert sum(seen.n > 1 for seen in proxy.seen) <= 8
    if mode == "refuse":
        assert all(1 <= reply.completion_tokens <= 12 for answer in answers for reply in answer.replies.values())

    proxy.reset()
    _, answers = run(config(proxy.url, use_n="never"), asked)
    assert texts(answers) == texts(expected)
    assert {seen.n for seen in proxy.seen} == {1}


@pytest.mark.slow
def test_n_is_asked_again_where_it_is_always_wanted(proxy: FaultyProxy) -> None:
    proxy.n_mode = "one"
    _, [answer] = run(config(proxy.url, use_n="always", max_attempts=2), asks(1, (0, 1, 2, 3)))
    assert [seen.n for seen in proxy.seen] == [4, 3, 2, 1]
    assert sorted(answer.replies) == [0, 1, 2, 3]


@pytest.mark.slow
def test_a_server_that_has_a_newer_name_for_the_length(proxy: FaultyProxy) -> None:
    asked = asks(8, (0, 1))
    _, expected = run(config(proxy.url), asked)
    proxy.reset()
    proxy.new_names = True
    _, answers = run(config(proxy.url, max_in_flight=2, max_attempts=1), asked)
    assert texts(answers) == texts(expected)
    assert {seen.n for seen in proxy.seen} == {2}
    assert 1 <= sum(seen.status == 400 for seen in proxy.seen) <= 2


@pytest.mark.slow
def test_what_came_of_a_spoilt_answer_is_kept(proxy: FaultyProxy) -> None:
    asked = Ask("q", plain(3), (2, 3, 4), 70)
    _, [expected] = run(config(proxy.url), [asked])
    for fault, missing in (("filtered", 72), ("empty", 74)):
        proxy.reset()
        proxy.scripted = [fault]
        _, [answer] = run(config(proxy.url), [asked])
        assert texts([answer]) == texts([expected])
        assert [(seen.body["seed"], seen.n) for seen in proxy.seen] == [(72, 3), (missing, 1)]
        assert answer.prompt_tokens + answer.completion_tokens == sum(seen.tokens for seen in proxy.seen)
        proxy.reset()
        proxy.scripted = [fault]
        _, [answer] = run(config(proxy.url, max_attempts=1), [asked])
        assert answer.failed == {missing - 70: {"filtered": "content filter", "empty": "empty answer"}[fault]}
        assert len(answer.replies) == 2


@pytest.mark.slow
def test_requests_a_minute(proxy: FaultyProxy) -> None:
    proxy.reset(share=0.3, seed=3)
    proxy.faults, proxy.retry_after = ("server_error", "rate_limit", "cut_before"), 0.1
    begin = time.monotonic()
    _, answers = run(config(proxy.url, requests_per_minute=300, max_in_flight=32), asks(30, (0,)))
    assert all(answer.replies for answer in answers)
    arrived = [seen.arrived for seen in proxy.seen]
    assert len(arrived) > 34
    for seconds in (3, 6):
        # One more where a busy machine held one up on its way.
        assert most_in_a_window(arrived, seconds) <= 5 * seconds + 1
    assert time.monotonic() - begin < 0.25 * len(arrived) + 2.0


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["rate_limit", "rate_limit_date"])
def test_a_server_that_asks_to_wait_is_left_alone(proxy: FaultyProxy, fault: str) -> None:
    proxy.scripted, proxy.retry_after = ["fine", fault, "fine", fault], 1.0
    run(config(proxy.url, max_in_flight=1), asks(6, (0,)))
    assert len(proxy.seen) == 8
    waited = [after.arrived - seen.left for seen, after in pairwise(proxy.seen) if seen.asked_to_wait]
    assert len(waited) == 2 and min(waited) >= 1.0


@pytest.mark.slow
def test_tokens_a_minute(proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rate_limit, "MINUTE", 3.0)
    begin = time.monotonic()
    _, answers = run(config(proxy.url, tokens_per_minute=200), asks(16, (0, 1)))
    assert all(len(answer.replies) == 2 for answer in answers)
    total = sum(seen.tokens for seen in proxy.seen)
    for place in ("arrived", "left"):
        for start in (getattr(seen, place) for seen in proxy.seen):
            inside = [seen.tokens for seen in proxy.seen if start <= getattr(seen, place) < start + 2.95]
            assert sum(inside) <= 200
    assert total > 400
    assert time.monotonic() - begin < 3.0 * (2.5 * total / 200 + 1)


@pytest.mark.slow
def test_the_budget_is_never_passed(proxy: FaultyProxy) -> None:
    proxy.reset(share=0.2, seed=4)
    proxy.faults = ("server_error", "empty", "filtered", "no_choices")
    prices = {"price_input": 1.0, "price_output": 3.0, "budget": 3e-3}
    spent = []
    teacher = OpenAiTeacher(config(proxy.url, **prices), (), spent=1e-3)

    async def work() -> tuple[list[Answered], Answered]:
        async def one(ask: Ask) -> Answered:
            answer = await teacher.ask(ask)
            spent.append(teacher.spent)
            return answer

        answers = await asyncio.gather(*(one(ask) for ask in asks(40)))
        requests = teacher.requests
        more = await teacher.ask(asks(1)[0])
        assert teacher.requests == requests
        await teacher.close()
        return answers, more

    answers, more = asyncio.run(asyncio.wait_for(work(), 120))
    assert teacher.stopped == "budget"
    assert more == Answered()
    assert max(spent) <= 3e-3
    cost = sum(answer.prompt_tokens + 3 * answer.completion_tokens for answer in answers) / 1e6
    assert teacher.spent == pytest.approx(1e-3 + cost)
    assert teacher.spent > 2.6e-3
    assert not any(answer.failed for answer in answers)
    assert 0 < sum(len(answer.replies) for answer in answers) < 160


@pytest.mark.slow
def test_a_prompt_too_long_fails_at_once_and_alone(proxy: FaultyProxy) -> None:
    long = "What is 1 + 2? " * CONTEXT
    asked = [
        Ask("a", Prompt(text=long), (0, 1), 0),
        Ask("b", Prompt(messages=(("user", long[: 5 * CONTEXT - 100]),)), (0,), 10),
        Ask("c", chat(1), (0, 1), 20),
    ]
    _, [a, b, c] = run(config(proxy.url), asked)
    assert a.failed == {0: "prompt too long", 1: "prompt too long"} and not a.replies
    assert b.failed == {0: "prompt too long"}
    assert sorted(c.replies) == [0, 1]
    assert len(proxy.seen) == 3


@pytest.mark.slow
def test_an_unknown_model_and_a_wrong_url(proxy: FaultyProxy) -> None:
    for prompt in (chat(1), plain(1)):
        with pytest.raises(UserError, match=r"teacher\.model=other.*does not exist"):
            run(config(proxy.url, model="other"), [Ask("a", prompt, (0, 1), 0)])
        with pytest.raises(UserError, match=r"teacher\.endpoint\.base_url=http://127.*/v1"):
            run(config(proxy.url.removesuffix("/v1")), [Ask("a", prompt, (0, 1), 0)])
    assert len(proxy.seen) == 4


@pytest.mark.slow
def test_stop_texts_and_no_n_without_randomness(proxy: FaultyProxy) -> None:
    asked = Ask("a", plain(1), (0, 1), 0)
    _, [free] = run(config(proxy.url, max_tokens=40), [asked])
    end = free.replies[0].text[5:6]
    _, [ended] = run(config(proxy.url, max_tokens=40), [asked], (end,))
    assert ended.replies[0].text == free.replies[0].text.partition(end)[0]
    assert ended.replies[0].finish_reason == "stop" and free.replies[0].finish_reason == "length"

    proxy.reset()
    greedy = config(proxy.url).model_copy(update={"temperature": 0.0})
    _, [answer] = run(greedy, [Ask("a", chat(1), (0, 1), 0)])
    assert answer.replies[0] == answer.replies[1]
    assert {seen.n for seen in proxy.seen} == {1}


def within(teacher: OpenAiTeacher, work: Callable[[], Awaitable[None]]) -> None:
    async def whole() -> None:
        await work()
        await teacher.close()

    asyncio.run(asyncio.wait_for(whole(), 60))


@pytest.mark.slow
def test_a_cancelled_ask_leaves_its_slot(proxy: FaultyProxy) -> None:
    teacher = OpenAiTeacher(config(proxy.url, max_in_flight=1, budget=1.0, price_output=1.0), ())

    async def work() -> None:
        proxy.scripted = ["hang"]
        first, second = asks(2)
        waiting = asyncio.create_task(teacher.ask(first))
        behind = asyncio.create_task(teacher.ask(second))
        await asyncio.sleep(0.5)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert len((await behind).replies) == 4
        assert len((await teacher.ask(first)).replies) == 4

    within(teacher, work)
    assert max(seen.in_flight for seen in proxy.seen) == 1


@pytest.mark.slow
def test_who_waits_for_a_retry_keeps_nobody_waiting(proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random, "uniform", lambda low, high: high)
    teacher = OpenAiTeacher(config(proxy.url, max_in_flight=1, max_backoff_s=8.0), ())

    async def work() -> None:
        proxy.scripted = ["server_error", "server_error", "fine"]
        await asyncio.gather(*(teacher.ask(ask) for ask in asks(3, (0,))))

    within(teacher, work)
    first, second = (seen for seen in proxy.seen[:2])
    assert [seen.body["seed"] for seen in proxy.seen[:3]] == [0, 1000, 2000]
    again = {seen.body["seed"]: seen.arrived for seen in proxy.seen[3:]}
    assert 1.0 <= again[0] - first.left < 1.6 and 1.0 <= again[1000] - second.left < 1.6


# Through the job

QUESTIONS = 24


def job(folder: Path, output: Path, url: str, *arguments: str) -> list[str]:
    rows = [{"id": f"q{n}", "question": f"What is {n} + 4?", "answer": str(n + 4)} for n in range(QUESTIONS)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        *(sys.executable, str(Path(__file__).parents[2] / "jobs" / "sample_teacher.py"), "task=custom"),
        # A random model says no answer: the first words of what it writes are one.
        *(f"data.path={folder}", "custom.answer_pattern=(?s)^(?P<answer>.{3})", "labels=teacher_vote"),
        *("teacher.engine=openai", f"teacher.model={MODEL}", f"teacher.endpoint.base_url={url}"),
        *("teacher.temperature=1.0", "teacher.samples=3", "teacher.max_tokens=12", f"output={output}"),
        *("teacher.endpoint.timeout_s=20", "teacher.endpoint.max_backoff_s=0.2", "teacher.endpoint.max_attempts=25"),
        *("teacher.endpoint.max_in_flight=6", *arguments),
    ]


def finish(command: list[str]) -> dict[str, Any]:
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=480, check=False, env={**os.environ, "OPENAI_API_KEY": KEY}
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert KEY not in done.stdout + done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@pytest.mark.slow
def test_the_job_behind_a_faulty_server_is_complete_in_spite_of_a_kill(proxy: FaultyProxy, tmp_path: Path) -> None:
    proxy.share, proxy.faults = 0.3, tuple(fault for fault in FAULTS if fault != "hang")
    output, rate = tmp_path / "out", 600.0
    command = job(tmp_path, output, proxy.url, f"teacher.endpoint.requests_per_minute={rate}")
    killed = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while sum(seen.fault is None and math.isfinite(seen.left) for seen in proxy.seen) < 8:
        assert killed.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    killed.kill()
    killed.wait()

    result = finish(command)
    sampling = result["sampling"]
    assert sampling["samples_wanted"] == 3 * QUESTIONS
    assert sampling["reused"] > 0 and sampling["sampled"] == 3 * QUESTIONS - sampling["reused"]
    assert sampling["failed"]["samples"] == 0
    rows = pq.read_table(output / "teacher_samples").to_pylist()
    assert sorted((r["id"], r["sample_index"]) for r in rows) == sorted(
        (f"q{n}", i) for n in range(QUESTIONS) for i in range(3)
    )
    arrived = sorted(seen.arrived for seen in proxy.seen)
    for first in range(len(arrived)):
        within = sum(arrived[first] <= moment < arrived[first] + 5.0 for moment in arrived[first:])
        assert within <= 5.0 * rate / 60.0 + 1

    proxy.reset()
    assert finish(command)["sampling"]["sampled"] == 0
    assert proxy.seen == [], "samples that are there were asked for"
    for file in (path for path in tmp_path.rglob("*") if path.is_file()):
        assert KEY.encode() not in file.read_bytes(), file


def test_a_key_that_is_refused_ends_the_job_with_one_line(refusing: FaultyProxy, tmp_path: Path) -> None:
    refusing.error = (401, {"error": {"message": f"wrong key {KEY}", "code": "invalid_api_key"}}, {})
    command = job(tmp_path, tmp_path / "out", refusing.url)
    environment = {**os.environ, "OPENAI_API_KEY": KEY}
    done = subprocess.run(command, capture_output=True, text=True, timeout=480, check=False, env=environment)
    assert done.returncode == 2, done.stderr
    assert "refuses the key of $OPENAI_API_KEY" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr and KEY not in done.stderr + done.stdout and done.stdout == ""
    assert len(refusing.seen) <= 12, "a server that refuses the key is not asked on and on"


@pytest.mark.slow
def test_a_budget_ends_the_job_cleanly_and_a_larger_one_goes_on(proxy: FaultyProxy, tmp_path: Path) -> None:
    output = tmp_path / "out"
    prices = ("teacher.endpoint.price_input=1000", "teacher.endpoint.price_output=5000")
    command = job(tmp_path, output, proxy.url, *prices, "teacher.endpoint.budget=2.0")
    result = finish(command)
    sampling = result["sampling"]
    assert sampling["stopped"] == "budget"
    assert 0 < sampling["sampled"] < 3 * QUESTIONS
    assert 0.5 < sampling["cost"] <= 2.0
    again = finish(command)["sampling"]
    assert (again["reused"], again["stopped"]) == (sampling["sampled"], "budget")
    assert again["cost_of_all_samples"] <= 2.0, "what earlier runs spent counts"
    whole = finish([*command, "teacher.endpoint.budget=50"])["sampling"]
    assert (whole["stopped"], whole["reused"] + whole["sampled"]) == (None, 3 * QUESTIONS)
    assert whole["cost_of_all_samples"] > 2.0

    few = job(tmp_path, tmp_path / "few", proxy.url, *prices, "teacher.endpoint.budget=0.5", "data.limit=6")
    assert finish(few)["sampling"]["stopped"] == "budget", "all were under way as it ended"


@pytest.mark.slow
def test_questions_that_fail_are_named_and_asked_again(proxy: FaultyProxy, tmp_path: Path) -> None:
    output = tmp_path / "out"
    proxy.share, proxy.faults = 0.5, ("filtered",)
    command = job(tmp_path, output, proxy.url, "teacher.endpoint.max_attempts=1")
    done = subprocess.run(command, capture_output=True, text=True, timeout=480, check=False)
    assert done.returncode == 1, done.stderr[-3000:]
    result = json.loads(done.stdout)
    failed = result["sampling"]["failed"]
    # The random model's own empty samples are beside them.
    assert failed["reasons"]["content filter"] >= 5 and set(failed["reasons"]) <= {"content filter", "empty answer"}
    assert sum(failed["reasons"].values()) == failed["samples"] and failed["share"] > 0.05
    assert done.stderr.splitlines()[-1].startswith(f"error: {failed['questions']} of {QUESTIONS} questions failed")
    lines = [json.loads(line) for line in (output / "failed_samples.jsonl").read_text().splitlines()]
    assert len(lines) == failed["samples"] and {line["reason"] for line in lines} == set(failed["reasons"])
    proxy.reset()
    sampling = finish([*command, "teacher.endpoint.max_attempts=25"])["sampling"]
    assert (sampling["sampled"], sampling["failed"]["samples"]) == (failed["samples"], 0)
    assert not (output / "failed_samples.jsonl").exists()
