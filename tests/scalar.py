"""The formats a second time, value by value, from the published description alone: what ``test_bytes.py`` compares with.

Nothing here comes from gyrokv but the integer levels of its own rows, which no publication lists (``test_levels.py``
derives those). Arithmetic is numpy float32, one operation after the other.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np

BOOK = json.loads((Path(__file__).parent / "data" / "codebooks.json").read_text())
F = np.float32
TINY = F(1e-10)
ROOT128 = 0.08838834764831845


def signs(name: str, count: int) -> list[np.float32]:
    """Least significant bit first; 1 is -1."""
    raw = bytes.fromhex(BOOK["signs"][name])
    return [F(-1) if raw[i // 8] >> (i % 8) & 1 else F(1) for i in range(count)]


def butterfly(values: list[np.float32]) -> list[np.float32]:
    out, h = list(values), 1
    while h < len(out):
        for start in range(0, len(out), 2 * h):
            for i in range(start, start + h):
                a, b = out[i], out[i + h]
                out[i], out[i + h] = F(a + b), F(a - b)
        h *= 2
    return out


def half(x: np.float32) -> np.float16:
    """Nearest even; past the range the largest half."""
    return np.float16(min(max(x, F(-65504)), F(65504)))


def squares(values: list[np.float32]) -> np.float32:
    total = F(0)
    for v in values:
        total = F(total + F(v * v))
    return total


def count_below(x: np.float32, bounds: list[np.float32], tie_up: bool) -> int:
    return sum(1 for b in bounds if (x >= b if tie_up else x > b))


def midpoints(levels: list[np.float32]) -> list[np.float32]:
    return [F(F(a + b) * F(0.5)) for a, b in zip(levels, levels[1:])]


def split(values: list[np.float32], size: int) -> list[list[np.float32]]:
    return [values[i : i + size] for i in range(0, len(values), size)]


def padded_to(values: list[np.float32], size: int) -> list[np.float32]:
    return values + [F(0)] * (size - len(values))


def corrected(norm: np.float32, levels: list[np.float32], codes: list[int]) -> np.float16:
    length = np.sqrt(squares([levels[c] for c in codes]))
    return half(F(norm / length) if length > TINY else norm)


def turbo(values, levels, bounds, group: int):
    """Codes and corrected norms of the turbo family; ``values`` are padded to whole groups."""
    codes, norms = [], []
    before, after = signs("turbo_s1", group), signs("turbo_s2", group)
    for x in split(values, group):
        norm = np.sqrt(squares(x))
        inverse = F(F(1) / norm) if norm > TINY else F(0)
        turned = butterfly([F(s * F(v * inverse)) for s, v in zip(before, x)])
        y = [F(s * F(v * F(ROOT128))) for s, v in zip(after, turned)]
        own = [count_below(v, bounds, True) for v in y]
        codes += own
        norms.append(corrected(norm, levels, own))
    return codes, norms


def mlx(values):
    """y = H(sign * x) / sqrt(D) of a whole rotated block."""
    scale = F(1 / math.sqrt(len(values)))
    return [F(v * scale) for v in butterfly([F(s * v) for s, v in zip(signs("mlx_512", len(values)), values)])]


def unit_variance(y):
    """(z, norm): y divided by its root mean square, as y * (1 / norm) * sqrt(D)."""
    norm = np.sqrt(squares(y))
    if not norm > TINY:
        return [F(0)] * len(y), norm
    inverse, root = F(F(1) / norm), F(math.sqrt(len(y)))
    return [F(F(v * inverse) * root) for v in y], norm


def tq_ours(values, levels, group: int):
    codes, norms = [], []
    for x in split(values, group):
        z, norm = unit_variance(mlx(x))
        own = [count_below(v, midpoints(levels), True) for v in z]
        codes += own
        norms.append(corrected(norm, levels, own))
    return codes, norms


def tq_published(values, levels):
    """One norm up to 256 values; two, each over 256 values, for 512."""
    y, bounds = mlx(values), midpoints(levels)
    if len(y) <= 256:
        z, norm = unit_variance(y)
        return [count_below(v, bounds, False) for v in z], [norm]
    codes, norms = [], []
    for span in split(y, 256):
        norm = np.sqrt(F(squares(span) / F(256)))
        z = [F(F(v / norm) * F(1.0)) for v in span] if norm > TINY else [F(0)] * 256
        codes += [count_below(v, bounds, False) for v in z]
        norms.append(norm)
    return codes, norms


def q8_0(values):
    codes, scales = [], []
    for x in split(values, 32):
        d = F(max(abs(v) for v in x) / F(127))
        inverse = F(F(1) / d) if d > 0 else F(0)
        inverse = inverse if np.isfinite(inverse) else F(0)
        for v in x:
            scaled = float(F(v * inverse))
            code = math.floor(abs(scaled) + 0.5)  # exact in double
            codes.append(int(math.copysign(code, scaled)) + 128)
        scales.append(half(d))
    return codes, scales


def q4_0(values):
    codes, scales = [], []
    for x in split(values, 32):
        m = x[0]
        for v in x[1:]:
            if abs(v) > abs(m):
                m = v
        d = F(m / F(-8))
        for v in x:
            codes.append(max(0, min(15, math.floor(F(F(v / d) + F(8.5)))) if d != 0 else 8))
        scales.append(half(d))
    return codes, scales


def absmax_table(values, levels, tie_up: bool, group: int):
    """A table scaled by the largest magnitude of each group, not rotated: z = x * (1 / d), d = max|x| / top level."""
    codes, scales = [], []
    for x in split(values, group):
        d = F(max(abs(v) for v in x) / levels[-1])
        inverse = F(F(1) / d) if d > 0 else F(0)
        inverse = inverse if np.isfinite(inverse) else F(0)
        codes += [count_below(F(v * inverse), midpoints(levels), tie_up) for v in x]
        scales.append(half(d))
    return codes, scales


def grid(fmt) -> list[np.float32]:
    """The float32 values of one of our own tables: level times step, rounded once."""
    step = float(F(fmt.step))
    return [F(float(level) * step) for level in fmt.levels]


def block_of(head_dim: int, sizes: tuple[int, ...]) -> tuple[int, int]:
    """(padded head, block): padded to a multiple of the smallest block, in the largest that divides it."""
    padded = -(-head_dim // min(sizes)) * min(sizes)
    return padded, max(s for s in sizes if padded % s == 0)


def encode(fmt, values: list[np.float32]) -> tuple[list[int], list]:
    """(indices into the ascending table, scales) of one head."""
    name, dim = fmt.name, len(values)
    with np.errstate(all="ignore"):
        if name == "q8_0" or name == "q4_0":
            values = padded_to(values, -(-dim // 32) * 32)
            return q8_0(values) if name == "q8_0" else q4_0(values)
        if name.startswith("turbo") and name in BOOK["levels"]:
            values = padded_to(values, -(-dim // 128) * 128)
            levels, bounds = ([F(v) for v in BOOK[key][name]] for key in ("levels", "midpoints"))
            return turbo(values, levels, bounds, 128)
        if name in BOOK["levels"]:
            values = padded_to(values, next(s for s in (64, 128, 256, 512) if s >= dim))
            return tq_published(values, [F(v) for v in BOOK["levels"][name]])
        # rows that are not published: the description is their columns
        padded, block = block_of(dim, fmt.groups)
        values, levels = padded_to(values, padded), grid(fmt)
        if (fmt.scale, fmt.rotation) == ("l2", "turbo"):
            return turbo(values, levels, midpoints(levels), block)
        if (fmt.scale, fmt.rotation) == ("rms", "mlx"):
            return tq_ours(values, levels, block)
        assert (fmt.scale, fmt.rotation) == ("absmax", "none"), f"describe {fmt} here: {fmt.scale} with {fmt.rotation}"
        return absmax_table(values, levels, fmt.ties == "up", block)


def decode(fmt, codes: list[int], scales: list, head_dim: int) -> list[np.float32]:
    """Stored values, still rotated: level times scale, in the published order of operations."""
    span = len(codes) // len(scales)
    with np.errstate(all="ignore"):
        if fmt.kind == "linear":
            zero = 2 ** (fmt.bits - 1)
            return [F(F(c - zero) * F(scales[i // span])) for i, c in enumerate(codes)]
        published = fmt.name in BOOK["levels"]
        levels = [F(v) for v in BOOK["levels"][fmt.name]] if published else grid(fmt)
        values = [F(levels[c] * F(scales[i // span])) for i, c in enumerate(codes)]
        if published and fmt.name.startswith("tq"):
            divisor = F(math.sqrt(len(codes))) if len(scales) == 1 else F(1.0)
            values = [F(v / divisor) for v in values]
        return values


def words(codes: list[int], bits: int) -> list[int]:
    """16-bit words by the rule in ``packing.py``, bit by bit: fields of 8, 4, 2, 1 bits, and of w bits value
    ``i + j * D * w / 16`` in bits ``j * w`` to ``j * w + w - 1`` of word i."""
    row, low = [], 0
    for width in (8, 4, 2, 1):
        if not bits & width:
            continue
        count = len(codes) * width // 16
        for i in range(count):
            word = 0
            for bit in range(16):
                code = codes[i + (bit // width) * count]
                word |= (code >> (low + bit % width) & 1) << bit
            row.append(word)
        low += width
    return row


def sign_magnitude(index: int, bits: int) -> int:
    """Top bit: negative. The rest: 0 for the level nearest to zero, and so on outwards."""
    middle = 2 ** (bits - 1)
    return index - middle if index >= middle else middle + (middle - 1 - index)


def fp8_value(code: int) -> float:
    """Value of a positive e4m3 code: 4 bits of exponent (bias 7), 3 of mantissa, no infinity, 0x7F is NaN."""
    exponent, mantissa = code >> 3, code & 7
    return math.ldexp(mantissa, -9) if exponent == 0 else math.ldexp(8 + mantissa, exponent - 10)


def fp8(x: np.float32) -> int:
    """Nearest e4m3 code, ties to the even one, at most 448."""
    size = min(abs(float(x)), 448.0)
    code = min(range(0x7F), key=lambda c: (abs(fp8_value(c) - size), c & 1))
    return code | (0x80 if math.copysign(1.0, float(x)) < 0 else 0)


def bf16(x: np.float32) -> int:
    """Bits of the nearest bfloat16, ties to even, at most the largest finite one."""
    raw = int(np.array(x, dtype=np.float32).view(np.uint32))
    sign, size = raw >> 31 << 15, raw & 0x7FFFFFFF
    return sign | min(0x7F7F, (size + 0x7FFF + (size >> 16 & 1)) >> 16)
