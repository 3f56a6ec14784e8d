"""The contract of a backend: a module with these members.

    name: str
    UNDERSTANDS: frozenset[str]                the features of AttentionSpec that it honours
    missing() -> list[str]                     why this machine cannot run it at all
    why_not(spec) -> list[str]                 why it cannot run this problem; looks at the spec only
    tile(spec) -> (rows, keys)                 the tile shape that a block map must be built for
    attend(q, view, spec, mask, block_map, sinks) -> (out, lse)

and, optionally, ``append(layer, k, v) -> KVView`` with ``why_not_append(layer) -> list[str]``; ``append_at(stores, codecs,
values, lengths, pages) -> bool``, which is ``place.append_at`` or returns False before it wrote anything;
``attend_heads``, called in place of ``attend`` where there is one: it takes q and gives out as callers see them,
``[B, Hq, Tq, D]`` and ``[B, Hq, Tq, Dv]`` in q's dtype, and does or calls ``Codec.query`` and ``Codec.output`` itself;
``attend_varlen(q, kv, bounds, spec, sinks)``, the same for queries (and keys) of sequences that lie behind each other
(``varlen.py``), or None where it cannot;
``BOUND``: the relative error that tests allow (at most 2e-3) when the kernel itself rounds q or the weights below
float32, and in its place ``BFLOAT16_BOUND`` (at most 2e-3) where q is bfloat16 and V holds no codes, ``FAST_BOUND`` (at
most 3e-2) for problems with the feature ``fast``; ``how(spec) -> str``: which of its kernels runs a problem, and why;
``DEVICE``: the torch device that it runs on, if that is not the CPU among others; and ``hint() -> str``: what to install
for more of it.

``attend`` gets q ``[B, Hq, Tq, padded]`` in the space of the stored keys and returns out ``[B, Hq, Tq, padded]`` in
the space of the stored values, float32 (or in the dtype of ``spec`` where no rotation follows), and lse
``[B, Hq, Tq]``, float32: it knows of no rotations. Features that ``UNDERSTANDS`` does not list become reasons by
themselves (``dispatch.reasons``). Views with ``lengths`` or pages (``view.py``) are read where they lie: on an accelerator
without waiting for it. A block map may be left unused.
"""
