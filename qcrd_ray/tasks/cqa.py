"""CommonsenseQA: five choices, the answer is the text of one of them."""

from __future__ import annotations

from qcrd_ray.tasks.base import Choices, Shot, Task, canonical_choice, normalise


class CommonsenseQa(Task):
    name = "cqa"
    instruction = "Choose the best answer. Reason step by step, then end with: The answer is (letter) text."
    shots = (
        Shot(
            "Where would you keep milk so that it stays fresh?",
            "The place must be cold, as milk spoils in the warmth. Of the choices only a refrigerator keeps food cold.",
            "(c) refrigerator",
            ("window sill", "oven", "refrigerator", "bookshelf", "car"),
        ),
        Shot(
            "What do people usually do after they have lost a match?",
            "Losing is a let-down, and people react to it with a feeling. Of the choices, being disappointed is one.",
            "(a) feel disappointed",
            ("feel disappointed", "get a medal", "plant a tree", "fall asleep at once", "bake"),
        ),
        Shot(
            "The hiker followed the sound of water to find what?",
            "Water that can be heard from afar is running water in nature. Of the choices, a stream runs and sounds.",
            "(d) stream",
            ("desert", "bathtub", "bottle", "stream", "cloud"),
        ),
        Shot(
            "What tool would a carpenter take to drive in a nail?",
            "A nail is driven in by blows. Of the choices only a hammer is made for striking.",
            "(b) hammer",
            ("saw", "hammer", "ruler", "sandpaper", "glue"),
        ),
    )

    def canonical_answer(self, text: str, choices: Choices = None) -> str | None:
        return canonical_choice(text, choices) if choices else normalise(text) or None

    def _answer_and_target(self, written: str, choices: Choices) -> tuple[str | None, str | None]:
        if not choices:
            return written, None
        chosen = canonical_choice(written, choices)
        text = next((choice for choice in choices if normalise(choice) == chosen), None)
        return text, text
