"""A teacher on the machine's own GPUs or CPUs: vLLM, or transformers for what vLLM cannot run.

A thread owns the engine. It takes in questions as they are asked and steps all of them together, so that a question
that ends makes room for the next one, whatever chunk either belongs to.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from qcrd_ray.sampling.engine import EngineSpec, Generation, Request, SamplingParameters
from qcrd_ray.sampling.teacher_engine import Answered, Ask, Prompt, Reply


class _SteppedEngine(Protocol):
    """An engine that takes requests in while others are at work."""

    @property
    def context(self) -> int: ...

    def add(self, name: str, request: Request) -> None: ...

    def step(self) -> list[tuple[str, list[Generation]]]: ...

    def close(self) -> None: ...


@dataclass
class _Work:
    """A question under way, in one request for each run of consecutive sample indices."""

    ask: Ask
    prompt: tuple[int, ...]
    loop: asyncio.AbstractEventLoop
    answer: asyncio.Future[Answered]
    missing: int = 0
    replies: dict[int, Reply] = field(default_factory=dict)


class LocalTeacher:
    """vLLM or transformers behind the interface of a teacher."""

    def __init__(self, spec: EngineSpec, parameters: SamplingParameters) -> None:
        """Start the engine, which takes from seconds to minutes."""
        self.stopped: str | None = None
        self._spec, self._parameters = spec, parameters
        self._asked: queue.Queue[_Work | None] = queue.Queue()
        self._error: BaseException | None = None
        self._context = 0
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="teacher engine", daemon=True)
        self._thread.start()
        self._ready.wait()
        if self._error is not None:
            raise self._error
        self._tokenizer: Any = _tokenizer(spec)

    async def ask(self, ask: Ask) -> Answered:
        """Sample a question. A prompt that leaves the context no room for a token is `prompt too long`."""
        if self._error is not None:
            raise self._error
        prompt = self._encode(ask.prompt)
        if not 0 < len(prompt) < self._context:
            reason = "prompt too long" if prompt else "empty prompt"
            return Answered(failed=dict.fromkeys(ask.indices, reason))
        loop = asyncio.get_running_loop()
        work = _Work(ask, prompt, loop, loop.create_future(), len(ask.indices))
        self._asked.put(work)
        return await work.answer

    def _encode(self, prompt: Prompt) -> tuple[int, ...]:
        if prompt.messages is None:
            return tuple(self._tokenizer(prompt.text)["input_ids"])
        # The template writes the special tokens itself.
        text = self._tokenizer.apply_chat_template(prompt.as_messages(), tokenize=False, add_generation_prompt=True)
        return tuple(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    async def close(self) -> None:
        self._asked.put(None)
        await asyncio.to_thread(self._thread.join, 30.0)

    # The engine's thread.

    def _run(self) -> None:
        at_work: dict[str, tuple[_Work, tuple[int, ...]]] = {}
        try:
            engine = _start(self._spec)  # here, as the number of threads is a property of the thread
            self._context = engine.context
            _warm_up(engine)
            self._ready.set()
            number = 0
            while True:
                for work in self._take(wait=not at_work):
                    if work is None:
                        engine.close()
                        return
                    for run in _runs(work.ask.indices):
                        name = str(number)
                        number += 1
                        at_work[name] = (work, run)
                        engine.add(name, self._request(work, run))
                for name, generations in engine.step():
                    self._done(*at_work.pop(name), generations)
        except BaseException as error:
            self._error = error
            self._ready.set()
            for work in {id(work): work for work, _ in at_work.values()}.values():
                work.loop.call_soon_threadsafe(_fail, work.answer, error)

    def _take(self, wait: bool) -> list[_Work | None]:
        """Questions that have been asked; waits for one where nothing is at work."""
        taken = [self._asked.get()] if wait else []
        while True:
            try:
                taken.append(self._asked.get_nowait())
            except queue.Empty:
                return taken

    def _request(self, work: _Work, run: tuple[int, ...]) -> Request:
        room = min(self._parameters.max_tokens, self._context - len(work.prompt))
        return Request(work.prompt, replace(self._parameters, max_tokens=room), work.ask.seed + run[0], len(run))

    def _done(self, work: _Work, run: tuple[int, ...], generations: Sequence[Generation]) -> None:
        for index, generation in zip(run, generations, strict=True):
            tokens = len(generation.token_ids) + (generation.finish_reason == "stop")
            work.replies[index] = Reply(generation.text, generation.finish_reason, tokens)
        work.missing -= len(run)
        if not work.missing:
            tokens = sum(reply.completion_tokens or 0 for reply in work.replies.values())
            answered = Answered(work.replies, {}, len(work.prompt), tokens)
            work.loop.call_soon_threadsafe(_give, work.answer, answered)


def _give(answer: asyncio.Future[Answered], answered: Answered) -> None:
    if not answer.done():
        answer.set_result(answered)


def _fail(answer: asyncio.Future[Answered], error: BaseException) -> None:
    if not answer.done():
        answer.set_exception(error)


def _runs(indices: Sequence[int]) -> list[tuple[int, ...]]:
    """Runs of consecutive indices, which are one request each: (0, 1, 2, 6) gives (0, 1, 2) and (6,)."""
    runs: list[tuple[int, ...]] = []
    for index in indices:
        if runs and runs[-1][-1] == index - 1:
            runs[-1] += (index,)
        else:
            runs.append((index,))
    return runs


def _start(spec: EngineSpec) -> _SteppedEngine:
    if spec.engine == "vllm":
        from qcrd_ray.sampling.vllm import VllmEngine

        return VllmEngine(spec)
    return _Batches(spec)


def _warm_up(engine: _SteppedEngine) -> None:
    """Generate once: what an engine compiles at its first step belongs to its start."""
    engine.add("warm up", Request((0,), SamplingParameters(temperature=1.0, max_tokens=4, logprobs=False), n=2))
    while not engine.step():
        pass


class _Batches:
    """The transformers engine, step by step: a step is a batch of sequences from start to end."""

    def __init__(self, spec: EngineSpec) -> None:
        from qcrd_ray.sampling.transformers import TransformersEngine

        self._engine = TransformersEngine(spec)
        self._waiting: list[tuple[str, Request]] = []
        self._sequences = spec.max_sequences
        longest = getattr(self._engine.model.config, "max_position_embeddings", None) or spec.max_model_tokens
        self._context = min(spec.max_model_tokens, int(longest))

    @property
    def context(self) -> int:
        return self._context

    def add(self, name: str, request: Request) -> None:
        self._waiting.append((name, request))

    def step(self) -> list[tuple[str, list[Generation]]]:
        batch: list[tuple[str, Request]] = []
        sequences = 0
        while self._waiting and (not batch or sequences + self._waiting[0][1].n <= self._sequences):
            batch.append(self._waiting.pop(0))
            sequences += batch[-1][1].n
        # One request a sequence, each with the seed of its sample: the same sample, whatever was asked with it.
        single = [
            Request(request.prompt, request.parameters, request.seed + number)
            for _, request in batch
            for number in range(request.n)
        ]
        generations = [one for (one,) in self._engine.generate(single)]
        results = []
        for name, request in batch:
            results.append((name, generations[: request.n]))
            generations = generations[request.n :]
        return results

    def close(self) -> None:
        self._engine.close()


def _tokenizer(spec: EngineSpec) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(spec.model, trust_remote_code=spec.trust_remote_code)
