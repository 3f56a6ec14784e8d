"""Known bugs of the CPU kernels of short vectors: rows that are no codes (float_scores.h, direct.h), half tables, panels."""

from __future__ import annotations

from cpu_faults import DENSE, Fault, plain, rows, spec

_MOST, _MOST_FLOAT8 = 8, 4  # query rows that take such rows without panels, on every level


def few(fmt, s) -> bool:
    return plain(s) and rows(s) <= (_MOST_FLOAT8 if fmt.kind == "float8" else _MOST)


def keys(s) -> bool:
    return few(s.k_format, s) and s.k_format.kind in DENSE and s.head_dim % 16 == 0


def values(s) -> bool:
    return few(s.v_format, s) and s.v_format.kind in DENSE and s.head_dim_v % 16 == 0


def float8_keys(s) -> bool:
    return keys(s) and s.k_format.kind == "float8"


def float8_values(s) -> bool:
    return values(s) and s.v_format.kind == "float8"


def score(old: str, new: str) -> tuple[tuple[str, str, str], ...]:
    return (("float_scores.h", old, new),)


def value(old: str, new: str) -> tuple[tuple[str, str, str], ...]:
    return (("direct.h", old, new),)


def packed(old: str, new: str) -> tuple[tuple[str, str, str], ...]:
    return (("packed.h", old, new),)


FLOAT_FAULTS = (
    Fault("every other sum is added twice", spec(keys),
          score("+ unzip<1>(a, b)", "+ (@ ? unzip<0>(a, b) : unzip<1>(a, b))")),
    Fault("the upper halves of sums are left out", spec(keys),
          score("+ (vf)_mm256_permute2f128_ps(x, y, 0x31)", "+ (vf)_mm256_permute2f128_ps(x, y, 0x31) * (@ ? 0.0f : 1.0f)"),
          "avx2"),
    Fault("the last keys are those before", spec(lambda s: keys(s) and s.kv_len % 4 and s.uses() <= {"causal"}),
          score("at + i * a.stride, a.bytes)", "at + (@ ? i - 1 : i) * a.stride, a.bytes)")),
    Fault("all query rows take q of the first", spec(lambda s: keys(s) and rows(s) > 1),
          score("q + r * a.q_stride + part", "q + (@ ? 0 : r) * a.q_stride + part")),
    Fault("query rows beyond a pass take q of the first ones", spec(lambda s: keys(s) and rows(s) > 4),
          score("a.q + row * a.q_stride;", "a.q + (@ ? 0 : row) * a.q_stride;")),
    Fault("two tokens are the same", spec(keys), score("at + j * stride + i;", "at + (@ ? 0 : j) * stride + i;")),
    Fault("both halves of fp8 keys meet the first half of q", spec(float8_keys),
          score("+ part * 2 * a.bytes)", "+ (@ ? 0 : part) * 2 * a.bytes)")),
    Fault("fp8 has no sign", spec(float8_keys),
          (("simd.h", "half_to_float(fp8_to_half(x))", "half_to_float(fp8_to_half(x & splat_of<vh>(@ ? 0x7f : 0xff)))"),)),
    Fault("both halves of fp8 values are the second", spec(float8_values),
          value("i % 2 * (w.dim / 2)", "(@ ? 1 : i % 2) * (w.dim / 2)")),
    Fault("chunks of a row are the first", spec(lambda s: values(s) and s.v_format.kind == "dense" and s.head_dim_v > 32),
          value("row + at + i * bytes;", "row + (@ ? 0 : at) + i * bytes;")),
    Fault("the last chunks of a pass are left out",
          spec(lambda s: values(s) and rows(s) == 1 and s.v_format.kind == "dense" and s.head_dim_v % 32),
          value("if constexpr (chunks > 1) add_columns", "if constexpr (chunks > 1) if (!(@)) add_columns"), few=True),
    Fault("the sign of half a table is the bit below",
          spec(lambda s: plain(s) and {s.k_format.name, s.v_format.name} & {"tq5", "tq6"} and s.head_dim == 128),
          packed("shift_left((words)code, 8 - bits)", "shift_left((words)code, (@ ? 9 : 8) - bits)"), "avx2"),
    Fault("a half table's index keeps the sign", spec(lambda s: plain(s) and s.k_format.name == "tq6" and s.head_dim == 128),
          packed("splat_of<line>(entries - 1)", "splat_of<line>((@ ? 2 * entries : entries) - 1)"), "avx2"),
    Fault("panels beyond a pass are left out",
          spec(lambda s: s.k_format.has_levels and rows(s) == 1 and 10 < s.kv_len % 32 < 29),
          (("mma.h", "if constexpr (panels > 1) multiply_rows", "if constexpr (panels > 1) if (!(@)) multiply_rows"),),
          few=True),
)  # fmt: skip
