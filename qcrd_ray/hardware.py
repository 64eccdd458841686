"""What the machine that starts a run can do, told without importing a library."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

CPU_INFO = Path("/proc/cpuinfo")
BF16_FLAGS = frozenset({"amx_bf16", "bf16"})
"""Instructions with which bf16 is faster than fp32 on any processor that has them: x86's matrix units, Arm's. Without
any for bf16, a backward pass in it took 27 times as long as in fp32 (SmolLM2-135M, an AMD EPYC with AVX2)."""
VECTOR_FLAG = "avx512_bf16"
"""x86's instructions for vectors of bf16. AMD's compute twice as many numbers in it as in fp32: steps of T5-small took
0.5 to 0.6 times as long (an EPYC). Intel's do not, and all else that bf16 costs makes it the slower one: steps of
SmolLM2-135M took 1.4 times as long (a Xeon without AMX)."""


@lru_cache(maxsize=1)
def cpu_gains_by_bf16() -> bool:
    """Whether this machine's CPU is faster in bf16 than in fp32; False where that cannot be told."""
    try:
        return gains_by_bf16(CPU_INFO.read_text(encoding="ascii", errors="replace"))
    except OSError:
        return False


def gains_by_bf16(cpu_info: str) -> bool:
    """The same of the text of a /proc/cpuinfo: `flags` and `vendor_id` on x86, `Features` on Arm."""
    found: dict[str, list[str]] = {}
    for line in cpu_info.splitlines():
        name, _, value = line.partition(":")
        found.setdefault(name.strip(), value.split())
    flags = {*found.get("flags", []), *found.get("Features", [])}
    return not BF16_FLAGS.isdisjoint(flags) or (VECTOR_FLAG in flags and found.get("vendor_id") == ["AuthenticAMD"])
