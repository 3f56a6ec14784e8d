"""A comparison as one self-contained HTML page, and the columns that this page and the terminal table share."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape


@dataclass(frozen=True)
class Column:
    """A column of a comparison: its heading, how a row of ``evaluate.report`` is shown, and what it means.

    ``narrow``: also shown where there is little room.
    """

    heading: str
    text: Callable[[dict], str]
    meaning: str
    narrow: bool = False


def _with_error(value: float, error: float, digits: int, sign: str = "") -> str:
    return f"{value:{sign}.{digits}f} ± {error:.{digits}f}"


def _percent(change: float) -> str:
    text = f"{change:+.2f}"
    return f"{text if float(text) else '0.00'} %"


def _speed(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


COLUMNS = (
    Column("K / V", lambda r: r["label"], "formats of keys and values; the first row is the 16-bit baseline", True),
    Column("smaller", lambda r: f"{r['ratio']:.2f}x", "bytes of the baseline's cache over bytes of this one", True),
    Column("ΔPPL", lambda r: _percent(r["delta_ppl_percent"]), "change of the perplexity against the baseline", True),
    Column(
        "KL",
        lambda r: f"{r['kl_mean']:.5f}",
        "mean of KL(baseline || this) in nats over the whole vocabulary: how far the predictions moved, in any direction",
        True,
    ),
    Column("top-1", lambda r: f"{100 * r['top1']:.2f} %", "tokens for which both put the same candidate first", True),
    Column("KL p99", lambda r: f"{r['kl_p99']:.4f}", "the 99th percentile of KL: the worst tokens"),
    Column(
        "PPL",
        lambda r: _with_error(r["estimate"]["ppl"], r["estimate"]["ppl_se"], 4),
        "perplexity of the scored tokens ± standard error (tokens taken as independent)",
    ),
    Column(
        "ΔNLL",
        lambda r: _with_error(r["delta_nll"], r["delta_nll_se"], 5, "+"),
        "mean change of the negative log-likelihood in nats, token by token against the baseline, ± standard error: the "
        "text's own difficulty cancels, so it is far sharper than the error of PPL",
    ),
    Column(
        "bytes/token",
        lambda r: f"{r['estimate']['bytes_per_token']:,.0f}",
        "bytes of the rows that the cache of all layers held after a window, scales and padding included, over the "
        "tokens of the window (a sliding layer holds fewer rows than tokens)",
        True,
    ),
    Column("bits/value", lambda r: f"{r['estimate']['bits_per_value']:.2f}", "the same bytes in bits per cached number"),
    Column(
        "prefill t/s",
        lambda r: _speed(r["estimate"]["prefill_tokens_per_s"]),
        "tokens per second through the cache, median of the windows",
    ),
    Column(
        "decode t/s",
        lambda r: _speed(r["decode_tokens_per_s"]),
        "tokens per second one at a time at the end of a window, median",
    ),
    Column("fallbacks", lambda r: str(r["estimate"]["fallbacks"]), "how often the model asked for dense keys or values"),
)

_CSS = """
:root { color-scheme: light dark; --ground: #ffffff; --ink: #1b1f24; --muted: #667080; --line: #d9dee5;
  --band: #f4f6f9; --same: #2563a8; --mixed: #b4540a; }
@media (prefers-color-scheme: dark) { :root { --ground: #14171c; --ink: #e7eaee; --muted: #97a1af; --line: #333a44;
  --band: #1d2229; --same: #74aef0; --mixed: #f0a35e; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 3rem; max-width: 80rem; background: var(--ground); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .4rem; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .4rem; overflow-wrap: anywhere; }
p { margin: .4rem 0 .9rem; max-width: 46rem; }
.wide { overflow-x: auto; margin: .8rem 0; border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: collapse; width: 100%; font-size: .82rem; font-variant-numeric: tabular-nums; }
.wide th, .wide td { padding: .36rem .42rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
.wide tr:last-child td, .wide tr:last-child th { border-bottom: 0; }
.wide thead th { background: var(--band); }
.wide th:first-child { text-align: left; position: sticky; left: 0; background: var(--band); }
.base { color: var(--muted); }
figure { margin: 1rem 0; overflow-x: auto; }
figure svg { display: block; width: 100%; min-width: 30rem; max-width: 50rem; height: auto; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1rem; margin: .6rem 0; font-size: .92rem; }
dt { color: var(--muted); }
dd { margin: 0; overflow-wrap: anywhere; }
pre { background: var(--band); border: 1px solid var(--line); border-radius: 6px; padding: .6rem .8rem; font-size: .85rem;
  white-space: pre-wrap; overflow-wrap: anywhere; }
@media (max-width: 40rem) { body { padding: 1rem .8rem 2rem; } dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: .5rem; } table { font-size: .76rem; } .wide th, .wide td { padding: .34rem .34rem; } }
"""


def columns(rows: Sequence[dict]) -> list[Column]:
    """The columns to show for ``rows``: fallbacks and decode speed only where there are any."""
    absent = set()
    if not any(r["estimate"]["fallbacks"] for r in rows):
        absent.add("fallbacks")
    if all(r["decode_tokens_per_s"] is None for r in rows):
        absent.add("decode t/s")
    return [c for c in COLUMNS if c.heading not in absent]


def method(entry: dict) -> str:
    """One paragraph: how the numbers of ``entry`` came about."""
    s, base = entry["settings"], entry["rows"][0]
    batch = "all tokens of a window at once" if s["batch"] is None else f"{s['batch']} tokens at a time"
    bos = "" if s["bos"] is None else " The first token of each window is the model's beginning-of-text token."
    return (
        f"{s['windows']} disjoint windows of {s['window']} tokens; the first half of each is context, the "
        f"{s['scored_per_window']} predictions of the second half are scored ({base['estimate']['scored_tokens']:,} in "
        f"all, llama.cpp's convention). Each window is fed through a fresh cache, {batch}. Keys and values are "
        "quantised before they are attended to, from the first token on, also within the prompt. All formats see the "
        f"same windows, and the baseline {base['label']} runs through the same code.{bos}"
    )


def page(record: dict) -> str:
    """The page of a record that ``evaluate.report`` made. Needs matplotlib for its figures."""
    from . import plot

    machine = record["environment"]
    body = [
        "<h1>What a KV cache format costs</h1>",
        "<p>Perplexity and KL divergence of language models that read their keys and values from a quantised cache, "
        "against the same models with a 16-bit cache.</p>",
    ]
    for i, entry in enumerate(record["models"]):
        body += _section(entry, plot.svg([entry], f"m{i}"))
    shown = {c.heading: c for entry in record["models"] for c in columns(entry["rows"])}
    body += ["<h2>What the columns mean</h2>", _list((c.heading, c.meaning) for c in COLUMNS if c.heading in shown)]
    versions = ", ".join(f"{name} {version}" for name, version in machine["packages"].items() if version)
    facts = [
        ("gyrokv", machine["gyrokv"] + (f", commit {machine['commit']}" if machine["commit"] else "")),
        ("versions", f"Python {machine['python']}, {versions}"),
        ("machine", f"{machine['system']}; " + "; ".join(f"{k}: {v}" for k, v in machine["devices"].items())),
        ("threads", str(machine["threads"])),
        ("finished", record["when"]),
    ]
    body += ["<h2>How to repeat it</h2>", f"<pre>{escape(record['command'])}</pre>", _list(facts)]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>gyrokv: what a KV cache format costs</title>\n<style>{_CSS}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def _section(entry: dict, picture: str) -> list[str]:
    model, text, shown = entry["model"], entry["text"], columns(entry["rows"])
    heads = "".join(f'<th scope="col" title="{escape(c.meaning)}">{escape(c.heading)}</th>' for c in shown)
    lines = []
    for i, row in enumerate(entry["rows"]):
        first, *others = (escape(c.text(row)) for c in shown)
        cells = "".join(f"<td>{cell}</td>" for cell in others)
        lines.append(f'<tr{" class=base" if i == 0 else ""}><th scope="row">{first}</th>{cells}</tr>')
    facts = [
        ("model", f"{model['path']}: {model['class']}, {model['parameters'] / 1e6:.1f} million parameters"),
        ("runs as", f"{model['dtype']} on {model['device']}"),
        ("text", f"{text['path']}, {entry['tokens']['count']:,} tokens, SHA-256 {text['sha256']}"),
        ("took", f"{entry['seconds']:.0f} s for {len(entry['rows'])} configs"),
    ]
    return [
        f"<h2>{escape(os.path.basename(model['path'].rstrip('/')))}</h2>",
        f'<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>',
        f'<figure role="img" aria-label="mean KL divergence against bytes per token">{picture}</figure>',
        f"<p>{escape(method(entry))}</p>",
        _list(facts),
    ]


def _list(pairs) -> str:
    return "<dl>" + "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in pairs) + "</dl>"
