"""Large pages for large stores: decoding reads all of a cache once per token, and small pages cost address look-ups."""

from __future__ import annotations

import ctypes
import math
import mmap
from functools import cache

from torch import Tensor

_LARGE_PAGE = 2**21  # bytes, on x86-64 and on aarch64 with 4 KiB base pages
_SPARE = _LARGE_PAGE // 4  # of the last page: more than this may not be left unused


@cache
def _madvise():
    """libc's madvise, where there is one that knows large pages (Linux), else None."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function


def empty_rows(like: Tensor, capacity: int) -> Tensor:
    """An uninitialised store of ``capacity`` rows ``[..., capacity, n]`` like those of ``like [..., rows, n]``.

    On the CPU the system is asked to back whole large pages of it with such, so it begins at one; that is a hint, and
    where it is not taken nothing else changes.
    """
    shape = (*like.shape[:-2], capacity, like.shape[-1])
    count, item = math.prod(shape), like.element_size()
    pages = (count * item + _SPARE) // _LARGE_PAGE
    if like.device.type != "cpu" or not pages or _madvise() is None:
        return like.new_empty(shape)
    room = like.new_empty(max(count, pages * _LARGE_PAGE // item) + _LARGE_PAGE // item)
    skip = -room.data_ptr() % _LARGE_PAGE
    _madvise()(room.data_ptr() + skip, pages * _LARGE_PAGE, mmap.MADV_HUGEPAGE)
    return room[skip // item :][:count].view(shape)
