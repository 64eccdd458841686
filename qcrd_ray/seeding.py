"""Seeds and orders that depend on names alone, never on timing or on Python's salted hash."""

from __future__ import annotations

import hashlib


def stable_hash(*parts: object) -> int:
    """A number in [0, 2**62) that the parts decide, the same on every machine and in every process."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        text = str(part).encode("utf-8", "surrogatepass")
        digest.update(len(text).to_bytes(8, "little"))
        digest.update(text)
    return int.from_bytes(digest.digest(), "little") >> 2


def stable_uniform(*parts: object) -> float:
    """A number in [0, 1) that the parts decide."""
    return stable_hash(*parts) / 2.0**62
