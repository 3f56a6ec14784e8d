"""Known bugs of the CPU kernels for rows that are no codes, of short vectors (float_scores.h, direct.h) and of long ones
(dense_scores.h, turned_scores.h, dense_values.h), and of half tables and panels of short vectors."""

from __future__ import annotations

from cpu_faults import Fault, plain, rows, spec

DENSE = ("dense", "float8")
_MOST, _MOST_FLOAT8 = 8, 4  # query rows that take such rows without panels, on every level
_MOST_LONG = 32  # the same where vectors have 64 bytes


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


def long_keys(s) -> bool:
    return plain(s) and s.k_format.kind in DENSE and rows(s) <= _MOST_LONG


def long_values(s) -> bool:
    """Values of pairs of tokens, all of them seen."""
    return (s.v_format.name in ("bf16", "fp8_e4m3") and s.head_dim_v % 32 == 0 and rows(s) <= _MOST_LONG and s.kv_len > 7
            and s.uses() <= {"causal", "softcap", "sinks"})  # fmt: skip


def long_float8(s) -> bool:
    return long_keys(s) and s.k_format.kind == "float8" and rows(s) < 6


def in_lines(s) -> bool:
    """Keys a token to a vector, for certain."""
    return long_keys(s) and (s.k_format.name in ("f16", "f32") or rows(s) < 6)


def together(s) -> bool:
    """All query rows are given to the keys' kernel at once, because values need no panels."""
    return s.head_dim_v % 32 == 0


def five(s) -> bool:
    """A pass of five rows, after which none is left or four are."""
    return rows(s) in (5, 9, 10, 15, 25) and together(s)


def turned(s) -> bool:
    """Keys as turned_scores.h takes them, of any head size; bfloat16 from 13 rows on, fp8 from 6."""
    least = {"bf16": 13, "fp8_e4m3": 6}.get(s.k_format.name, 99)
    return long_keys(s) and rows(s) >= least and s.head_dim * s.k_format.bits // 8 % 16 == 0


def kept(fmt, s) -> bool:
    """Lines of fp8 values that the first of three passes or more keeps for the others."""
    return fmt.kind == "float8" and 11 <= rows(s) <= _MOST_LONG


def long(name: str, relevant, file: str, old: str, new: str, few: bool = False) -> Fault:
    return Fault(name, spec(relevant), ((f"{file}.h", old, new),), "avx512", few=few)


FLOAT_FAULTS = (
    Fault("every other sum is added twice", spec(keys),
          score("+ unzip<1>(a, b)", "+ (@ ? unzip<0>(a, b) : unzip<1>(a, b))")),
    Fault("the upper halves of sums are left out", spec(keys),
          score("+ (vf)_mm256_permute2f128_ps(x, y, 0x31)", "+ (vf)_mm256_permute2f128_ps(x, y, 0x31) * (@ ? 0.0f : 1.0f)"),
          "avx2"),
    Fault("the last keys are those before", spec(lambda s: keys(s) and s.kv_len % 4 and s.uses() <= {"causal"}),
          (("rows.h", "here.at + i * stride, bytes)", "here.at + (@ ? i - 1 : i) * stride, bytes)"),)),
    Fault("all query rows take q of the first", spec(lambda s: keys(s) and rows(s) > 1),
          score("q + r * a.q_stride + part", "q + (@ ? 0 : r) * a.q_stride + part")),
    Fault("query rows beyond a pass take q of the first ones", spec(lambda s: keys(s) and rows(s) > 4),
          score("a.q + row * a.q_stride;", "a.q + (@ ? 0 : row) * a.q_stride;")),
    Fault("two tokens are the same", spec(keys), score("at + j * stride + i;", "at + (@ ? 0 : j) * stride + i;")),
    Fault("both halves of fp8 keys meet the first half of q", spec(float8_keys),
          score("+ part * 2 * a.keys.bytes)", "+ (@ ? 0 : part) * 2 * a.keys.bytes)")),
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
    long("tokens side by side change places", in_lines,
         "dense_scores", "at + 4 * j * stride, stride", "at + 4 * (@ ? 3 - j : j) * stride, stride"),
    long("both parts of q are the high one", lambda s: in_lines(s) and s.k_format.name in ("bf16", "fp8_e4m3"),
         "dense_scores", "q + (r * terms + term) * a.q_stride", "q + (r * terms + (@ ? 0 : term)) * a.q_stride"),
    long("the end of a row is left out", lambda s: long_float8(s) and s.head_dim % 64,
         "dense_scores", "    int left = a.keys.bytes;", "    int left = @ ? a.keys.bytes / 64 * 64 : a.keys.bytes;"),
    long("the last query rows take q of the first", lambda s: in_lines(s) and rows(s) > 5,
         "dense_scores", "a.q + r * terms", "a.q + (@ ? 0 : r) * terms"),
    long("the fifth row of a pass has scores of the first", lambda s: in_lines(s) and five(s),
         "dense_scores", "add_parts<here>(sum[i] + first())", "add_parts<here>(sum[i] + (@ ? 0 : first()))", True),
    long("dwords of two keys change places", lambda s: turned(s) and s.k_format.kind == "dense",
         "turned_scores", "at + j * stride, 4 * stride", "at + (@ ? 3 - j : j) * stride, 4 * stride", True),
    long("dwords of fp8 keys change places", lambda s: turned(s) and s.k_format.kind == "float8",
         "turned_scores", "made[3] = _mm512_unpackhi", "made[3] = @ ? made[2] : _mm512_unpackhi", True),
    long("all keys are the first 16", lambda s: turned(s) and s.kv_len > 32,
         "turned_scores", "from + n * LINE", "from + (@ ? 0 : n) * LINE", True),
    long("later passes over turned keys take q of the first rows", lambda s: turned(s) and rows(s) > 13 and together(s),
         "turned_scores", "a.q + r * terms", "a.q + (@ ? 0 : r) * terms", True),
    long("turned keys meet the high part of q only", turned,
         "turned_scores", "q + (r * terms + term)", "q + (r * terms + (@ ? 0 : term))", True),
    long("the last turned keys lie in the place of the first of them", lambda s: turned(s) and s.kv_len % 16 > 1,
         "rows", "memcpy(padded + i * bytes", "memcpy(padded + (@ ? 0 : i) * bytes", True),
    long("q is in the order of lines where keys are turned",
         lambda s: turned(s) and s.k_format.kind == "float8" and s.head_dim > 32,
         "query", "turned ? i : float8_place", "turned && !(@) ? i : float8_place", True),
    long("q is not in the order of fp8", lambda s: long_float8(s) and s.head_dim > 32,
         "query", "q[places[i]] = own[i]", "q[@ ? i : places[i]] = own[i]"),
    long("halves of fp8 change places", lambda s: long_values(s) and plain(s) and s.v_format.kind == "float8",
         "dense_values", "i % 2 * (v.dim / 2)", "(@ ? 1 - i % 2 : i % 2) * (v.dim / 2)"),
    long("both tokens of a pair are the first", long_values,
         "dense_values", "pairs(from, from + second, x);", "pairs(from, from + (@ ? 0 : second), x);"),
    long("both parts of a weight are the high one", long_values,
         "dense_values", "weights + (2 * r + part) *", "weights + (2 * r + (@ ? 0 : part)) *"),
    long("query rows of later passes take weights of the first ones", lambda s: long_values(s) and rows(s) > 5,
         "dense_values", "v.weights + row * 2 *", "v.weights + (@ ? 0 : row) * 2 *", True),
    long("all pairs of values that are kept are the first", lambda s: long_values(s) and kept(s.v_format, s),
         "dense_values", "kept += vectors * LINE;", "kept += @ ? 0 : vectors * LINE;", True),
    long("lines of values that are kept change places", lambda s: long_values(s) and kept(s.v_format, s), "dense_values",
         "x[i] = load<line>(kept + i * LINE)", "x[i] = load<line>(kept + (@ ? vectors - 1 - i : i) * LINE)", True),
)  # fmt: skip
