"""A teacher behind an OpenAI-compatible server: chat completions for chats, completions for plain text.

Every attempt, a retry as well, passes the same gate: requests in flight, requests and tokens a minute, the budget.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import openai

from qcrd_ray.config import TeacherConfig
from qcrd_ray.errors import UserError
from qcrd_ray.sampling.rate_limit import RateLimit, Taken, retry_after
from qcrd_ray.sampling.teacher_engine import Answered, Ask, Prompt, Reply, together

logger = logging.getLogger(__name__)

OPENAI_URL = "https://api.openai.com/v1"
NO_KEY = "none"
"""Sent to servers of one's own, which want no key."""
FIRST_BACKOFF_S = 1.0
LONG_WAIT_S = 60.0
"""Longer ones are announced."""
LONGEST_RETRY_AFTER_S = 3600.0
_TOKENS_OF_PROMPT, _TOKENS_OF_MESSAGE = 24, 8
"""What a chat template adds at most, and for each message."""
_ENDS = {"stop": "stop", "eos": "stop", "eos_token": "stop", "stop_sequence": "stop", "length": "length"}
_RETRIED = (408, 409, 425, 429)
_TOO_LONG = re.compile(
    r"maximum context length|maximum model length|context[ _]length[ _]exceeded|context (window|size)|"
    r"(prompt|input) is too long|reduce the length of the (input|prompt|messages)",
    re.IGNORECASE,
)


@dataclass
class _Tally:
    """What an `Ask` has got so far."""

    replies: dict[int, Reply] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(eq=False)
class _Admission:
    """What a request under way has reserved: tokens of the minute, and cost."""

    taken: Taken
    cost: float


class _Failed(Exception):
    """An attempt that gave no answer.

    Args:
        reason: a few words.
        retry: whether another attempt may do better.
        wait: seconds that the server asks to wait.
        maybe_n: the server may have refused `n` alone.
        at_once: the next request is made as the server wants it, so that this attempt does not count.
    """

    def __init__(
        self,
        reason: str,
        retry: bool = True,
        wait: float | None = None,
        maybe_n: bool = False,
        at_once: bool = False,
    ) -> None:
        super().__init__(reason)
        self.reason, self.retry, self.wait, self.maybe_n, self.at_once = reason, retry, wait, maybe_n, at_once


class OpenAiTeacher:
    """Asks a server through its official client; limits, retries and the budget hold for all asks together.

    Attributes:
        stopped: "budget" once the next request could pass `teacher.endpoint.budget`.
        spent: cost so far, `spent` of earlier sessions among it.
        requests: attempts sent.

    Raises:
        UserError: the key is missing or the URL is none.
    """

    def __init__(self, config: TeacherConfig, stop: tuple[str, ...], spent: float = 0.0) -> None:
        self.stopped: str | None = None
        self.spent = spent
        self.requests = 0
        self._config, self._endpoint, self._stop = config, config.endpoint, stop
        self._url = self._endpoint.base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI_URL
        self._key = _read_key(self._endpoint.api_key_env, self._url)
        self._client: Any = None
        self._slots = asyncio.Semaphore(self._endpoint.max_in_flight)
        self._gate = asyncio.Lock()
        self._changed = asyncio.Event()
        self._limit = RateLimit(self._endpoint.requests_per_minute, self._endpoint.tokens_per_minute)
        self._under_way: set[_Admission] = set()
        self._tokens_per_byte = 0.0
        self._largest_n = 1
        self._refuses_n = self._endpoint.use_n == "never" or config.temperature == 0.0
        self._chat_length = "max_tokens"
        self._fatal: UserError | None = None

    async def ask(self, ask: Ask) -> Answered:
        self._open()
        tally = _Tally()
        await self._sample(ask, ask.indices, 1, tally)
        return Answered(
            dict(sorted(tally.replies.items())),
            dict(sorted(tally.failed.items())),
            tally.prompt_tokens,
            tally.completion_tokens,
        )

    async def close(self) -> None:
        if self._client is not None:
            await self._client.close()

    async def _sample(self, ask: Ask, indices: Sequence[int], attempt: int, tally: _Tally) -> None:
        """Get the samples into the tally, by as few requests as the server has it."""
        runs = [(index,) for index in indices] if self._refuses_n else _contiguous(indices)
        await together([self._run(ask, run, attempt, tally) for run in runs])

    async def _run(self, ask: Ask, run: tuple[int, ...], attempt: int, tally: _Tally) -> None:
        """One request for contiguous indices, and what has to follow it."""
        async with self._slots:
            admission = await self._admit(ask.prompt, len(run))
            if admission is not None:
                again = await self._attempt(ask, run, admission, tally)
        if admission is None:
            if self.stopped is None:
                await self._sample(ask, run, attempt, tally)
            return
        at_once = [index for index, failure in again.items() if failure is None]
        later = {index: failure for index, failure in again.items() if failure is not None}
        await together([self._sample(ask, at_once, attempt, tally), self._after_failure(ask, later, attempt, tally)])

    async def _after_failure(self, ask: Ask, failed: dict[int, _Failed], attempt: int, tally: _Tally) -> None:
        """Ask again, after a while, for samples that an attempt did not give, or give them up."""
        if attempt < self._endpoint.max_attempts:
            retried = {index: failure for index, failure in failed.items() if failure.retry}
        else:
            retried = {}
        tally.failed.update({index: failure.reason for index, failure in failed.items() if index not in retried})
        if not retried:
            return
        longest = min(self._endpoint.max_backoff_s, FIRST_BACKOFF_S * 2.0 ** min(attempt - 1, 30))
        jitter = random.uniform(0.0, longest)
        waits = [failure.wait for failure in retried.values() if failure.wait is not None]
        await asyncio.sleep(max(waits) + min(jitter, 1.0) if waits else jitter)
        await self._sample(ask, sorted(retried), attempt + 1, tally)

    async def _attempt(
        self, ask: Ask, run: tuple[int, ...], admission: _Admission, tally: _Tally
    ) -> dict[int, _Failed | None]:
        """Send a request that was let through.

        Returns:
            Indices that it gave no sample of, and why; None: they are to be asked again at once.
        """
        prompt_tokens, completion_tokens, tokens = 0, 0, admission.taken.tokens
        try:
            self.requests += 1
            answer = await self._send(ask.prompt, len(run), ask.seed + run[0])
            prompt_tokens, completion_tokens = _usage(answer)
            tokens = prompt_tokens + completion_tokens or tokens
            return self._read(answer, run, tally)
        except _Failed as failure:
            # A server that refuses has processed nothing; one that was cut off may have.
            if failure.reason.startswith(("http", "rate", "prompt", "content")):
                tokens = 0.0
            if failure.wait and failure.reason in ("rate limited", "http 503"):
                self._limit.hold(failure.wait)
                if failure.wait > LONG_WAIT_S:
                    logger.warning("%s asks to wait %.0f s", _shown(self._url), failure.wait)
            if failure.maybe_n and self._n_is_new(len(run)):
                self._refuses_n = True
                return dict.fromkeys(run)
            if failure.at_once:
                return dict.fromkeys(run)
            return dict.fromkeys(run, failure)
        except UserError as error:
            self._fatal = error
            raise
        finally:
            tally.prompt_tokens += prompt_tokens
            tally.completion_tokens += completion_tokens
            self.spent += self._cost(prompt_tokens, completion_tokens)
            if prompt_tokens:
                ratio = prompt_tokens / max(1, _bytes(ask.prompt))
                self._tokens_per_byte = max(self._tokens_per_byte, ratio)
            self._limit.settle(admission.taken, tokens)
            self._under_way.discard(admission)
            self._changed.set()

    def _n_is_new(self, n: int) -> bool:
        """Whether a request for `n` choices may have been too much for the server."""
        return self._endpoint.use_n == "auto" and n > self._largest_n

    async def _admit(self, prompt: Prompt, n: int) -> _Admission | None:
        """Wait until a request may go. Returns None where it never may: stopped, or `n` choices are too many."""
        size = _bytes(prompt)
        # No tokenizer makes more tokens of a text than it has bytes; what this one makes is known after an answer.
        most = size + _TOKENS_OF_PROMPT + _TOKENS_OF_MESSAGE * len(prompt.messages or ())
        likely = min(most, size * self._tokens_per_byte) if self._tokens_per_byte else most
        tokens = likely + n * self._config.max_tokens
        cost = self._cost(most, n * self._config.max_tokens)
        async with self._gate:
            while True:
                self._changed.clear()
                if self._fatal is not None:
                    raise UserError(str(self._fatal))
                if self.stopped is not None or (n > 1 and self._refuses_n):
                    return None
                delay = self._limit.delay(tokens)
                if not self._affords(cost):
                    if not self._under_way:
                        self.stopped = "budget"
                        logger.warning("teacher.endpoint.budget=%g: stopped at %g", self._endpoint.budget, self.spent)
                        return None
                    delay = math.inf
                if delay <= 0.0:
                    admission = _Admission(self._limit.take(tokens), cost)
                    self._under_way.add(admission)
                    return admission
                await _wait(self._changed, delay)

    def _affords(self, cost: float) -> bool:
        if self._endpoint.budget is None:
            return True
        reserved = sum(admission.cost for admission in self._under_way)
        return self.spent + reserved + cost <= self._endpoint.budget

    def _cost(self, prompt_tokens: float, completion_tokens: float) -> float:
        return (prompt_tokens * self._endpoint.price_input + completion_tokens * self._endpoint.price_output) / 1e6

    async def _send(self, prompt: Prompt, n: int, seed: int) -> Any:
        """The server's answer, of whatever shape. Raises _Failed and UserError."""
        length = "max_tokens" if prompt.messages is None else self._chat_length
        settings: dict[str, Any] = {
            "model": self._config.model,
            "temperature": self._config.temperature,
            "top_p": self._config.top_p,
            length: self._config.max_tokens,
        }
        if self._endpoint.send_seed:
            settings["seed"] = seed
        if self._stop:
            settings["stop"] = list(self._stop)
        if n > 1:
            settings["n"] = n
        failure: Exception
        try:
            async with asyncio.timeout(self._endpoint.timeout_s):
                if prompt.messages is not None:
                    return await self._client.chat.completions.create(messages=prompt.as_messages(), **settings)
                return await self._client.completions.create(prompt=prompt.text, **settings)
        except (TimeoutError, openai.APITimeoutError):
            failure = _Failed("timeout")
        except openai.APIStatusError as error:
            failure = self._refusal(error, length)
        except openai.APIConnectionError:
            failure = _Failed("connection")
        except (ValueError, openai.OpenAIError):
            failure = _Failed("broken answer")
        # Outside of the handlers: the client's errors hold the request, and that the key.
        raise failure

    def _open(self) -> None:
        """Have a client, in the loop that runs."""
        if self._client is not None:
            return
        # Below warnings they write requests, the URL's password among them.
        for name in ("openai", "httpx2", "httpcore2"):
            logging.getLogger(name).setLevel(logging.WARNING)
        self._client = openai.AsyncOpenAI(
            api_key=self._key, base_url=self._url, timeout=self._endpoint.timeout_s, max_retries=0
        )
        # Their modules load now: inside the first request, that time would be missing between it and the second.
        _ = self._client.chat.completions, self._client.completions

    def _refusal(self, error: openai.APIStatusError, length: str) -> Exception:
        """What an HTTP status other than 2xx means. `length` is the name that the tokens at most were sent under."""
        status, message = error.status_code, self._message(error)
        wait = retry_after(error.response.headers)
        wait = None if wait is None else min(wait, LONGEST_RETRY_AFTER_S)
        variable, url, model = self._endpoint.api_key_env, _shown(self._url), self._config.model
        if status == 402 or error.code == "insufficient_quota":
            return UserError(f"{url}: no credit left ({status}: {message}): top up the account of ${variable}")
        if status in (401, 403):
            return UserError(
                f"{url} refuses the key of ${variable} (teacher.endpoint.api_key_env) ({status}: {message}): "
                "set the variable to a key that is valid there and may use teacher.model"
            )
        if status in (404, 405):
            if error.param == "model" or error.code == "model_not_found" or (model and model in message):
                return UserError(
                    f"teacher.model={model}: unknown to {url} ({status}: {message}): give the server's name of it"
                )
            return UserError(
                f"teacher.endpoint.base_url={url}: nothing there that completes ({status}: {message}): give the URL "
                "as far as its /v1, and teacher.prompt as the server has it (chat or few_shot)"
            )
        if status == 429:
            return _Failed("rate limited", wait=wait)
        if status in _RETRIED or status >= 500:
            return _Failed(f"http {status}", wait=wait)
        if error.code == "context_length_exceeded" or _TOO_LONG.search(message):
            return _Failed("prompt too long", retry=False)
        if error.code == "content_filter":
            return _Failed("content filter", retry=False)
        if error.code == "unsupported_parameter" and length == "max_tokens" and "max_completion_tokens" in message:
            self._chat_length = "max_completion_tokens"
            return _Failed("http 400", at_once=True)
        return _Failed(f"http {status}: {message}", retry=False, maybe_n=status in (400, 422))

    def _message(self, error: openai.APIStatusError) -> str:
        """The server's own words, short, without the key should it repeat it."""
        body = error.body
        if isinstance(body, dict):
            body = body.get("message") or body.get("detail") or body
        text = str(body or error.response.reason_phrase)
        if self._key != NO_KEY:
            text = text.replace(self._key, "***")
        return " ".join(text.split())[:200]

    def _read(self, answer: Any, run: tuple[int, ...], tally: _Tally) -> dict[int, _Failed | None]:
        """Take the samples that are fine into the tally. Returns the others, as `_attempt`."""
        choices = getattr(answer, "choices", None)
        if not isinstance(choices, list) or not choices:
            raise _Failed("broken answer")
        places = [choice.index if isinstance(getattr(choice, "index", None), int) else -1 for choice in choices]
        if len(set(places)) < len(places) or not set(places) <= set(range(len(run))):
            places = list(range(len(choices)))
        again: dict[int, _Failed | None] = {}
        _, completion_tokens = _usage(answer)
        for place, choice in list(zip(places, choices, strict=True))[: len(run)]:
            read = _read_choice(choice, completion_tokens if len(run) == 1 else None)
            if isinstance(read, Reply):
                tally.replies[run[place]] = read
            else:
                again[run[place]] = read
        lacking = [index for index in run if index not in tally.replies and index not in again]
        if not lacking:
            self._largest_n = max(self._largest_n, len(run))
        elif self._n_is_new(len(run)):
            self._refuses_n = True
        # What came is out of the way, so that asking at once for what did not come ends.
        came = any(index in tally.replies for index in run)
        again.update(dict.fromkeys(lacking, None if came else _Failed("broken answer")))
        return again


def _read_key(variable: str, url: str) -> str:
    try:
        parts = urlsplit(url)
        is_url = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_url = False
    if not is_url:
        raise UserError("teacher.endpoint.base_url (OPENAI_BASE_URL) is no URL: expected http://host:8000/v1, say")
    key = os.environ.get(variable, "").strip()
    if not key and parts.hostname == urlsplit(OPENAI_URL).hostname:
        raise UserError(
            f"${variable} is not set, and {_shown(url)} wants a key: set it, or name the variable that holds the key "
            "in teacher.endpoint.api_key_env, or the server in teacher.endpoint.base_url"
        )
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise UserError(f"${variable} (teacher.endpoint.api_key_env) holds characters that no key has: set it anew")
    return key or NO_KEY


def _shown(url: str) -> str:
    """A URL without a password or token in it."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()


def _contiguous(indices: Sequence[int]) -> list[tuple[int, ...]]:
    runs: list[tuple[int, ...]] = []
    for index in indices:
        if runs and runs[-1][-1] + 1 == index:
            runs[-1] = (*runs[-1], index)
        else:
            runs.append((index,))
    return runs


def _bytes(prompt: Prompt) -> int:
    texts = [prompt.text or ""] if prompt.messages is None else [content for _, content in prompt.messages]
    return sum(len(text.encode("utf-8", "replace")) for text in texts)


def _usage(answer: Any) -> tuple[int, int]:
    """Prompt and completion tokens; 0 where the server counts none."""
    usage = getattr(answer, "usage", None)
    counts = [getattr(usage, name, None) for name in ("prompt_tokens", "completion_tokens")]
    prompt, completion = (count if isinstance(count, int) and count > 0 else 0 for count in counts)
    return prompt, completion


def _read_choice(choice: Any, completion_tokens: int | None) -> Reply | _Failed:
    reason = getattr(choice, "finish_reason", None)
    if reason == "content_filter":
        return _Failed("content filter")
    message = getattr(choice, "message", None)
    text = getattr(choice, "text", None) if message is None else getattr(message, "content", None)
    if not isinstance(reason, str) or reason not in _ENDS or not isinstance(text, str | None):
        return _Failed("broken answer")
    if not text or not text.strip():
        return _Failed("empty answer")
    return Reply(text, _ENDS[reason], completion_tokens or None)


async def _wait(event: asyncio.Event, seconds: float) -> None:
    """Until the event, or so long."""
    try:
        async with asyncio.timeout(None if math.isinf(seconds) else seconds):
            await event.wait()
    except TimeoutError:
        pass
