"""Models, tokenizers and texts that the user names."""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor, nn

from ..env import devices
from .options import UserError, blame

_HUB = "hf:"
_DTYPES = ("auto", "float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Loaded:
    """A model in eval mode and its tokenizer; ``bos`` is the token that it expects at the start of a text, if any."""

    model: nn.Module
    tokenizer: object
    bos: int | None

    def encode(self, text: str) -> Tensor:
        """Token ids ``[N]`` of ``text``, without special tokens."""
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        return torch.tensor(ids, dtype=torch.int64)

    def check_context(self, option: str, tokens: int) -> None:
        """Raise UserError when the model has fewer positions than ``tokens``."""
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and tokens > limit:
            raise UserError(f"{option} {tokens} exceeds the model's {limit} positions (max_position_embeddings)")


def require(package: str, extra: str, purpose: str) -> None:
    """Raise UserError unless ``package`` is installed."""
    if importlib.util.find_spec(package) is None:
        raise UserError(f'{purpose} needs {package}: pip install "gyrokv[{extra}]"')


def load(name: str, dtype: str = "auto", device: str = "auto") -> Loaded:
    """The model in directory ``name`` (nothing is downloaded), or ``hf:OWNER/NAME`` from the hub or its local cache."""
    require("transformers", "hf", "-m/--model")
    if dtype not in _DTYPES:
        raise UserError(f"--dtype {dtype!r} is not one of {', '.join(_DTYPES)}")
    found = devices()
    if device != "auto" and device not in found:
        raise UserError(f"--device {device!r} is not available here; devices are auto, {', '.join(found)}")
    place = found[-1] if device == "auto" else device
    if dtype == "auto" and place == "cpu":
        dtype = "float32"
    local = not name.startswith(_HUB)
    if local and not (Path(name) / "config.json").is_file():
        what = "has no config.json" if Path(name).is_dir() else "is no directory"
        raise UserError(f"-m {name} {what}; give a model in Hugging Face format, or {_HUB}OWNER/NAME for one of the hub")

    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    source = name.removeprefix(_HUB)
    with blame(f"-m {name}", OSError, ValueError, KeyError):
        model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=dtype, local_files_only=local)
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, local_files_only=local)
    model = model.to(place).eval()
    start = tokenizer("").input_ids
    bos = tokenizer.bos_token_id if start and start[0] == tokenizer.bos_token_id else None
    return Loaded(model, tokenizer, bos)


def read_text(path: Path) -> tuple[str, dict]:
    """The text of a file, and what a report says of it: path, bytes and SHA-256."""
    with blame(f"-f {path}", OSError):
        data = path.read_bytes()
    with blame(f"-f {path} is not UTF-8", UnicodeDecodeError):
        text = data.decode("utf-8")
    return text, {"path": str(path), "bytes": len(data), "sha256": sha256(data).hexdigest()}
