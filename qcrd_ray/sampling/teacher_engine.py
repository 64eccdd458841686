"""What every live teacher speaks: a prompt and the sample indices that are wanted in, texts out.

Imports no engine's library, no torch and no ray.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class Prompt:
    """What a teacher is asked: plain text to continue, or the messages of a chat."""

    text: str | None = None
    messages: tuple[tuple[str, str], ...] | None = None
    """(role, content) in order; None for plain text."""

    def as_messages(self) -> list[dict[str, str]]:
        """The chat as clients take it. Raises ValueError for plain text."""
        if self.messages is None:
            raise ValueError("the prompt is plain text, no chat")
        return [{"role": role, "content": content} for role, content in self.messages]


@dataclass(frozen=True)
class Ask:
    """Samples of one question that are wanted.

    Attributes:
        id: of the question, for messages.
        prompt: what is asked.
        indices: sample indices, ascending.
        seed: sample `i` has the seed `seed + i`, whichever request it comes with.
    """

    id: str
    prompt: Prompt
    indices: tuple[int, ...]
    seed: int


@dataclass(frozen=True)
class Reply:
    """One sample. `finish_reason` is "stop" or "length"; tokens are None where the teacher does not count them."""

    text: str
    finish_reason: str
    completion_tokens: int | None = None


@dataclass(frozen=True)
class Answered:
    """What became of an `Ask`: each index has a reply or a reason why it failed, or neither if sampling was stopped.

    Attributes:
        replies: by sample index.
        failed: by sample index, the reason in a few words that can be counted (`timeout`, `content filter`, …).
        prompt_tokens, completion_tokens: that were processed, and paid for, in all attempts that gave an answer.
    """

    replies: dict[int, Reply] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)
    prompt_tokens: int = 0
    completion_tokens: int = 0


class TeacherEngine(Protocol):
    """A teacher that is asked many questions at a time; each call of `ask` waits for one of them."""

    stopped: str | None
    """Why it answers nothing more (`budget`), None as long as it does."""

    async def ask(self, ask: Ask) -> Answered:
        """Sample. Failures that concern one question are in the answer.

        Raises:
            UserError: what no question can be answered with (a wrong key, an unknown model).
        """
        ...

    async def close(self) -> None:
        """Free the model, end every process and connection."""
        ...


async def together(work: list[Coroutine[Any, Any, None]]) -> None:
    """Run all; where one raises, end the others and raise that."""
    if len(work) == 1:
        return await work[0]
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
