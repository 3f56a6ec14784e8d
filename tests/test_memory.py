"""Where stores lie: a large one begins at a large page, whatever its rows."""

from __future__ import annotations

import pytest
import torch

from gyrokv import memory

LARGE = 2**21  # bytes
LIKES = (torch.empty(1, 8, 0, 64, dtype=torch.int16), torch.empty(1, 8, 3, 32, dtype=torch.float16))


@pytest.mark.parametrize("like", LIKES, ids=lambda t: str(t.dtype))
@pytest.mark.parametrize("rows", (0, 100, 2**13, 2**14 - 1, 3 * 2**13 + 9))
def test_a_large_store_begins_at_a_large_page(rows, like):
    made = memory.empty_rows(like, rows)
    size = made.numel() * made.element_size()
    assert made.shape == (1, 8, rows, like.shape[-1]) and made.dtype == like.dtype and made.is_contiguous()
    assert size < LARGE or memory._madvise() is None or made.data_ptr() % LARGE == 0
    assert made.untyped_storage().nbytes() <= size + 3 * LARGE // 2
    assert torch.equal(made.fill_(1), torch.ones_like(made))
