"""What this machine has: versions, devices, which backends run here and if not why, and whether they compute right."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

from .backends import cpu
from .cache import LayerShape, new_layer
from .config import CacheConfig
from .dispatch import BACKENDS, append, attend, describe, reasons
from .formats import FORMATS

PACKAGES = ("torch", "transformers", "safetensors", "numpy", "triton", "typer", "rich", "matplotlib")
ERROR_LIMIT = 2e-3  # absolute, on outputs of order 1: room for matrix units that round inputs, none for a wrong kernel


def environment() -> dict:
    """Versions, operating system, CPU, threads, compiled kernels, devices and, in a git checkout of gyrokv, its commit.

    JSON-serialisable.
    """
    from . import __version__

    return {
        "gyrokv": __version__,
        "commit": commit(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES} | {"torch": torch.__version__},
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": cpu_model(),
        "threads": torch.get_num_threads(),
        "kernels": cpu.describe(),
        "devices": {name: device_name(name) for name in devices()},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """The commit of the checkout that gyrokv is imported from (``+`` when files differ from it), else None."""
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ("git", "-C", str(here.parent), *arguments), capture_output=True, text=True, timeout=10, check=False
            )
        except (FileNotFoundError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # an installed copy may lie inside some other project's repository, whose commit would say nothing
    if git("ls-files", "--error-unmatch", here.name) is None:
        return None
    head = git("rev-parse", "HEAD")
    return head and head + ("+" if git("status", "--porcelain", "--untracked-files=no", "--", ".") else "")


def cpu_model() -> str:
    """The processor's name as the system gives it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def devices() -> list[str]:
    """Device types that torch can use here, the CPU first."""
    found = ["cpu"]
    if torch.cuda.is_available():
        found.append("cuda")
    if torch.backends.mps.is_available():
        found.append("mps")
    return found


def device_name(device: str) -> str:
    """A readable name, and for CUDA devices how many there are and how much memory the first has."""
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        return f"{torch.cuda.device_count()} x {properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    return f"{cpu_model()}, {os.cpu_count()} cores" if device == "cpu" else platform.processor()


def backends() -> dict[str, list[str]]:
    """Every backend with the reasons why this machine cannot run it; an empty list means that it can."""
    return {name: list(backend.missing()) for name, backend in BACKENDS.items()}


@dataclass(frozen=True)
class Check:
    """One self-test. ``error``: largest absolute difference from the float64 reference; ``passed``: within ``limit``."""

    case: str
    backend: str
    device: str
    error: float
    limit: float
    passed: bool


def self_test(head_dim: int = 128) -> list[Check]:
    """Each backend that can run here against the float64 reference, on each device.

    Data: N(0, 1) from a fixed seed; every format as K with the next one as V, a decode step and a short prefill with a
    sliding window. Rows that a device stored must decode to what the CPU's do.
    """
    checks = []
    names = list(FORMATS)
    for k_name, v_name in zip(names, names[1:] + names[:1]):
        for q_len, kv_len, window in ((1, 70, None), (5, 40, 16)):
            checks += _check(f"k={k_name},v={v_name}", head_dim, q_len, kv_len, window)
    return checks


def _check(config: str, head_dim: int, q_len: int, kv_len: int, window: int | None) -> list[Check]:
    generator = torch.Generator().manual_seed(0)
    shape = LayerShape(kv_heads=2, head_dim=head_dim, window=window)
    q = torch.randn(1, 4, q_len, head_dim, generator=generator)
    k, v = torch.randn(2, 1, 2, kv_len, head_dim, generator=generator)
    exact = None
    checks = []
    for device in devices():
        layer = new_layer(CacheConfig.parse(config), 0, 1, shape, device=device, batch=1)
        view = append(layer, k.to(device), v.to(device))
        spec = describe(q.to(device), view, window=window, causal=True)
        if exact is None:
            exact = attend(q, view, window=window, backend="reference")
        for name, backend in BACKENDS.items():
            if name == "reference" or reasons(backend, spec):
                continue
            out = attend(q.to(device), view, window=window, backend=name).cpu()
            error = (out - exact).abs().max().item()
            checks.append(Check(str(spec), name, device, error, ERROR_LIMIT, error <= ERROR_LIMIT))
    return checks
