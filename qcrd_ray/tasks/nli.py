"""Natural language inference: does a hypothesis follow from a premise. Shared by e-SNLI and ANLI."""

from __future__ import annotations

from qcrd_ray.tasks.base import Choices, Shot, Task, normalise

LABELS = ("entailment", "neutral", "contradiction")
_MEANS = {
    "entailment": "entailment",
    "entailed": "entailment",
    "entails": "entailment",
    "yes": "entailment",
    "true": "entailment",
    "neutral": "neutral",
    "maybe": "neutral",
    "unknown": "neutral",
    "undetermined": "neutral",
    "impossible to tell": "neutral",
    "it is impossible to tell": "neutral",
    "it's impossible to tell": "neutral",
    "it is not possible to tell": "neutral",
    "it's not possible to tell": "neutral",
    "not possible to tell": "neutral",
    "contradiction": "contradiction",
    "contradictory": "contradiction",
    "contradicts": "contradiction",
    "no": "contradiction",
    "false": "contradiction",
}


class Inference(Task):
    instruction = (
        "Does the hypothesis follow from the premise? Reason step by step, then end with: The answer is LABEL. "
        "LABEL is entailment, neutral or contradiction."
    )
    shots = (
        Shot(
            "premise: Two girls in raincoats walk a small dog along the beach.\nhypothesis: The dog is outside.",
            "A beach is outside, and the dog is walked along it, so the dog is outside.",
            "entailment",
        ),
        Shot(
            "premise: A man in a blue shirt is asleep on a bench.\nhypothesis: The man is running a race.",
            "Someone who is asleep cannot run a race at the same time.",
            "contradiction",
        ),
        Shot(
            "premise: A woman holds a paper cup at a market stall.\nhypothesis: The woman is drinking coffee.",
            "The cup may hold anything, and nothing says that she drinks from it.",
            "neutral",
        ),
        Shot(
            "premise: The bridge was finished in 1931 and closed to cars in 1984.\n"
            "hypothesis: Cars could use the bridge in 1990.",
            "It was closed to cars in 1984, which is before 1990, so cars could not use it then.",
            "contradiction",
        ),
    )

    def canonical_answer(self, text: str, choices: Choices = None) -> str | None:
        return _MEANS.get(normalise(text))

    def _answer_and_target(self, written: str, choices: Choices) -> tuple[str | None, str | None]:
        label = self.canonical_answer(written)
        return label, label
