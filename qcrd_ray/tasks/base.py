"""What a benchmark is: what a student reads and writes, what a teacher is asked and answers, when two answers agree."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

Choices = Sequence[str] | None

MAX_ANSWER_CHARACTERS = 2000
_NEXT_TURN = re.compile(r"\**(?:Q|(?:Next |New )?Question(?: \d+)?|Human|User)\s*:(?=\s|\*|$)", re.IGNORECASE)
_NEXT_FIELD = re.compile(
    r"Answer Choices:|#{2,}\s*(?:(?:Q|Question|Problem|Human|User|Input|Instruction)(?: \d+)?\s*(?::|$)|$)"
)
_NEXT_PROBLEM = re.compile(r"\**(?:(?:Next |New )?(?:Problem|Exercise)(?: \d+)?|Example \d+)\s*:|Q$", re.IGNORECASE)
_NEXT_PREMISE = re.compile(r"premise:\s")
_INLINE_QUESTION = re.compile(r"(?<=[.!?)\]])\s+Q:\s")
_CHAT_MARK = re.compile(r"<\|[a-z_]+\|>|</?s>|\[/?INST\]|<(?:start|end)_of_turn>")
_ANSWER = re.compile(
    r"(?:so\s+|therefore,?\s+|hence,?\s+)?the (?:final )?answer is:?\s*(?P<answer>[^\n]*)", re.IGNORECASE
)
_SENTENCE_END = re.compile(r"[.!]\s")


@dataclass(frozen=True)
class ParsedSample:
    """A teacher's output taken apart. `answer` is None where none could be read, `target` where it has no such form."""

    rationale: str
    answer: str | None
    target: str | None


@dataclass(frozen=True)
class Shot:
    """A worked example for a teacher's prompt."""

    question: str
    rationale: str
    answer: str
    choices: tuple[str, ...] | None = None


class Task:
    """A benchmark. The defaults are those of free-text answers; a benchmark overrides what it does otherwise."""

    name = "text"
    has_script = False
    shots: tuple[Shot, ...] = ()
    stop: tuple[str, ...] = ("\nQ:", "\n\n\n")
    instruction = "Answer the question. Reason step by step, then end with: The answer is ANSWER."

    def student_input(self, question: str, choices: Choices = None) -> str:
        """What a student reads after its prefix."""
        return question.strip() if not choices else f"{question.strip()}\nAnswer Choices: {_listed(choices)}"

    def default_target(self, answer: str | None, target: str | None) -> str | None:
        """What a student learns to write: the target if the data have one, else the answer."""
        return target if target is not None else answer

    def teacher_prompt(self, question: str, choices: Choices = None) -> str:
        """Few-shot chain-of-thought prompt that a base model continues with a rationale and `The answer is …`."""
        parts = [
            f"Q: {self.student_input(shot.question, shot.choices)}\nA: {shot.rationale} The answer is {shot.answer}."
            for shot in self.shots
        ]
        return "\n\n".join([*parts, f"Q: {self.student_input(question, choices)}\nA:"])

    def teacher_messages(self, question: str, choices: Choices = None) -> list[dict[str, str]]:
        """The same as a chat."""
        messages = [{"role": "system", "content": self.instruction}]
        for shot in self.shots:
            messages.append({"role": "user", "content": self.student_input(shot.question, shot.choices)})
            messages.append({"role": "assistant", "content": f"{shot.rationale} The answer is {shot.answer}."})
        return [*messages, {"role": "user", "content": self.student_input(question, choices)}]

    def parse_teacher_output(self, text: str, choices: Choices = None) -> ParsedSample:
        """Rationale, answer and target of a raw output; what runs on into an invented question is cut first."""
        text = cut_run_on(text)
        matches = list(_ANSWER.finditer(text))
        if not matches:
            return ParsedSample(text, None, None)
        last = matches[-1]
        rationale = text[: last.start()].strip() or text
        if len(last["answer"]) > MAX_ANSWER_CHARACTERS:
            return ParsedSample(rationale, None, None)
        # The whole line is the answer if it can be; `The answer is 8. She has 8 plums.` says it in the first sentence.
        for line in (last["answer"], _SENTENCE_END.split(last["answer"], maxsplit=1)[0]):
            written = line.strip(" *`").rstrip(". *`")
            if self.canonical_answer(written, choices) is not None:
                return ParsedSample(rationale, *self._answer_and_target(written, choices))
        return ParsedSample(rationale, None, None)

    def _answer_and_target(self, written: str, choices: Choices) -> tuple[str | None, str | None]:
        return written, None

    def canonical_answer(self, text: str, choices: Choices = None) -> str | None:
        """One text for all ways to write an answer; None for what is none."""
        normal = normalise(text)
        return normal or None

    def same_answer(self, a: str, b: str, choices: Choices = None) -> bool:
        """Whether two answers are one. What is no answer equals nothing."""
        first = self.canonical_answer(a, choices)
        return first is not None and first == self.canonical_answer(b, choices)

    def scripted_rationale(self, question: str, rng: random.Random, slip: bool) -> tuple[str, str]:
        """A worked solution and its answer, for the scripted teacher; only tasks with `has_script` have one."""
        raise ValueError(f"task {self.name} has no script")

    def is_correct(self, prediction: str, target: str, answer: str | None, choices: Choices = None) -> bool:
        """Whether what a student wrote is right: the same answer as gold, or as the target where there is no gold."""
        return self.same_answer(prediction, answer if answer is not None else target, choices)


def cut_run_on(text: str) -> str:
    """A teacher's output up to the next question or turn, which a base model goes on to invent.

    Headings, steps and `Answer:` stay; so does all of a text that would be nothing without what runs on.
    """
    whole = text.strip()
    ends = [len(whole)]
    if "<" in whole or "[" in whole:
        ends += [match.start() for match in _CHAT_MARK.finditer(whole)][:1]
    if "Q:" in whole:
        ends += [match.start() for match in _INLINE_QUESTION.finditer(whole)][:1]
    if "\n" in whole:
        ends.append(_next_begins(whole.removesuffix("\nAnswer")))
    return whole[: min(ends)].rstrip() or whole


def _next_begins(text: str) -> int:
    """Where a line begins another question; the end of the text where none does."""
    at, after_blank = 0, False
    for number, whole_line in enumerate(text.split("\n")):
        line = whole_line.strip()
        if number and (_NEXT_TURN.match(line) or _NEXT_FIELD.match(line)):
            return at
        # Within a paragraph these are a solution's own words, between paragraphs they begin another one.
        if after_blank and (_NEXT_PROBLEM.match(line) or _NEXT_PREMISE.match(line)):
            return at
        after_blank = not line
        at += len(whole_line) + 1
    return len(text)


_QUOTES = " \"'`*"
_CURLY = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"'})


def normalise(text: str) -> str:
    """Case folded, white space joined, without quotes around and punctuation at the end."""
    text = " ".join(text[:MAX_ANSWER_CHARACTERS].casefold().translate(_CURLY).split())
    return text.lstrip(_QUOTES).rstrip(_QUOTES + ".,;:!")


_LETTER = re.compile(r"^\(?\s*(?P<letter>[a-z])\s*(?:[).:]\s*(?P<rest>.*)|\s*)$", re.DOTALL)


def canonical_choice(text: str, choices: Sequence[str]) -> str | None:
    """The normalised text of the choice that an answer names by its text, its letter, or both; None for no choice."""
    texts = [normalise(choice) for choice in choices]
    normal = normalise(text)
    if normal in texts:
        return normal
    match = _LETTER.match(normal)
    if match is None:
        return None
    index = ord(match["letter"]) - ord("a")
    if index >= len(texts):
        return None
    rest = normalise(match["rest"] or "")
    return texts[index] if rest in ("", texts[index]) else None


def _listed(choices: Sequence[str]) -> str:
    return " ".join(f"({chr(ord('a') + index)}) {choice}" for index, choice in enumerate(choices))
