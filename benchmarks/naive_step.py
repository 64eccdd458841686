"""QCRD as one would write it first, by the formulas and transformers' models alone.

Each rationale stands behind a prompt of its own, all of them have gradients, padded to the longest, the judge scores
all, and negatives are generated in the loop by `generate`. What the framework's step is measured against, and held to.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any


class NaiveStep:
    """A step of a student whose questions have the same numbers of positives and one negative each.

    Args:
        together: questions whose rationales are taken together; more than two do not fit into memory at T5-base.
    """

    def __init__(self, student: Any, together: int = 2) -> None:
        self.student, self.together = student, together

    def sample(self, batch: Any, negatives: Sequence[Sequence[Any]]) -> None:
        """Generate as many tokens as the longest negative has."""
        import torch

        model = self.student.model
        was_training = model.training
        model.eval()
        ids, mask = self._padded([row.explain for row in batch.rows], left=not self.student.is_seq2seq)
        longest = max(len(row[0].ids) for row in negatives)
        options = {"do_sample": True, "temperature": 1.5, "top_k": 50, "pad_token_id": self.student.tokenizer.pad}
        with torch.no_grad():
            model.generate(
                input_ids=ids, attention_mask=mask, min_new_tokens=longest, max_new_tokens=longest, **options
            )
        model.train(was_training)

    def scores(self, judge: Any, batch: Any, negatives: Sequence[Sequence[Any]]) -> Any:
        """[questions, positives + 1] of an OnlineJudge."""
        texts = [[*row.positive_texts, n[0].text] for row, n in zip(batch.rows, negatives, strict=True)]
        asked = [row.question for row, own in zip(batch.rows, texts, strict=True) for _ in own]
        return judge.score(asked, [text for own in texts for text in own]).reshape(len(batch.rows), -1)

    def loss(self, config: Any, batch: Any, negatives: Sequence[Sequence[Any]], scores: Any) -> float:
        """The mean loss of the batch's questions, without gradients."""
        import torch

        with torch.no_grad():
            return float(sum(self._losses(config, batch, negatives, scores)))

    def add_gradients(
        self, engine: Any, config: Any, batch: Any, negatives: Sequence[Sequence[Any]], scores: Any
    ) -> float:
        """Add the gradients of the mean loss of the batch's questions to the engine's step. Returns that mean."""
        left, total = -(-len(batch.rows) // self.together), 0.0
        for loss in self._losses(config, batch, negatives, scores):
            left, total = left - 1, total + float(loss.detach())
            engine.backward(loss, last=left == 0)
        return total

    def _losses(self, config: Any, batch: Any, negatives: Sequence[Sequence[Any]], scores: Any) -> Iterator[Any]:
        """Parts of the mean loss of the batch's questions."""
        import torch

        from qcrd_ray.objectives.contrastive import contrastive_loss

        weights, count = config.loss, len(batch.rows)
        for first in range(0, count, self.together):
            rows, own = batch.rows[first : first + self.together], negatives[first : first + self.together]
            targets = [[*row.positives, n[0].ids] for row, n in zip(rows, own, strict=True)]
            prompts = [row.explain for row, found in zip(rows, targets, strict=True) for _ in found]
            ce = self._ce(prompts, [ids for found in targets for ids in found]).reshape(len(rows), -1)
            label = self._ce([row.predict for row in rows], [row.label for row in rows])
            score = scores[first : first + self.together].to(ce.device)
            mask = torch.ones(ce.shape, dtype=torch.bool)
            contrast = contrastive_loss(
                ce[:, :-1], ce[:, -1:], mask[:, :-1], mask[:, -1:], score[:, :-1], score[:, -1:],
                beta=weights.beta, margin=weights.margin, questions=count,
            )  # fmt: skip
            yield weights.alpha_label * label.sum() / count + weights.alpha_contrastive * contrast.loss

    def _ce(self, prompts: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]) -> Any:
        """Mean cross-entropy of each target behind a prompt of its own, as transformers' models give logits: [N]."""
        import torch.nn.functional as F

        from qcrd_ray.objectives.mutual_information import wide

        if self.student.is_seq2seq:
            ids, mask = self._padded(prompts)
            labels, _ = self._padded(targets, fill=-100)
            logits = self.student.model(input_ids=ids, attention_mask=mask, labels=labels).logits
        else:
            ids, mask = self._padded([[*p, *t] for p, t in zip(prompts, targets, strict=True)])
            behind = [[*[-100] * len(p), *t] for p, t in zip(prompts, targets, strict=True)]
            labels, _ = self._padded(behind, fill=-100)
            logits = self.student.model(input_ids=ids, attention_mask=mask).logits[:, :-1]
            labels = labels[:, 1:]
        # Over an axis of the vocabulary that is not the last one, PyTorch adds up less precisely, and takes longer.
        flat = F.cross_entropy(wide(logits).flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none")
        return flat.view(labels.shape).sum(1) / (labels != -100).sum(1)

    def _padded(self, rows: Sequence[Sequence[int]], left: bool = False, fill: int | None = None) -> tuple[Any, Any]:
        import torch

        fill = self.student.tokenizer.pad if fill is None else fill
        width = max(map(len, rows))
        gaps = [width - len(row) for row in rows]
        ids = [[fill] * gap + list(row) if left else [*row, *[fill] * gap] for row, gap in zip(rows, gaps, strict=True)]
        mask = [[0] * gap + [1] * len(row) if left else [1] * len(row) + [0] * gap
                for row, gap in zip(rows, gaps, strict=True)]  # fmt: skip
        return torch.tensor(ids), torch.tensor(mask)
