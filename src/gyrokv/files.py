"""Saved caches: one safetensors file, rows in canonical order, every format's digest, and a checksum over the bytes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import CacheFileError, FormatError
from .formats import get_format
from .layer import LayerCache
from .quant import Codec

_LAYOUT = 1  # of the file; the meaning of rows is in the formats' digests


def save_layers(path: str | os.PathLike, layers: Sequence[LayerCache | None], note: dict[str, Any] | None = None) -> None:
    """Write ``layers`` (None for one that holds nothing yet) and ``note`` (JSON values) to ``path``.

    The file is complete or not there: it is written beside ``path`` and then moved into place.
    """
    tensors: dict[str, Tensor] = {}
    described: list[dict | None] = []
    digests: dict[str, str] = {}
    for i, layer in enumerate(layers):
        if layer is None:
            described.append(None)
            continue
        state, positions = layer.state()
        sides = {}
        for side, codec in (("k", layer.k_codec), ("v", layer.v_codec)):
            digests[codec.format.name] = codec.format.digest
            override = codec.override
            if isinstance(override, Tensor):
                state[f"{side}.rotation"], override = codec.matrix, "matrix"
            state[f"{side}.factor"] = codec.scale
            sides[side] = {"format": codec.format.name, "head_dim": codec.head_dim, "rotation": override}
        tensors.update({f"{i}.{name}": t.detach().cpu().contiguous() for name, t in state.items()})
        described.append(
            {
                **sides,
                "positions": positions,
                "batch": layer.batch,
                "kv_heads": layer.kv_heads,
                "window": layer.window,
                "sinks": layer.sinks,
                "recent": layer.recent,
                "dtype": str(layer.dtype).removeprefix("torch."),
            }  # fmt: skip
        )
    header = {"layout": _LAYOUT, "layers": described, "digests": digests, "note": note or {}}
    header["checksum"] = _checksum(tensors, header)
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{uuid4().hex}")
    try:
        save_file(tensors, temporary, metadata={"gyrokv": json.dumps(header)})
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load_layers(
    path: str | os.PathLike, device: torch.device | str = "cpu"
) -> tuple[list[LayerCache | None], dict[str, Any]]:
    """Layers and note that :func:`save_layers` wrote, on ``device``.

    Raises FileNotFoundError, or CacheFileError when the file is no saved cache, is damaged, or holds formats that
    are unknown here or mean something else here.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no cache file at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except SafetensorError as error:
        raise CacheFileError(f"{path} is not a readable safetensors file: {error}") from error
    if "gyrokv" not in metadata:
        raise CacheFileError(f"{path} is a safetensors file but not a saved gyrokv cache")
    try:
        header = json.loads(metadata["gyrokv"])
        if header["layout"] != _LAYOUT:
            raise CacheFileError(f"{path} has file layout {header['layout']}; this version reads {_LAYOUT}")
        checksum = header.pop("checksum")
        if _checksum(tensors, header) != checksum:
            raise CacheFileError(f"{path} is damaged: its contents do not match the checksum it was saved with")
        _check_digests(path, header["digests"])
        layers: list[LayerCache | None] = []
        for i, described in enumerate(header["layers"]):
            own = {name.removeprefix(f"{i}."): t for name, t in tensors.items() if name.startswith(f"{i}.")}
            layers.append(None if described is None else _restore(described, own, device))
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise CacheFileError(f"{path} is damaged: its header lacks or garbles {error}") from error
    return layers, header["note"]


def _restore(described: dict, tensors: dict[str, Tensor], device: torch.device | str) -> LayerCache:
    codecs = []
    for side in "kv":
        d = described[side]
        rotation = tensors.pop(f"{side}.rotation") if d["rotation"] == "matrix" else d["rotation"]
        factor = tensors.pop(f"{side}.factor")
        codecs.append(Codec(d["format"], d["head_dim"], kv_heads=described["kv_heads"], rotation=rotation, scale=factor))
    layer = LayerCache(
        *codecs, batch=described["batch"], kv_heads=described["kv_heads"], dtype=getattr(torch, described["dtype"]),
        device=device, window=described["window"], sinks=described["sinks"], recent=described["recent"],
    )  # fmt: skip
    layer.load_state(tensors, described["positions"])
    return layer


def _check_digests(path: Path, digests: dict[str, str]) -> None:
    for name, digest in digests.items():
        try:
            here = get_format(name).digest
        except FormatError as error:
            raise CacheFileError(f"{path} holds format {name!r}, which is unknown here") from error
        if here != digest:
            raise CacheFileError(
                f"{path} was written with another definition of format {name!r}: digest {digest[:12]}, here {here[:12]}"
            )


def _checksum(tensors: dict[str, Tensor], header: dict) -> str:
    """SHA-256 of what a file says (``header``, without this checksum) and of every tensor."""
    total = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        t = tensors[name].contiguous()
        total.update(f"{name} {t.dtype} {tuple(t.shape)}\n".encode())
        total.update(t.reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
