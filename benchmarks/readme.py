"""The generated parts of README.md: the support table (from the code) and the measured numbers (from results/).

``python benchmarks/readme.py`` writes them between their markers; ``--check`` exits 1 if they are out of date.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from statistics import median

from gyrokv import FORMATS, AttentionSpec
from gyrokv.dispatch import AUTO, BACKENDS
from gyrokv.errors import FormatError
from gyrokv.spec import HEAD_DIMS, UNEQUAL_HEAD_DIMS, features

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).parent / "results"
EXAMPLES = {
    "causal": {"causal": True}, "window": {"window": 7}, "softcap": {"softcap": 30.0},
    "mask": {"mask": "bool"}, "alibi": {"alibi": 8.0, "mask": "additive"},
    "block_map": {"block_map": True, "mask": "bool"}, "sinks": {"sinks": True}, "starts": {"starts": True},
    "ring": {"ring": True, "window": 7}, "unquantised": {"unquantised": True}, "fast": {"fast": True},
    "paged": {"paged": True}, "lengths": {"lengths": True},
}  # fmt: skip
MEANING = {
    "causal": "causal, bottom right",
    "window": "sliding window",
    "softcap": "softcap",
    "mask": "boolean and additive masks, rank 2 or 4",
    "alibi": "ALiBi",
    "block_map": "block maps",
    "sinks": "learned sinks",
    "starts": "ragged batches (left padding)",
    "ring": "ring buffers",
    "unquantised": "dense first and recent tokens",
    "paged": "paged rows",
    "lengths": "ragged batches (lengths on the device)",
    "fast": "`fast=True` (rounding to 8 bits is allowed)",
}


def formats_table() -> str:
    """One line per format: what it stores, and the head sizes that it cannot hold."""
    lines = ["| format | bits | bytes per 128 values | rotation | head sizes |", "|---|---|---|---|---|"]
    for fmt in FORMATS.values():
        refused = []
        for dim in HEAD_DIMS:
            try:
                fmt.layout(dim)
            except FormatError:
                refused.append(str(dim))
        dims = "all" if not refused else f"all but {', '.join(refused)}"
        lines.append(f"| `{fmt}` | {fmt.bits} | {fmt.bytes_per_head(128)} | {fmt.rotation} | {dims} |")
    return "\n".join(lines)


def features_table() -> str:
    """One line per feature, one column per backend; every K format with every V format is one more line."""
    names = [*AUTO, *(n for n in BACKENDS if n not in AUTO)]
    lines = [f"| | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
    base = AttentionSpec("q8_0", "turbo4", 128, 128, q_heads=8, kv_heads=2, q_len=4, kv_len=64)
    devices = {name: getattr(BACKENDS[name], "DEVICE", "cpu") for name in names}

    def row(label: str, cases: list[AttentionSpec]) -> str:
        cells = []
        for name in names:
            specs = [replace(spec, device=devices[name]) for spec in cases]
            why = [r for spec in specs for r in BACKENDS[name].why_not(spec) if r] + [
                r for spec in specs for r in sorted(spec.uses() - BACKENDS[name].UNDERSTANDS)
            ]
            cells.append("yes" if not why else f"no: {why[0]}")
        return f"| {label} | {' | '.join(cells)} |"

    pairs = [replace(base, k_format=k, v_format=v) for k in FORMATS.values() for v in FORMATS.values()]
    lines.append(row(f"all {len(pairs)} pairs of K and V formats", pairs))
    dims = [(d, d) for d in HEAD_DIMS] + list(UNEQUAL_HEAD_DIMS)
    sizes = ", ".join(str(d) for d in HEAD_DIMS) + ", " + ", ".join(f"{k}/{v}" for k, v in UNEQUAL_HEAD_DIMS)
    lines.append(row(f"head sizes {sizes}", [replace(base, head_dim=k, head_dim_v=v) for k, v in dims]))
    for feature in features():
        lines.append(row(MEANING[feature.name], [replace(base, **EXAMPLES[feature.name])]))
    for name in names:
        if note := getattr(BACKENDS[name], "NOTE", ""):
            lines += ["", f"`{name}` (device `{devices[name]}`): {note}."]
    return "\n".join(lines)


def quality_table() -> str:
    """The demo's measurement, as recorded in results/demo.json."""
    record = json.loads((RESULTS / "demo.json").read_text())
    machine = record["environment"]
    parts = []
    for entry in record["models"]:
        model, settings, rows = entry["model"], entry["settings"], entry["rows"]
        parts += [
            f"**{Path(model['path']).name}** ({model['parameters'] / 1e6:.1f} M parameters, {model['dtype']}); "
            f"{settings['windows']} windows of {settings['window']} tokens, {rows[0]['estimate']['scored_tokens']} scored:",
            "",
            "| K / V | bytes per token | smaller | PPL | ΔPPL | ΔNLL ± s.e. | KL mean | KL p99 | top-1 |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for i, row in enumerate(rows):
            estimate = row["estimate"]
            cells = [f"`{row['label']}`", f"{estimate['bytes_per_token']:,.0f}", f"{row['ratio']:.2f}x"]
            cells.append(f"{estimate['ppl']:.4f}")
            if i:
                cells.append(f"{row['delta_ppl_percent']:+.3f} %")
                cells.append(f"{row['delta_nll']:+.5f} ± {row['delta_nll_se']:.5f}")
                cells += [f"{row['kl_mean']:.2e}", f"{row['kl_p99']:.2e}", f"{100 * row['top1']:.2f} %"]
            else:
                cells += ["–"] * 5
            parts.append(f"| {' | '.join(cells)} |")
        parts.append("")
    versions = ", ".join(f"{name} {machine['packages'][name]}" for name in ("torch", "transformers"))
    seconds = sum(entry["seconds"] for entry in record["models"])
    parts.append(
        f"Measured {record['when'][:10]} on {machine['cpu']} ({machine['threads']} threads), {versions}, commit "
        f"`{machine['commit'][:10]}`, {seconds:.0f} s in all, with `{record['command']}`."
    )
    return "\n".join(parts)


def cpu_table() -> str:
    """Decode and prefill of the CPU kernels, as recorded in results/cpu.json."""
    record = json.loads((RESULTS / "cpu.json").read_text())
    machine, rows = record["environment"], record["rows"]
    ours = [r for r in rows if r.get("by") == "gyrokv" and not r.get("fast") and not r.get("level") and r.get("groups") == 4]

    def find(part: str, formats: str, dim: int, kv_len: int, causal: bool) -> dict | None:
        wanted = dict(part=part, formats=formats, head_dim=dim, kv_len=kv_len, causal=causal)
        return next((r for r in ours if all(r[key] == value for key, value in wanted.items())), None)

    def torch_us(part: str, dim: int, kv_len: int) -> float:
        same = [r for r in rows if r["part"] == part and r["by"].startswith("torch") and r["head_dim"] == dim]
        return min(r["us"] for r in same if r["kv_len"] == kv_len and not r.get("causal"))

    dims = sorted({r["head_dim"] for r in ours if r["part"] == "decode" and r["kv_len"] == 16384})
    names = list(dict.fromkeys(r["formats"] for r in ours if r["part"] == "decode"))
    lines = ["| K / V | " + " | ".join(f"head_dim {d}: ms, GB/s, share" for d in dims) + " |", "|---|" + "---|" * len(dims)]
    lines.append("| PyTorch, its best | " + " | ".join(f"{torch_us('decode', d, 16384) / 1e3:.2f}" for d in dims) + " |")
    for name in names:
        found = [find("decode", name, d, 16384, True) for d in dims]
        cells = [
            "–" if r is None else f"{r['us'] / 1e3:.2f}, {r['gb_s']:.1f}, {100 * r['ceiling_share']:.0f} %" for r in found
        ]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    prefill = [r for r in ours if r["part"] == "prefill" and not r["causal"]]
    dims = sorted({r["head_dim"] for r in prefill})
    lines += [
        "",
        "Prefill, 512 queries on 4,096 tokens, every key seen, bfloat16 queries (outputs, and weights on bfloat16 and fp8 "
        "rows, are rounded to bfloat16), GFLOP/s:",
        "",
    ]
    lines += ["| K / V | " + " | ".join(f"head_dim {d}" for d in dims) + " |", "|---|" + "---|" * len(dims)]
    flop = {r["head_dim"]: r["flop"] for r in prefill}
    best = [f"{flop[d] / torch_us('prefill', d, 4096) / 1e3:.0f}" for d in dims]
    lines.append(f"| PyTorch, its best | {' | '.join(best)} |")
    for name in dict.fromkeys(r["formats"] for r in prefill):
        cells = [f"{find('prefill', name, d, 4096, False)['gflop_s']:.0f}" for d in dims]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    read = sorted(r["ceiling_gb_s"] for r in ours if r["part"] == "decode" and r["kv_len"] == 16384)
    lines += [
        "",
        f"Measured {record['when'][:10]} on {machine['cpu']} ({record['threads']} threads, which read memory at "
        f"{read[0]:.1f} to {read[-1]:.1f} GB/s in turns with the kernels), torch {machine['packages']['torch']}, commit "
        f"`{machine['commit'][:10]}`, with `{record['command']}`.",
    ]
    return "\n".join(lines)


GPU_SHAPES = {(1, 131072): "One sequence of 131,072 tokens", (16, 16384): "16 sequences of 16,384 tokens"}


def gpu_table() -> str:
    """Decode of the GPU kernels, as recorded in results/gpu.json; nothing while that was not measured."""
    path = RESULTS / "gpu.json"
    if not path.is_file():
        return ""
    record = json.loads(path.read_text())
    machine, rows, ceiling = record["environment"], record["rows"], record["ceiling"]
    lines = [
        "## How fast it is on a GPU",
        "",
        f"One token is decoded per sequence, 4 query heads on each of {record['kv_heads']} KV heads, bfloat16 queries; "
        "rows are read from memory, not from caches. Each cell: the kernel's time, the share of the speed at which this GPU "
        f"copies memory ({ceiling['gb_s'] / 1e3:.2f} TB/s, the best of {len(ceiling['ways'])} ways: {ceiling['way']}), and "
        "how many times faster it is than our bf16 and than the best of PyTorch's kernels on bf16. Before anything is "
        "timed, each configuration is compared with float64.",
    ]
    decode = [r for r in rows if r["part"] == "decode" and r["groups"] == 4]
    for (batch, kv_len), title in GPU_SHAPES.items():
        here = [r for r in decode if (r["batch"], r["kv_len"]) == (batch, kv_len)]
        if not here:
            continue
        dims = sorted({r["head_dim"] for r in here})
        lines += ["", f"{title}:", ""]
        lines += ["| K / V | " + " | ".join(f"head_dim {d}" for d in dims) + " |", "|---|" + "---|" * len(dims)]
        same = dict(part="stock", groups=4, batch=batch, kv_len=kv_len)
        stock = [r for r in rows if "kernel_us" in r and same.items() <= r.items()]
        cells = []
        for dim in dims:
            best = min((r for r in stock if r["head_dim"] == dim), key=lambda r: r["kernel_us"], default=None)
            cells.append(f"{_us(best)} ({best['by']})" if best else "–")
        lines.append(f"| PyTorch, its best on bf16 | {' | '.join(cells)} |")
        for name in dict.fromkeys(r["formats"] for r in here):
            found = [next((r for r in here if r["formats"] == name and r["head_dim"] == d), None) for d in dims]
            lines.append(f"| `{name}` | {' | '.join('–' if r is None else _gpu_cell(r) for r in found)} |")
    lines += ["", *(f"Not measured, {what}: {why}." for what, why in record.get("not_measured", {}).items())]
    lines += [
        "",
        f"Measured {record['when'][:10]} on {machine['devices']['cuda']}, driver {machine['driver']}, torch "
        f"{machine['packages']['torch']}, commit `{(machine['commit'] or 'unknown')[:10]}`, with `{record['command']}`.",
    ]
    return "\n".join(lines + _prefill())


def _prefill() -> list[str]:
    """Prefill, as recorded in results/gpu_prefill.json."""
    path = RESULTS / "gpu_prefill.json"
    if not path.is_file():
        return []
    record = json.loads(path.read_text())
    causal = [r for r in record["rows"] if r["part"] == "attention" and r["causal"]]
    onto = [r for r in record["rows"] if r["part"] == "onto"]
    features = [r for r in record["rows"] if r["part"] == "feature"]
    windows = [r for r in record["rows"] if r["part"] == "window"]
    every = list(dict.fromkeys(_dims(r) for r in causal))
    heads = "{} query heads on {} KV heads".format(*record["heads"])
    lines = [
        "",
        f"Prefill, TFLOP/s of the visible keys, bfloat16, causal, {heads}; beside it PyTorch's kernels:",
        "",
        "| tokens | kernel | " + " | ".join(every) + " |",
        "|---|---|" + "---|" * len(every),
    ]
    for tokens in sorted({r["tokens"] for r in causal}):
        here = {_dims(r): {"gyrokv": r["tflops"]} | r["others"] for r in causal if r["tokens"] == tokens}
        for name in dict.fromkeys(n for r in here.values() for n in r):
            found = [here.get(dims, {}).get(name) for dims in every]
            if any(isinstance(x, float) for x in found):
                cells = [f"{x:.0f}" if isinstance(x, float) else "–" for x in found]
                lines.append(f"| {tokens:,} | {name} | {' | '.join(cells)} |")
    absent = [name for name, found in causal[0]["others"].items() if found == "not installed"]
    if absent:
        lines += ["", f"Not installed: {', '.join(absent)}."]
    lines += ["", _short(record["rows"]), "", _behind(record["rows"])]
    dims = list(dict.fromkeys(_dims(r) for r in features))
    lines += [
        "",
        "The same at 8,192 tokens with features: the time of plain attention over the same keys, relative to the time with "
        "the feature (a window: relative to the time of as many visible tiles):",
        "",
        "| head_dim | " + " | ".join(dims) + " |",
        "|---|" + "---|" * len(dims),
    ]
    for name in dict.fromkeys(r["feature"] for r in features):
        lines.append(
            f"| {name} | {' | '.join(format(r['share_of_plain'], '.2f') for r in features if r['feature'] == name)} |"
        )
    for tokens in dict.fromkeys(r["tokens"] for r in windows):
        cells = [f"{1.0 / r['cost']:.2f}" for r in windows if r["tokens"] == tokens]
        lines.append(f"| window of {windows[0]['window']:,}, {tokens:,} tokens | {' | '.join(cells)} |")
    lines += [
        "",
        "The last 4,096 of 65,536 tokens onto the cache, 32 query heads on 8 KV heads, in ms (and MiB that a call allocates "
        "beyond its output):",
        "",
        f"| head_dim | {' | '.join(f'`{n}`' for n in dict.fromkeys(r['formats'] for r in onto))} |",
        "|---|" + "---|" * len({r["formats"] for r in onto}),
    ]
    for dim in dict.fromkeys(r["head_dim"] for r in onto):
        cells = [f"{r['ms']:.1f} ({r['workspace'] / 2**20:.0f})" for r in onto if r["head_dim"] == dim]
        lines.append(f"| {dim} | {' | '.join(cells)} |")
    about = record.get("note", f"with `{record['command']}`")
    return [*lines, "", f"Measured {record['when'][:10]}, commit `{record['environment']['commit'][:10]}`, {about}."]


def _short(rows: list[dict]) -> str:
    """Short prompts beside cuDNN."""
    few = [r for r in rows if r["part"] == "few"]
    tokens = sorted({r["tokens"] for r in few})
    heads = ", ".join(dict.fromkeys("{}/{}".format(*r["heads"]) for r in few))
    found = []
    for dims in dict.fromkeys(_dims(r) for r in few):
        ratios = sorted(r["cudnn_us"] / r["us"] for r in few if _dims(r) == dims)
        found.append(f"{dims}: {median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")
    about = f"Short prompts, {tokens[0]} to {tokens[-1]:,} tokens, causal and in full, {heads} query and KV heads"
    return f"{about}: cuDNN's time relative to ours, median (least to most) of each head_dim: {'; '.join(found)}."


def _behind(rows: list[dict]) -> str:
    """Prompts behind each other."""
    found = [r for r in rows if r["part"] == "behind"]
    texts = []
    for lengths in dict.fromkeys(tuple(r["lengths"]) for r in found):
        cells = []
        for r in found:
            if tuple(r["lengths"]) == lengths:
                ratio = f", {r['torch_us'] / r['us']:.1f}x" if "torch_us" in r else ""
                cells.append(f"{_dims(r)}: {r['us']:.0f} µs ({r['padded_us']:.0f}{ratio})")
        texts.append(f"of {', '.join(map(str, lengths))} tokens {'; '.join(cells)}")
    about = "Prompts behind each other (`attention_varlen`), causal: time (as a padded batch, speed relative to"
    return f"{about} PyTorch's `varlen_attn`), {'. Prompts '.join(texts)}."


def _dims(row: dict) -> str:
    """Head sizes of K and V: one number where they are equal."""
    return "/".join(str(d) for d in dict.fromkeys(row["dims"]))


def _us(row: dict) -> str:
    return f"{row['kernel_us']:.1f} µs, {100 * row['ceiling_share']:.0f} %"


def _gpu_cell(row: dict) -> str:
    ratios = [row.get(f"times_faster_than_{other}") for other in ("bf16", "best_stock")]
    return ", ".join([_us(row), *("–" if ratio is None else f"{ratio:.2f}x" for ratio in ratios)])


def gpu_line() -> str:
    """The last run of the tests on an accelerator, as recorded in results/gpu_tests.json."""
    record = json.loads((RESULTS / "gpu_tests.json").read_text())
    machine = record["environment"]
    versions = ", ".join(f"{name} {machine['packages'][name]}" for name in ("torch", "transformers"))
    counts = ", ".join(f"{record[outcome]} {outcome}" for outcome in ("passed", "failed", "skipped"))
    return (
        f"The tests that use an accelerator (`make test-gpu`) last ran {record['when'][:10]} on "
        f"{machine['devices']['cuda']}, {versions}, commit `{machine['commit'][:10]}`: {counts}. {record.get('note', '')}"
    ).rstrip()


SECTIONS = {
    "formats": formats_table, "support": features_table, "quality": quality_table, "cpu": cpu_table, "gpu_speed": gpu_table,
    "gpu": gpu_line,
}  # fmt: skip


def render(text: str) -> str:
    """``text`` with every section between ``<!-- begin NAME -->`` and ``<!-- end NAME -->`` written anew."""
    for name, make in SECTIONS.items():
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        if begin not in text or end not in text:
            raise ValueError(f"README.md lacks the markers {begin} and {end}")
        head, rest = text.split(begin)
        text = f"{head}{begin}\n{make()}\n{end}{rest.split(end)[1]}"
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if README.md is out of date")
    check = parser.parse_args().check
    readme = ROOT / "README.md"
    old = readme.read_text()
    new = render(old)
    if check:
        return int(old != new)
    readme.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
