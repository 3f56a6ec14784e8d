"""Codes <-> 16-bit words: one rule for every width.

A width is cut into fields of 8, 4, 2 and 1 bits, widest first, from the low bits up: 3 = 2 + 1, 5 = 4 + 1,
6 = 4 + 2. A field of w bits over D values fills ``D * w / 16`` words, and word i holds the values

    i, i + D*w/16, i + 2*D*w/16, ...        (16 / w of them, the first in the low bits)

so one plane of a word row (the same bits of every word) is a contiguous slice of the head, and a kernel multiplies
it with a plain slice of q. A row is its fields' words one after the other: exactly ``bits`` bits per value.

    4 bits, D = 8, word 1:   | code 7 | code 5 | code 3 | code 1 |     (high bits left)

A symmetric table stores sign and magnitude: the top bit of a code is the sign (1 = negative), the rest counts
magnitudes from the smallest, so half the table serves both signs. Other tables store the index of the level.
Words are carried in ``torch.int16`` (the same bits; torch knows few operations on uint16).
"""

from __future__ import annotations

import torch
from torch import Tensor


def fields(bits: int) -> tuple[int, ...]:
    """Field widths of a code of ``bits`` bits (1 to 8), low bits first."""
    if not 1 <= bits <= 8:
        raise ValueError(f"bits={bits} must be between 1 and 8")
    return tuple(width for width in (8, 4, 2, 1) if bits & width)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes ``[..., D]`` (uint8, each below ``2 ** bits``) to words ``[..., D * bits / 16]`` (int16)."""
    dim = codes.shape[-1]
    rest = codes.to(torch.int32)
    rows = []
    for width in fields(bits):
        per_word = 16 // width
        if dim % per_word:
            raise ValueError(f"last axis {dim} is not a multiple of {per_word}, which a {width}-bit field needs")
        planes = (rest & (2**width - 1)).unflatten(-1, (per_word, dim // per_word))
        shifts = torch.arange(0, 16, width, dtype=torch.int32, device=codes.device)
        words = (planes << shifts[:, None]).sum(-2, dtype=torch.int32)
        rows.append(torch.where(words >= 2**15, words - 2**16, words).to(torch.int16))
        rest = rest >> width
    return torch.cat(rows, dim=-1)


def unpack(words: Tensor, bits: int) -> Tensor:
    """Words ``[..., D * bits / 16]`` (int16) to codes ``[..., D]`` (uint8)."""
    if words.shape[-1] * 16 % bits:
        raise ValueError(f"last axis of {words.shape[-1]} words holds no whole number of {bits}-bit codes")
    dim = words.shape[-1] * 16 // bits
    codes = torch.zeros(*words.shape[:-1], dim, dtype=torch.uint8, device=words.device)
    start, low = 0, 0
    for width in fields(bits):
        count = dim * width // 16
        part = words[..., start : start + count].to(torch.int32)
        shifts = torch.arange(0, 16, width, dtype=torch.int32, device=words.device)
        planes = (part.unsqueeze(-2) >> shifts[:, None]) & (2**width - 1)
        codes |= (planes << low).flatten(-2).to(torch.uint8)
        start, low = start + count, low + width
    return codes


def to_sign_magnitude(index: Tensor, bits: int) -> Tensor:
    """Indices into an ascending symmetric table to sign-magnitude codes (both uint8). Its own inverse is below."""
    half = 2 ** (bits - 1)
    return torch.where(index >= half, index - half, 2 * half - 1 - index)


def from_sign_magnitude(code: Tensor, bits: int) -> Tensor:
    """Sign-magnitude codes to indices into the ascending table (both uint8)."""
    half = 2 ** (bits - 1)
    return torch.where(code >= half, 2 * half - 1 - code, code + half)
