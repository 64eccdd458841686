"""What the machine that starts a run can do, told without importing a library."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

CPU_INFO = Path("/proc/cpuinfo")
BF16_FLAGS = frozenset({"amx_bf16", "avx512_bf16", "bf16"})
"""Instructions that compute in bf16: x86's two, Arm's. Without one a backward pass in bf16 took 27 times as long as in
fp32 (SmolLM2-135M, an AMD EPYC with AVX2)."""


@lru_cache(maxsize=1)
def cpu_computes_bf16() -> bool:
    """Whether this machine's CPU has instructions for bf16; False where that cannot be told."""
    try:
        return has_bf16_flag(CPU_INFO.read_text(encoding="ascii", errors="replace"))
    except OSError:
        return False


def has_bf16_flag(cpu_info: str) -> bool:
    """The same of the text of a /proc/cpuinfo: `flags` on x86, `Features` on Arm."""
    for line in cpu_info.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return not BF16_FLAGS.isdisjoint(value.split())
    return False
