"""Large pages for large stores: decoding reads all of a cache once per token, and walking small pages costs 5-10 %."""

from __future__ import annotations

import ctypes
import mmap
from functools import cache

from torch import Tensor

_LARGE_PAGE = 2**21  # bytes, on x86-64 and on aarch64 with 4 KiB base pages
_WORTH_IT = 2 * _LARGE_PAGE


@cache
def _madvise():
    """libc's madvise, where there is one that knows large pages (Linux), else None."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function


def empty_rows(like: Tensor, capacity: int) -> Tensor:
    """An uninitialised store of ``capacity`` rows ``[..., capacity, n]`` like those of ``like [..., rows, n]``."""
    return _prefer_large_pages(like.new_empty(*like.shape[:-2], capacity, like.shape[-1]))


def _prefer_large_pages(t: Tensor) -> Tensor:
    """``t``, whose memory the system is asked to back with large pages. Call it before the memory is first written.

    A hint: contents do not change, and where it is not taken nothing else does. Small and other devices' tensors are
    left alone.
    """
    size = t.numel() * t.element_size()
    if t.device.type == "cpu" and size >= _WORTH_IT and _madvise() is not None:
        first = -(-t.data_ptr() // _LARGE_PAGE) * _LARGE_PAGE
        last = (t.data_ptr() + size) // _LARGE_PAGE * _LARGE_PAGE
        if first < last:
            _madvise()(first, last - first, mmap.MADV_HUGEPAGE)
    return t
