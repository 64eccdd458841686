"""Parts of speech, for replacing a word by one of its own kind: by spaCy or stanza where they are installed."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from qcrd_ray.config import Augmentation
from qcrd_ray.errors import UserError

SPACY_MODELS = "en_core_web_"
RULES = "rules"
NONE = "none"
_OPEN_CLASSES = frozenset({"ADJ", "ADP", "ADV", "AUX", "CCONJ", "DET", "NOUN", "PRON", "PROPN", "SCONJ", "VERB"})
"""Universal parts of speech whose words can stand in for each other. Numbers have a rule of their own."""


@dataclass(frozen=True)
class Word:
    """A word of a text: its characters `begin` to `end`; its part of speech, None where it is not to be replaced."""

    begin: int
    end: int
    part: str | None


def choose_tagger(wanted: Augmentation) -> str:
    """The tagger that a config means: `spacy:MODEL VERSION`, `stanza:VERSION`, `rules` or `none`.

    Raises:
        UserError: one that is named and not installed.
    """
    if wanted in (NONE, RULES):
        return wanted
    found: str | None = None
    if wanted in ("auto", "spacy"):
        found = _spacy_name()
        if found is None and wanted == "spacy":
            raise UserError(
                "config key judge.augmentation: spacy with an English model is not installed: pip install spacy and "
                "python -m spacy download en_core_web_sm, or set it to auto or rules"
            )
    if found is None and wanted in ("auto", "stanza"):
        found = _stanza_name()
        if found is None and wanted == "stanza":
            raise UserError(
                "config key judge.augmentation: stanza with its English model is not installed: pip install stanza and "
                "python -c \"import stanza; stanza.download('en', processors='tokenize,pos')\", or set it to auto or "
                "rules"
            )
    return found or RULES


def tag(tagger: str, texts: Sequence[str]) -> list[list[Word]]:
    """The words of each text, by a tagger of `choose_tagger` other than `rules` and `none`."""
    if tagger.startswith("spacy:"):
        return spacy_words(_spacy(tagger.removeprefix("spacy:").split()[0]), texts)
    return [_stanza_words(document) for document in _stanza_pipeline().bulk_process(list(texts))]


def spacy_words(pipeline: Any, texts: Sequence[str]) -> list[list[Word]]:
    """The words of each text by a spaCy pipeline that sets `token.pos_`, and perhaps finer `token.tag_`."""
    return [
        [Word(token.idx, token.idx + len(token), _part(token.pos_, token.tag_)) for token in document]
        for document in pipeline.pipe(texts)
    ]


def _part(coarse: str, fine: str) -> str | None:
    """`NOUN NNS`: a plural for a plural, a past tense for a past tense."""
    return f"{coarse} {fine}".strip() if coarse in _OPEN_CLASSES else None


def _spacy_name() -> str | None:
    if importlib.util.find_spec("spacy") is None:
        return None
    spacy: Any = importlib.import_module("spacy")
    models = [model for model in spacy.util.get_installed_models() if model.startswith(SPACY_MODELS)]
    if not models:
        return None
    smallest = min(models, key=lambda model: (not model.startswith(f"{SPACY_MODELS}sm"), len(model), model))
    return f"spacy:{smallest} {spacy.util.get_package_version(smallest)}"


@lru_cache(maxsize=1)
def _spacy(model: str) -> Any:
    spacy: Any = importlib.import_module("spacy")
    # Parts of speech need no parser and no names, which take most of the time.
    return spacy.load(model, exclude=["parser", "ner", "lemmatizer", "senter"])


def _stanza_name() -> str | None:
    if importlib.util.find_spec("stanza") is None:
        return None
    stanza: Any = importlib.import_module("stanza")
    try:
        _stanza_pipeline()
    except (OSError, LookupError, ValueError, stanza.pipeline.core.ResourcesFileNotFoundError):
        return None
    return f"stanza:{stanza.__version__}"


@lru_cache(maxsize=1)
def _stanza_pipeline() -> Any:
    stanza: Any = importlib.import_module("stanza")
    return stanza.Pipeline("en", processors="tokenize,pos", download_method=None, verbose=False)


def _stanza_words(document: Any) -> list[Word]:
    return [
        Word(word.start_char, word.end_char, _part(word.upos or "", word.xpos or ""))
        for sentence in document.sentences
        for word in sentence.words
        if word.start_char is not None
    ]
