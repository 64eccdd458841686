"""Attention of one query a row over keys of any number, on a CPU: a small C++ kernel, built where there is a compiler.

A batched product of torch's reads the memory of every row to the longest row's end, at a third of the speed that the
machine's memory allows, and rounds scores to bfloat16. This one reads what each row has, once, and keeps scores in
float32.
"""

from __future__ import annotations

import ctypes
import logging
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

COMPILERS = ("c++", "g++", "clang++")
SIZE_STEP = 32
BUILD_TIMEOUT_S = 60

SOURCE = r"""
#include <cmath>
#include <cstdint>
#include <cstring>

const int LANES = 16, PARTS = SIZE / LANES;
typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));

/* A vector of SIZE values is held as PARTS registers. Two of them hold 32 values: in bfloat16 those at even and at odd
   places, as two values fill the space of one float, whose upper half a bfloat16 is; in float32 those in turn. */
#ifdef BF16
typedef uint16_t value;
static inline void load(const value *from, floats *two) {
    ints raw;
    memcpy(&raw, from, sizeof raw);
    two[0] = (floats)(raw << 16);
    two[1] = (floats)(raw & (int32_t)0xffff0000);
}
static inline void store(value *to, float number) {
    uint32_t bits;
    memcpy(&bits, &number, 4);
    *to = (value)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
static inline float at(const floats *parts, int i) { return parts[i / 32 * 2 + i % 2][i % 32 / 2]; }
#else
typedef float value;
static inline void load(const value *from, floats *two) { memcpy(two, from, 2 * sizeof *two); }
static inline void store(value *to, float number) { *to = number; }
static inline float at(const floats *parts, int i) { return parts[i / LANES][i % LANES]; }
#endif

static inline float total(floats x) {
    float sum = 0.0f;
    for (int i = 0; i < LANES; i++) sum += x[i];
    return sum;
}

/* Sums of neighbours: of x in the lower lanes, of y in the upper ones. */
static inline floats neighbours(floats x, floats y) {
    return __builtin_shufflevector(x, y, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30)
         + __builtin_shufflevector(x, y, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
}

/* e^x for x <= 0, to 2e-7 of itself. */
static inline floats exponential(floats x) {
    floats y = x * 1.44269504f;
    floats least = y - y - 126.0f;
    y = y < least ? least : y;
    ints whole = __builtin_convertvector(y - 0.5f, ints);
    floats p = y - __builtin_convertvector(whole, floats);
    p = 1.0f + p * (0.693147181f + p * (0.240226507f + p * (0.0555041087f
        + p * (0.00961812911f + p * (0.00133335581f + p * 0.000154035304f)))));
    return p * (floats)((whole + 127) << 23);
}

static inline floats product(const floats *query, const value *key) {
    floats sum = {}, two[2];
    for (int part = 0; part < PARTS; part += 2) {
        load(key + part * LANES, two);
        sum += query[part] * two[0];
        sum += query[part + 1] * two[1];
    }
    return sum;
}

/* Products of a query with keys that lie side by side. */
static inline void products(const floats *query, const value *keys, int64_t count, float *scores) {
    int64_t j = 0;
    for (; j + LANES <= count; j += LANES) {
        floats sums[LANES];
        for (int n = 0; n < LANES; n++) sums[n] = product(query, keys + (j + n) * SIZE);
        for (int left = LANES; left > 1; left /= 2)
            for (int n = 0; n < left / 2; n++) sums[n] = neighbours(sums[2 * n], sums[2 * n + 1]);
        memcpy(scores + j, &sums[0], sizeof sums[0]);
    }
    for (; j < count; j++) scores[j] = total(product(query, keys + j * SIZE));
}

static inline void weigh(const float *weights, const value *values, int64_t count, floats *sums) {
    floats own[PARTS], two[2];
    for (int part = 0; part < PARTS; part++) own[part] = sums[part];
    for (int64_t j = 0; j < count; j++)
        for (int part = 0; part < PARTS; part += 2) {
            load(values + j * SIZE + part * LANES, two);
            own[part] += weights[j] * two[0];
            own[part + 1] += weights[j] * two[1];
        }
    for (int part = 0; part < PARTS; part++) sums[part] = own[part];
}

/* query: rows of heads * SIZE values, row_stride apart. keys, values: [rows, heads, length, SIZE].
   counts: keys of each row, the newest in slot `newest` and the others before it, cyclic; where newest is negative they
   are slots 0 to count - 1. bias: [heads, length], the newest key's last; or null. output: [rows, heads, SIZE]. */
extern "C" void attend(const value *query, int64_t row_stride, const value *keys, const value *values,
                       const float *bias, const int64_t *counts, int64_t newest, int64_t rows, int64_t heads,
                       int64_t length, value *output) {
#pragma omp parallel for schedule(dynamic, 16)
    for (int64_t item = 0; item < rows * heads; item++) {
        int64_t row = item / heads, head = item % heads, count = counts[row];
        int64_t last = newest < 0 ? count - 1 : newest, first = last - count + 1;
        /* The older keys end the ring, and the newer ones begin it. */
        int64_t older = first < 0 ? -first : 0, newer = count - older;
        int64_t old_slot = first + length, new_slot = first < 0 ? 0 : first;
        const value *k = keys + item * length * SIZE, *v = values + item * length * SIZE;
        floats q[PARTS], sums[PARTS], sum = {};
        const value *asked = query + row * row_stride + head * SIZE;
        for (int part = 0; part < PARTS; part += 2) load(asked + part * LANES, q + part);
        for (int part = 0; part < PARTS; part++) sums[part] = floats{};
        int64_t padded = (count + LANES - 1) / LANES * LANES;
        float scores[padded + LANES];
        products(q, k + old_slot * SIZE, older, scores);
        products(q, k + new_slot * SIZE, newer, scores + older);
        if (bias) {
            const float *b = bias + head * length + length - count;
            for (int64_t j = 0; j < count; j++) scores[j] += b[j];
        }
        float highest = scores[0];
        for (int64_t j = 1; j < count; j++) highest = scores[j] > highest ? scores[j] : highest;
        for (int64_t j = count; j < padded; j++) scores[j] = highest - 1e4f;
        for (int64_t j = 0; j < padded; j += LANES) {
            floats some;
            memcpy(&some, scores + j, sizeof some);
            some = exponential(some - highest);
            sum += some;
            memcpy(scores + j, &some, sizeof some);
        }
        weigh(scores, v + old_slot * SIZE, older, sums);
        weigh(scores + older, v + new_slot * SIZE, newer, sums);
        float scale = count > 0 ? 1.0f / total(sum) : 0.0f;
        for (int i = 0; i < SIZE; i++) store(output + item * SIZE + i, at(sums, i) * scale);
    }
}
"""


class CpuAttention:
    """The kernel for one width of heads and one precision."""

    def __init__(self, library: Path) -> None:
        self._attend = ctypes.CDLL(str(library)).attend
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        self._attend.argtypes = [pointer, number, *[pointer] * 4, *[number] * 4, pointer]
        self._attend.restype = None

    @classmethod
    def build(cls, size: int, dtype: torch.dtype) -> CpuAttention | None:
        """Compile the kernel, which takes about a second; None where it cannot be had, which is logged.

        Args:
            size: values of a head, a multiple of 32.
            dtype: bfloat16 or float32.
        """
        if size % SIZE_STEP:
            logger.warning("heads of %d values, no multiple of %d: attention runs as batched products", size, SIZE_STEP)
            return None
        compiler = next((path for path in map(shutil.which, COMPILERS) if path), None)
        if compiler is None:
            logger.warning("no C++ compiler (%s): attention runs as batched products", ", ".join(COMPILERS))
            return None
        with tempfile.TemporaryDirectory() as folder:
            library = Path(folder) / "attention.so"
            # Linked to no OpenMP of its own: it finds torch's, with torch's threads.
            flags = ["-O3", "-march=native", "-ffast-math", "-fopenmp", "-fPIC", f"-DSIZE={size}"]
            flags += ["-DBF16"] if dtype == torch.bfloat16 else []
            (Path(folder) / "attention.cpp").write_text(SOURCE)
            try:
                for step in (
                    [compiler, *flags, "-c", f"{folder}/attention.cpp", "-o", f"{folder}/attention.o"],
                    [compiler, "-shared", f"{folder}/attention.o", "-o", str(library), "-lm"],
                ):
                    subprocess.run(step, check=True, capture_output=True, text=True, timeout=BUILD_TIMEOUT_S)
                return cls(library)
            except (subprocess.SubprocessError, OSError) as error:
                reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
                logger.warning("no C++ kernel, attention runs as batched products: %s", reason[0])
                return None

    def __call__(self, query: Tensor, memory: Tensor, bias: Tensor | None, counts: Tensor, newest: int) -> Tensor:
        """Attended values [rows, heads * size].

        Args:
            query: [rows, heads, size], each row's in one piece.
            memory: keys and values [2, rows, heads, length, size], contiguous.
            bias: float32 [heads, length], by distance from the newest key, whose own is the last; None for none.
            counts: int64 [rows], keys of each row: the last `counts` up to slot `newest`, in a ring.
            newest: -1 where the keys of a row lie in slots 0 to its count.
        """
        rows, heads, length, size = memory.shape[1:]
        output = query.new_empty(rows, heads * size)
        self._attend(
            query.data_ptr(),
            query.stride(0),
            memory[0].data_ptr(),
            memory[1].data_ptr(),
            None if bias is None else bias.data_ptr(),
            counts.data_ptr(),
            newest,
            rows,
            heads,
            length,
            output.data_ptr(),
        )
        return output
