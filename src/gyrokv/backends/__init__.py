"""The contract of a backend: a module with these members.

    name: str
    UNDERSTANDS: frozenset[str]                the features of AttentionSpec that it honours
    missing() -> list[str]                     why this machine cannot run it at all
    why_not(spec) -> list[str]                 why it cannot run this problem; looks at the spec only
    tile(spec) -> (rows, keys)                 the tile shape that a block map must be built for
    attend(q, view, spec, mask, block_map, sinks) -> (out, lse)

and, optionally, ``append(layer, k, v) -> KVView`` with ``why_not_append(layer) -> list[str]``, and ``BOUND``: the
relative error that tests allow (at most 2e-3) when the kernel itself rounds q or the weights below float32, and
``FAST_BOUND`` (at most 3e-2) in its place for problems with the feature ``fast``, ``DEVICE``: the torch device that it
runs on, if that is not the CPU among others, and ``hint() -> str``: what to install for more of it.

``attend`` gets q ``[B, Hq, Tq, padded]`` in the space of the stored keys and returns out ``[B, Hq, Tq, padded]`` in
the space of the stored values and lse ``[B, Hq, Tq]``, both float32: no backend knows of rotations. Features that
``UNDERSTANDS`` does not list become reasons by themselves (``dispatch.reasons``).
"""
