"""Which transformers this package works with."""

from __future__ import annotations

from importlib.util import find_spec

OLDEST, BELOW = (5, 17), (6,)
_WANTED = f">={'.'.join(map(str, OLDEST))},<{BELOW[0]}"


def installed() -> str | None:
    """The version of transformers that an import here would give, or None."""
    if find_spec("transformers") is None:
        return None
    import transformers

    return transformers.__version__


def check(version: str | None) -> None:
    """Raise ImportError, saying what to install, unless ``version`` of transformers will do; None: there is none."""
    remedy = f"install it with: pip install 'transformers{_WANTED}' (or 'gyrokv[hf]')"
    if version is None:
        raise ImportError(f"gyrokv.hf needs transformers {_WANTED}, and there is none; {remedy}", name="transformers")
    release = tuple(int(part) for part in version.split(".")[:2])
    if not OLDEST <= release < BELOW:
        raise ImportError(f"gyrokv.hf needs transformers {_WANTED}, not {version}; {remedy}", name="transformers")
