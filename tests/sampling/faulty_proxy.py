"""A proxy before an OpenAI-compatible server that injects, by a seed, what servers and networks do wrong.

The answers it does not spoil are the server's own. It keeps a record of every request.
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import random
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from aiohttp import ClientSession, TCPConnector, web

FAULTS = (
    "rate_limit",
    "rate_limit_date",
    "server_error",
    "hang",
    "cut_before",
    "cut_inside",
    "broken_json",
    "html",
    "no_choices",
    "filtered",
    "empty",
)


@dataclass(eq=False)
class Seen:
    """One request that arrived.

    Attributes:
        arrived, left: seconds of the monotonic clock; `left` when the answer was out or the connection ended.
        in_flight: requests at work as it arrived, itself among them.
        fault: what was done to it; None for nothing.
        answered: seeds of the choices that left unspoilt.
        tokens: of prompt and completion, as the server counted.
        asked_to_wait: seconds of the Retry-After it was given.
    """

    path: str
    body: dict[str, Any]
    headers: dict[str, str]
    arrived: float
    in_flight: int
    left: float = float("inf")
    fault: str | None = None
    status: int = 0
    answered: list[int] = field(default_factory=list)
    tokens: int = 0
    asked_to_wait: float = 0.0

    @property
    def n(self) -> int:
        return int(self.body.get("n", 1))


class FaultyProxy:
    """Runs in a thread of its own until `close`.

    Args:
        upstream: the server, without `/v1`.

    Attributes:
        share: of the requests that get one of `faults`.
        n_mode: `refuse` answers n > 1 with a 400, `one` with one choice, `pass` as the server does.
        scripted: faults of the next requests, before any is drawn; `fine` for none.
        error: for the fault `error`: status, body and headers.
        retry_after: seconds.
        delay: seconds before any answer.
        new_names: a chat has to say `max_completion_tokens`.
    """

    def __init__(self, upstream: str) -> None:
        self.upstream = upstream
        self.reset()
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        started = threading.Event()
        self._thread = threading.Thread(target=lambda: self._loop.run_until_complete(self._serve(started)), daemon=True)
        self._thread.start()
        assert started.wait(30), "the proxy did not start"

    def reset(self, share: float = 0.0, seed: int = 0) -> None:
        self.share, self.faults, self.n_mode, self.retry_after = share, FAULTS, "pass", 1.0
        self.delay, self.new_names = 0.0, False
        self.scripted: list[str] = []
        self.error: tuple[int, Any, dict[str, str]] = (400, {}, {})
        self.seen: list[Seen] = []
        self._random = random.Random(seed)
        self._at_work = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}/v1"

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(30)

    async def _serve(self, started: threading.Event) -> None:
        app = web.Application(client_max_size=1 << 26)
        app.router.add_route("*", "/{path:.*}", self._handle)
        # A client that hangs up ends its request here and at the server.
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self._port = runner.addresses[0][1]
        # A connection that is used again may be one that the server has just closed.
        async with ClientSession(connector=TCPConnector(force_close=True, limit=0)) as self._session:
            started.set()
            await self._stop.wait()
        await runner.cleanup()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        arrived = time.monotonic()
        body = json.loads(await request.read() or b"{}")
        self._at_work += 1
        seen = Seen(request.path, body, dict(request.headers), arrived, self._at_work)
        self.seen.append(seen)
        if self.scripted:
            seen.fault = self.scripted.pop(0)
        elif self._random.random() < self.share:
            seen.fault = self._random.choice(self.faults)
        try:
            return await self._answer(request, seen)
        finally:
            self._at_work -= 1
            seen.left = time.monotonic()

    async def _answer(self, request: web.Request, seen: Seen) -> web.StreamResponse:
        assert request.transport is not None
        if self.delay:
            await asyncio.sleep(self.delay)
        if seen.fault == "error":
            status, body, headers = self.error
            seen.status = status
            return web.json_response(body, status=status, headers=headers)
        if seen.fault in ("rate_limit", "rate_limit_date"):
            seen.status, seen.asked_to_wait = 429, self.retry_after
            value = f"{self.retry_after:g}"
            if seen.fault == "rate_limit_date":
                # Whole seconds, rounded up.
                value = email.utils.formatdate(time.time() + self.retry_after + 1.0, usegmt=True)
            return web.json_response({"error": {"message": "slow down"}}, status=429, headers={"Retry-After": value})
        if seen.fault == "server_error":
            seen.status = 500
            return web.Response(text="<html>oops</html>", status=500, content_type="text/html")
        if seen.fault == "hang":
            await asyncio.sleep(600)
        if seen.fault == "cut_before":
            request.transport.abort()
            return web.Response()
        if seen.fault == "html":
            return web.Response(text="<html>log in</html>", content_type="text/html")
        n = seen.n
        if n > 1 and self.n_mode == "refuse":
            seen.status = 400
            return web.json_response({"error": {"message": "n > 1 is not supported", "code": None}}, status=400)
        if self.new_names and "max_tokens" in seen.body and "messages" in seen.body:
            seen.status = 400
            error = {
                "message": "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.",
                "param": "max_tokens",
                "code": "unsupported_parameter",
            }
            return web.json_response({"error": error}, status=400)
        sent = dict(seen.body)
        if n > 1 and self.n_mode == "one":
            del sent["n"]
        keep = {name: value for name, value in request.headers.items() if name.lower() in ("content-type",)}
        async with self._session.request(
            request.method, self.upstream + request.path_qs, data=json.dumps(sent).encode(), headers=keep
        ) as response:
            raw, seen.status = await response.read(), response.status
        if seen.status != 200:
            return web.Response(body=raw, status=seen.status, content_type="application/json")
        answer = json.loads(raw)
        choices = answer["choices"]
        seeds = [seen.body.get("seed", 0) + choice["index"] for choice in choices]
        if seen.fault == "no_choices":
            choices, seeds = [], []
        if seen.fault == "filtered":
            choices[0]["finish_reason"], seeds = "content_filter", seeds[1:]
        if seen.fault == "empty":
            seeds = seeds[:-1]
            if "message" in choices[-1]:
                choices[-1]["message"]["content"] = None
            else:
                choices[-1]["text"] = " \n"
        # Answers may come in any order.
        self._random.shuffle(choices)
        raw = json.dumps(answer | {"choices": choices}).encode()
        seen.tokens = answer["usage"]["total_tokens"]
        if seen.fault == "broken_json":
            return web.Response(body=raw[: len(raw) // 2], content_type="application/json")
        if seen.fault == "cut_inside":
            cut = web.StreamResponse(headers={"Content-Type": "application/json", "Content-Length": str(len(raw))})
            await cut.prepare(request)
            await cut.write(raw[: len(raw) // 2])
            request.transport.abort()
            return cut
        seen.answered = seeds
        return web.Response(body=raw, content_type="application/json")


def most_in_a_window(times: list[float], seconds: float) -> int:
    """How many of the times lie within so many seconds, where most do."""
    return max(sum(start <= other < start + seconds for other in times) for start in times)
