"""The formats: one frozen row per format, and nothing else anywhere that knows a format by name.

To add a format add a row to ``_ROWS``; tests, benchmarks, the CLI's choices and the README table read this table.
:class:`KVFormat` says what each column means; the arithmetic that gives a row its meaning is in
``quant.py`` (encode, decode), ``rotation.py`` and ``packing.py``.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from types import MappingProxyType

import torch

from .errors import FormatError
from .rotation import ROTATIONS

KINDS = ("dense", "float8", "linear", "codebook")
SCALES = ("none", "head", "absmax", "signed_absmax", "l2", "rms")
TIES = ("even", "away", "up", "down")
CODINGS = ("none", "index", "sign_magnitude")


@dataclass(frozen=True)
class KVFormat:
    """One KV format. Two rows differ in nothing but these columns, and kernels are driven by them.

    ``name``: what users write; a suffix (``.v2``) marks a published format kept exactly as it was published.
    ``kind``: ``dense`` (an element type), ``float8``, ``linear`` (value = integer * scale) or ``codebook``.
    ``bits``: stored bits per value, without scales.
    ``element``: the torch dtype name of a dense or float8 value.
    ``levels``, ``step``: the table, ascending; a value is ``level * step * scale``. Our own tables are integers.
    ``midpoints``: the decision boundaries of ``levels * step``; empty means the midpoints of neighbours, in float32.
    ``coding``: how the index of a level is stored: as itself, or sign and magnitude (see ``packing.py``).
    ``scale``: the rule that yields the scale; ``scale_dtype``: its storage; ``corrected``: the stored scale is
    divided by the length of the decoded levels, so that a decoded group keeps its L2 norm.
    ``groups``: values per scale, best first: the largest that divides the padded head is used, the smallest is what
    heads are padded to. ``whole_head``: heads are padded up to one of ``groups`` instead, and rotated as a whole.
    ``scale_span``: most values that share one scale within a group (0: the group).
    ``unit``: with the ``l2`` rule, the standard deviation that levels expect of a rotated normal vector.
    ``scale_factor``: with the ``rms`` rule and several spans, a factor on the normalised values (finite, > 0).
    ``rotation``: a row of ``rotation.ROTATIONS``. ``ties``: which way a value on a boundary goes.
    ``max_nmse``: bound on the mean squared error over the variance, head_dim 128, N(0, 1) values (tested both ways).
    """

    name: str
    kind: str
    bits: int
    max_nmse: float
    element: str = ""
    levels: tuple[float, ...] = ()
    step: float = 1.0
    midpoints: tuple[float, ...] = ()
    coding: str = "none"
    scale: str = "none"
    scale_dtype: str = "float16"
    corrected: bool = False
    groups: tuple[int, ...] = (1,)
    whole_head: bool = False
    scale_span: int = 0
    unit: float = 1.0
    scale_factor: float = 1.0
    rotation: str = "none"
    ties: str = "even"

    def __post_init__(self) -> None:
        allowed = (("kind", KINDS), ("scale", SCALES), ("ties", TIES), ("coding", CODINGS), ("rotation", ROTATIONS))
        for column, values in allowed:
            if getattr(self, column) not in values:
                raise FormatError(f"{column}={getattr(self, column)!r} of format {self.name!r} is not one of {list(values)}")
        for column in ("scale_factor", "unit", "step"):
            value = getattr(self, column)
            if not (math.isfinite(value) and value > 0):
                raise FormatError(f"{column}={value!r} of format {self.name!r} must be finite and > 0")
        if self.has_levels:
            if len(self.levels) != 2**self.bits:
                raise FormatError(
                    f"format {self.name!r} has {len(self.levels)} levels, {self.bits} bits need {2**self.bits}"
                )
            if any(a >= b for a, b in zip(self.levels, self.levels[1:])):
                raise FormatError(f"levels of format {self.name!r} are not strictly ascending")
            if self.coding == "sign_magnitude" and any(a != -b for a, b in zip(self.levels, reversed(self.levels))):
                raise FormatError(f"format {self.name!r} stores sign and magnitude but its levels are not symmetric")
            if self.midpoints and len(self.midpoints) != len(self.levels) - 1:
                raise FormatError(f"format {self.name!r} has {len(self.midpoints)} midpoints for {len(self.levels)} levels")

    def __hash__(self) -> int:
        return hash(self.name)  # not of all levels: problems with formats in them are looked up on every call

    @property
    def has_levels(self) -> bool:
        return self.kind in ("linear", "codebook")

    @property
    def is_dense(self) -> bool:
        """True when a stored row is a plain tensor of values."""
        return self.kind == "dense"

    @property
    def dtype(self) -> torch.dtype:
        """The element type of dense and float8 rows."""
        return getattr(torch, self.element)

    def layout(self, head_dim: int) -> tuple[int, int]:
        """``(padded head_dim, group)`` for heads of ``head_dim`` values.

        Raises FormatError when the format cannot hold such heads.
        """
        if head_dim < 1:
            raise FormatError(f"head_dim={head_dim} must be at least 1")
        if self.whole_head:
            if head_dim > max(self.groups):
                raise FormatError(
                    f"head_dim={head_dim}: format {self.name} rotates whole heads of at most {max(self.groups)} values"
                )
            group = min(g for g in self.groups if g >= head_dim)
            return group, group
        padded = -(-head_dim // min(self.groups)) * min(self.groups)
        return padded, max(g for g in self.groups if padded % g == 0)

    def scales_per_head(self, head_dim: int) -> int:
        """Stored scales per token and head."""
        if self.scale in ("none", "head"):
            return 0
        padded, group = self.layout(head_dim)
        return padded // min(group, self.scale_span or group)

    def words_per_head(self, head_dim: int) -> int:
        """Stored words per token and head: elements of a dense row, else 16-bit words."""
        padded, _ = self.layout(head_dim)
        return padded if self.is_dense else padded * self.bits // 16

    def bytes_per_head(self, head_dim: int) -> int:
        """Stored bytes per token and head, scales and padding included."""
        word = self.dtype.itemsize if self.is_dense else 2
        scale = getattr(torch, self.scale_dtype).itemsize
        return self.words_per_head(head_dim) * word + self.scales_per_head(head_dim) * scale

    @cached_property
    def level_values(self) -> torch.Tensor:
        """The table as float32: ``float32(level * float32(step))``, shape ``[2 ** bits]``."""
        step = float(torch.tensor(self.step, dtype=torch.float32))
        return torch.tensor([level * step for level in self.levels], dtype=torch.float64).float()

    @cached_property
    def boundaries(self) -> torch.Tensor:
        """Decision boundaries as float32, shape ``[2 ** bits - 1]``."""
        if self.midpoints:
            return torch.tensor(self.midpoints, dtype=torch.float32)
        values = self.level_values
        return (values[:-1] + values[1:]) * 0.5

    @cached_property
    def digest(self) -> str:
        """SHA-256 over every column but the error bound, and over the rotation's signs; saved with every cache."""
        row = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "max_nmse"}
        row["levels"] = [float(v).hex() for v in self.levels]
        row["midpoints"] = [float(v).hex() for v in self.midpoints]
        for column in ("step", "unit", "scale_factor"):
            row[column] = float(row[column]).hex()
        row["signs"] = ROTATIONS[self.rotation].signs
        return hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()

    def __str__(self) -> str:
        return self.name


def _mirror(half: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(-v for v in reversed(half)) + tuple(half)


def _around_zero(half: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(-v for v in reversed(half)) + (0.0,) + tuple(half)


# Positive halves of the tables. Ours are integers on a grid; `python -m gyrokv.levels` prints how they come about.
# fmt: off
_TURBO2 = (36, 120,)
_TURBO3 = (13, 40, 71, 114,)
_TURBO4 = (5, 15, 25, 36, 48, 62, 79, 104,)
_TQ5 = (
    564, 1695, 2836, 3994, 5177, 6394, 7656, 8976, 10371, 11865, 13490, 15296, 17363, 19836, 23032, 27907,
)
_TQ6 = (
    272, 817, 1363, 1911, 2462, 3017, 3576, 4141, 4713, 5293, 5882, 6481, 7092, 7717, 8357, 9015, 9693, 10394,
    11122, 11881, 12676, 13513, 14401, 15349, 16373, 17491, 18731, 20135, 21772, 23769, 26401, 30505,
)
_TQ8 = (
    59, 176, 294, 412, 529, 647, 765, 883, 1001, 1119, 1237, 1355, 1474, 1592, 1711, 1830, 1949, 2068, 2187, 2307,
    2427, 2547, 2667, 2788, 2909, 3030, 3152, 3274, 3396, 3518, 3641, 3764, 3888, 4012, 4137, 4262, 4387, 4513,
    4639, 4766, 4893, 5021, 5150, 5279, 5409, 5539, 5670, 5802, 5934, 6067, 6201, 6336, 6471, 6607, 6744, 6882,
    7021, 7161, 7302, 7444, 7586, 7730, 7875, 8021, 8169, 8317, 8467, 8618, 8771, 8925, 9080, 9237, 9395, 9556,
    9717, 9881, 10046, 10214, 10383, 10555, 10728, 10904, 11082, 11263, 11446, 11632, 11821, 12012, 12207, 12405,
    12606, 12811, 13020, 13233, 13450, 13671, 13897, 14128, 14364, 14606, 14854, 15109, 15370, 15639, 15916, 16201,
    16496, 16801, 17117, 17446, 17788, 18144, 18518, 18910, 19323, 19761, 20225, 20723, 21258, 21838, 22474, 23180,
    23975, 24890, 25977, 27327, 29144, 32046,
)
_TQ5_V1 = (
    0.0658849, 0.1980377, 0.331355, 0.4666676, 0.6048936, 0.7470884, 0.8945114, 1.0487242, 1.211741, 1.3862739,
    1.5761599, 1.7871646, 2.0286608, 2.3176743, 2.6910589, 3.260679,
)
_TQ6_V1 = (
    0.0311537, 0.0935225, 0.1560761, 0.2189392, 0.2822386, 0.3461048, 0.4106724, 0.4760822, 0.5424819, 0.6100285,
    0.6788902, 0.7492492, 0.8213046, 0.8952766, 0.9714118, 1.0499889, 1.1313277, 1.2157998, 1.3038428, 1.3959804,
    1.4928497, 1.5952401, 1.7041502, 1.8208742, 1.9471373, 2.0853192, 2.2388464, 2.4129324, 2.6161277, 2.8640626,
    3.1907215, 3.6996161,
)
_TQ8_V1 = (
    0.0135717, 0.0407151, 0.0678584, 0.0950019, 0.1221453, 0.1492888, 0.1764324, 0.2035761, 0.2307198, 0.2578636,
    0.2850076, 0.3121517, 0.339296, 0.3664405, 0.3935852, 0.4207301, 0.4478753, 0.4750208, 0.5021667, 0.5293129,
    0.5564596, 0.5836067, 0.6107544, 0.6379027, 0.6650517, 0.6922014, 0.719352, 0.7465035, 0.7736561, 0.8008098,
    0.8279648, 0.8551212, 0.8822793, 0.909439, 0.9366008, 0.9637647, 0.990931, 1.0180999, 1.0452718, 1.0724469,
    1.0996255, 1.1268081, 1.1539951, 1.1811868, 1.2083838, 1.2355865, 1.2627956, 1.2900118, 1.3172356, 1.3444678,
    1.3717093, 1.398961, 1.4262237, 1.4534986, 1.4807869, 1.5080897, 1.5354084, 1.5627445, 1.5900996, 1.6174755,
    1.6448739, 1.672297, 1.6997469, 1.7272261, 1.7547372, 1.7822828, 1.8098662, 1.8374904, 1.8651592, 1.8928763,
    1.9206458, 1.9484722, 1.9763603, 2.0043154, 2.032343, 2.0604493, 2.0886408, 2.1169245, 2.1453081, 2.1737998,
    2.2024086, 2.231144, 2.2600165, 2.2890372, 2.3182184, 2.3475732, 2.3771157, 2.4068614, 2.436827, 2.4670306,
    2.4974918, 2.5282321, 2.5592748, 2.5906452, 2.622371, 2.6544825, 2.6870129, 2.7199985, 2.7534795, 2.7874999,
    2.8221086, 2.8573596, 2.8933131, 2.9300362, 2.967604, 3.0061011, 3.0456229, 3.086278, 3.1281899, 3.1715011,
    3.2163758, 3.2630056, 3.3116156, 3.3624729, 3.4158977, 3.4722785, 3.5320936, 3.5959415, 3.6645851, 3.7390194,
    3.820578, 3.9111092, 4.0132856, 4.1311907, 4.2715508, 4.4467193, 4.6836997, 5.0652659,
)
_TURBO2_V2 = (0.039994, 0.133462,)
_TURBO3_V2 = (0.02146, 0.065717, 0.117832, 0.190685,)
_TURBO4_V2 = (0.006938, 0.020989, 0.035597, 0.051262, 0.068756, 0.089527, 0.117195, 0.173926,)
_TQ4_V1 = (0.128395, 0.3880483, 0.6567591, 0.9423405, 1.2562312, 1.6180464, 2.0690172, 2.7325896,)
_TURBO2_V2_MIDPOINTS = (0.086728,)
_TURBO3_V2_MIDPOINTS = (0.043589, 0.091775, 0.154259,)
_TURBO4_V2_MIDPOINTS = (0.013963, 0.028293, 0.04343, 0.060009, 0.079142, 0.103361, 0.14556,)
# fmt: on

_RSQRT128 = 0.08838834764831845  # 1 / sqrt(128): the turbo tables are in units of a unit vector of 128 values
_ANY = (128, 64, 32)


def _ours(name: str, bits: int, half: tuple[int, ...], step: float, max_nmse: float, **columns) -> KVFormat:
    shared = dict(coding="sign_magnitude", corrected=True, ties="up", levels=_mirror(half), step=step)
    return KVFormat(name, "codebook", bits, max_nmse, **shared, **columns)


def _turbo(name: str, bits: int, half: tuple[int, ...], sigma_step: float, max_nmse: float) -> KVFormat:
    step = sigma_step * _RSQRT128
    return _ours(name, bits, half, step, max_nmse, groups=_ANY, scale="l2", unit=_RSQRT128, rotation="turbo")


def _tq(name: str, bits: int, half: tuple[int, ...], step: float, max_nmse: float) -> KVFormat:
    return _ours(name, bits, half, step, max_nmse, groups=(512, 256, *_ANY), scale="rms", rotation="mlx")


def _published_turbo(name: str, bits: int, half, midpoints, max_nmse: float) -> KVFormat:
    return KVFormat(
        name, "codebook", bits, max_nmse, levels=_mirror(half), midpoints=_around_zero(midpoints),
        coding="sign_magnitude", scale="l2", corrected=True, groups=(128,), unit=_RSQRT128, rotation="turbo", ties="up",
    )  # fmt: skip


def _published_tq(name: str, bits: int, half, max_nmse: float) -> KVFormat:
    return KVFormat(
        name, "codebook", bits, max_nmse, levels=_mirror(half), coding="sign_magnitude", scale="rms",
        scale_dtype="float32", groups=(512, 256, 128, 64), whole_head=True, scale_span=256, rotation="mlx", ties="down",
    )  # fmt: skip


def _dense(name: str, element: str, bits: int, max_nmse: float) -> KVFormat:
    return KVFormat(name, "dense", bits, max_nmse, element=element)


def _linear(name: str, bits: int, max_nmse: float, **columns) -> KVFormat:
    levels = tuple(range(-(2 ** (bits - 1)), 2 ** (bits - 1)))
    return KVFormat(name, "linear", bits, max_nmse, levels=levels, coding="index", groups=(32,), **columns)


_ROWS = (
    _dense("f32", "float32", 32, 0.0),
    _dense("f16", "float16", 16, 5e-8),
    _dense("bf16", "bfloat16", 16, 3e-6),
    KVFormat("fp8_e4m3", "float8", 8, 8e-4, element="float8_e4m3fn", scale="head", groups=(8,)),
    _linear("q8_0", 8, 3.3e-5, scale="absmax", ties="away"),
    _linear("q4_0", 4, 8.5e-3, scale="signed_absmax", ties="up"),
    _turbo("turbo2", 2, _TURBO2, 0.012586218751558378, 0.125),
    _turbo("turbo3", 3, _TURBO3, 0.018888265689841453, 0.036),
    _turbo("turbo4", 4, _TURBO4, 0.026217081149145588, 0.0100),
    _tq("tq5", 5, _TQ5, 0.00011684448996486048, 2.7e-3),
    _tq("tq6", 6, _TQ6, 0.00012273899904940294, 6.8e-4),
    _tq("tq8", 8, _TQ8, 0.0001436541387389174, 4.4e-5),
    _published_turbo("turbo2.v2", 2, _TURBO2_V2, _TURBO2_V2_MIDPOINTS, 0.125),
    _published_turbo("turbo3.v2", 3, _TURBO3_V2, _TURBO3_V2_MIDPOINTS, 0.037),
    _published_turbo("turbo4.v2", 4, _TURBO4_V2, _TURBO4_V2_MIDPOINTS, 0.0215),
    _published_tq("tq4.v1", 4, _TQ4_V1, 0.0100),
    _published_tq("tq5.v1", 5, _TQ5_V1, 2.7e-3),
    _published_tq("tq6.v1", 6, _TQ6_V1, 6.8e-4),
    _published_tq("tq8.v1", 8, _TQ8_V1, 6.7e-5),
)

FORMATS: Mapping[str, KVFormat] = MappingProxyType({row.name: row for row in _ROWS})


def get_format(name: str | KVFormat) -> KVFormat:
    """The row called ``name`` (a row is returned as it is). Raises FormatError, listing the names, if there is none."""
    if isinstance(name, KVFormat):
        return name
    if name not in FORMATS:
        raise FormatError(f"unknown format {name!r}; formats are {', '.join(FORMATS)}")
    return FORMATS[name]


def dense_format(dtype: torch.dtype) -> KVFormat:
    """The dense row whose elements are ``dtype``."""
    for row in _ROWS:
        if row.is_dense and row.dtype == dtype:
            return row
    raise FormatError(f"dtype {dtype} is no dense format; use one of {[str(r.dtype) for r in _ROWS if r.is_dense]}")
