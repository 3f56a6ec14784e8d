"""``gyrokv formats``, ``gyrokv explain`` and ``gyrokv env``: what there is, what can run, and whether it works."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from typing import Annotated

import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from .. import env as machine
from ..dispatch import AUTO, BACKENDS, reasons
from ..dispatch import explain as explain_spec
from ..errors import FormatError
from ..formats import FORMATS, KVFormat
from ..quant import dequantize, quantize
from ..spec import DTYPES, AttentionSpec
from .options import Json, UserError, at_least, blame, console, parse_cache, print_json

_VALUES = 2**17  # N(0, 1) values that the signal to noise ratio is measured on: good to 0.05 dB


def formats(
    head_dim: Annotated[int, typer.Option("--head-dim", help="Values per head; bytes depend on it.")] = 128,
    as_json: Json = False,
) -> None:
    """List the KV formats: what they store, in how many bytes, and how exactly."""
    at_least("--head-dim", head_dim, 1)
    heads = -(-_VALUES // head_dim)
    rows = [_describe(fmt, head_dim, heads) for fmt in FORMATS.values()]
    data = f"SQNR measured on {heads} heads of {head_dim} independent N(0, 1) values, encoded and decoded"
    if as_json:
        print_json({"head_dim": head_dim, "sqnr_data": data, "formats": rows})
        return
    table = Table(title=f"KV formats at head_dim {head_dim}", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    headings = ("format", "bits", "bytes per\nhead", "bits per\nvalue", "rotation", "scale rule\n/ values", "SQNR\ndB")
    for heading, side in zip(headings, ("left", "right", "right", "right", "left", "left", "right")):
        table.add_column(heading, justify=side, no_wrap=True)
    for row in rows:
        if row["unsupported"]:
            table.add_row(row["name"], str(row["bits"]), "-", "-", row["rotation"], row["scale"], "-")
            continue
        scale = row["scale"] + (f" / {row['values_per_scale']}" if row["values_per_scale"] else "")
        exact = "exact" if row["sqnr_db"] is None else f"{row['sqnr_db']:.2f}"
        sizes = (str(row["bytes_per_head"]), f"{row['bits_per_value']:.3f}")
        table.add_row(row["name"], str(row["bits"]), *sizes, row["rotation"], scale, exact)
    console().print(table)
    print(data)
    for row in rows:
        if row["unsupported"]:
            print(f"{row['name']}: {row['unsupported']}")


def _describe(fmt: KVFormat, head_dim: int, heads: int) -> dict:
    row = {"name": fmt.name, "kind": fmt.kind, "bits": fmt.bits, "rotation": fmt.rotation, "scale": fmt.scale}
    try:
        padded, _ = fmt.layout(head_dim)
    except FormatError as error:
        return {**row, "unsupported": str(error)}
    size, scales = fmt.bytes_per_head(head_dim), fmt.scales_per_head(head_dim)
    x = torch.randn(heads, head_dim, generator=torch.Generator().manual_seed(0))
    noise = (dequantize(quantize(x, fmt), fmt, head_dim).double() - x).square().mean().item()
    return {
        **row,
        "bytes_per_head": size,
        "bits_per_value": 8 * size / head_dim,
        "values_per_scale": padded // scales if scales else None,
        "sqnr_db": 10 * math.log10(x.double().square().mean().item() / noise) if noise else None,
        "unsupported": None,
    }


def explain(
    cache: Annotated[str, typer.Argument(metavar="CACHE", help="A cache config, e.g. q8_0/turbo4 or 'k=q8_0,v=turbo4'.")],
    head_dim: Annotated[int, typer.Option("--head-dim", help="Values per K head.")],
    head_dim_v: Annotated[int | None, typer.Option("--head-dim-v", help="Values per V head, if they differ.")] = None,
    heads: Annotated[str, typer.Option("--heads", metavar="Q/KV", help="Query heads and KV heads.")] = "32/8",
    batch: Annotated[int, typer.Option("--batch", help="Sequences.")] = 1,
    q_len: Annotated[int, typer.Option("--q-len", help="Queries: 1 is a decode step.")] = 1,
    kv_len: Annotated[int, typer.Option("--kv-len", help="Keys held.")] = 1024,
    causal: Annotated[bool, typer.Option("--causal/--no-causal", help="Mask what lies ahead.")] = True,
    window: Annotated[int | None, typer.Option("--window", help="Sliding window in tokens.")] = None,
    softcap: Annotated[float, typer.Option("--softcap", help="Cap c of c * tanh(score / c); 0 for none.")] = 0.0,
    alibi: Annotated[float, typer.Option("--alibi", help="ALiBi's max_bias; needs --mask additive.")] = 0.0,
    mask: Annotated[str | None, typer.Option("--mask", help="A given mask: bool or additive.")] = None,
    sinks: Annotated[bool, typer.Option("--sinks", help="Learned sink logits.")] = False,
    padded: Annotated[bool, typer.Option("--padding", help="Left-padded batch.")] = False,
    dtype: Annotated[str, typer.Option("--dtype", help="Of queries and output.")] = "bfloat16",
    device: Annotated[str, typer.Option("--device", help="cpu, cuda or mps.")] = "cpu",
) -> None:
    """Say which backend runs an attention problem, and why the others do not. Exit status 1 if none can."""
    config = parse_cache(cache, "CACHE")
    parts = heads.split("/")
    if len(parts) != 2 or not all(p.isdecimal() for p in parts):
        raise UserError(f"--heads {heads!r} must be query heads and KV heads, such as 32/8")
    dtypes = {str(d).removeprefix("torch."): d for d in DTYPES}
    if dtype not in dtypes:
        raise UserError(f"--dtype {dtype!r} is not one of {', '.join(dtypes)}")
    policies = {config.default: None}
    for _, settings in config.overrides:
        policies[replace(config.default, **dict(settings))] = None
    runnable = True
    for policy in policies:
        with blame("explain", ValueError, TypeError):
            spec = AttentionSpec(
                policy.k, policy.v, head_dim, head_dim_v or head_dim, batch, int(parts[0]), int(parts[1]), q_len, kv_len,
                dtypes[dtype], device, causal=causal, window=window, softcap=softcap, alibi=alibi, mask=mask, sinks=sinks,
                starts=padded, ring=window is not None, unquantised=bool(policy.sinks or policy.recent),
            )  # fmt: skip
        print(explain_spec(spec))
        runnable &= any(not reasons(BACKENDS[name], spec) for name in AUTO)
    if not runnable:
        raise typer.Exit(1)


def env(as_json: Json = False) -> None:
    """Show versions, devices and backends, and run a self-test. Exit status 1 if it fails."""
    facts, backends, checks = machine.environment(), machine.backends(), machine.self_test()
    passed = bool(checks) and all(check.passed for check in checks)
    if as_json:
        tests = {"passed": passed, "checks": [asdict(check) for check in checks]}
        print_json({**facts, "backends": backends, "self_test": tests})
    else:
        for name, value in facts.items():
            for key, text in value.items() if isinstance(value, dict) else ((name, value),):
                print(f"{key:<12} {'-' if text is None else text}")
        for name, missing in backends.items():
            print(f"{'backend':<12} {name}: {'can run' if not missing else 'cannot run: ' + '; '.join(missing)}")
        for backend, device in dict.fromkeys((c.backend, c.device) for c in checks):
            mine = [c for c in checks if (c.backend, c.device) == (backend, device)]
            worst = max(c.error for c in mine)
            verdict = "passed" if all(c.passed for c in mine) else "FAILED"
            print(f"{'self-test':<12} {backend} on {device}: {verdict}, {len(mine)} problems, largest error {worst:.1e}")
        for check in checks:
            if not check.passed:
                print(f"{'failed':<12} {check.case}: error {check.error:.1e} exceeds {check.limit:.1e}")
    if not passed:
        raise typer.Exit(1)
