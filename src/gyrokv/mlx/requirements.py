"""Which MLX this package works with, and whether its kernels can run here."""

from __future__ import annotations

from importlib.util import find_spec

from ..errors import GyroKVError


def check_installed() -> None:
    """Raise ImportError, saying what to install, unless MLX and mlx-lm can be imported."""
    for module, package in (("mlx", "mlx"), ("mlx_lm", "mlx-lm")):
        if find_spec(module) is None:
            raise ImportError(f"gyrokv.mlx needs {package}, and there is none; install it with: pip install 'gyrokv[mlx]'")


def check_gpu() -> None:
    """Raise GyroKVError unless MLX has an Apple GPU to launch kernels on."""
    import mlx.core as mx

    if not mx.metal.is_available():
        raise GyroKVError(
            f"no Apple GPU here: MLX {mx.__version__} has no Metal back-end on this machine, and gyrokv.mlx is made of "
            "Metal kernels; gyrokv.hf and gyrokv.KVCache run on CPUs"
        )
