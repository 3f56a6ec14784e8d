"""Looking for NaN and inf on an accelerator without waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor


class Watch:
    """A flag on the device that :meth:`look` raises and a later call reads.

    Each look also starts a copy of the flag to the host. The next one that finds a copy done raises what it says, so an
    error comes a call late, or when somebody waits for it, and is never lost. Under graph capture only the flag is set.
    """

    def __init__(self, device: torch.device) -> None:
        with torch.inference_mode(False):  # so that it can be written to in every mode
            self._flag = torch.zeros(1, dtype=torch.int32, device=device)
            self._seen = torch.zeros(1, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._copied: torch.cuda.Event | None = None

    @classmethod
    def on(cls, device: torch.device) -> Watch | None:
        """A watch where values are looked at without waiting; None where looking costs no wait."""
        return cls(device) if device.type == "cuda" else None

    def look(self, k: Tensor, v: Tensor) -> None:
        """Raise ValueError for what earlier calls brought, if that is known by now; look at ``k`` and ``v``."""
        capturing = self._flag.is_cuda and torch.cuda.is_current_stream_capturing()
        if not capturing and self._copied is not None and self._copied.query():
            self._raise(int(self._seen))
        self._flag |= ~(torch.isfinite(k).all() & torch.isfinite(v).all())
        if not capturing and self._copied is None and self._flag.is_cuda:
            self._seen.copy_(self._flag, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def wait(self) -> None:
        """Raise ValueError if NaN or inf was looked at since the last error. Waits for the device."""
        self._raise(int(self._flag))

    def _raise(self, found: int) -> None:
        self._copied = None
        if found:
            self._flag.zero_()
            raise ValueError(
                "k or v of an earlier append held NaN or inf; they cannot be cached, but the cache holds them: truncate or "
                "reset it (on an accelerator append does not wait to find out)"
            )

    def __deepcopy__(self, memo: dict) -> Watch:
        return Watch(self._flag.device)
