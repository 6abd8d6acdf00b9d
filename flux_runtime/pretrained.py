"""Loading the helper models that transformers implements, whole or not at all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .errors import FluxError


def load_model(kind: Any, source: str | Path, what: str, dtype: torch.dtype | str = "auto") -> torch.nn.Module:
    """A model of a transformers class from a folder or repository, from .safetensors only, with nothing missing.

    `what` names the model in errors. The dtype "auto" is that of the file.
    """
    _check_kind(kind, source, what)
    options = {"use_safetensors": True, "output_loading_info": True, _dtype_name(): dtype}
    model, info = _explained(lambda: kind.from_pretrained(str(source), **options), source, what)
    missing = sorted(info["missing_keys"])
    if missing:  # transformers fills them with random numbers
        raise FluxError(
            f"{source} is not {what}: {len(missing)} of its tensors are missing ({missing[0]} ...); "
            "name a whole checkpoint of that kind"
        )
    return model.eval().requires_grad_(False)


def _check_kind(kind: Any, source: str | Path, what: str) -> None:
    """Refuse a checkpoint of another class; transformers would make a model of its default size, which may be huge."""
    import transformers

    config = _explained(lambda: transformers.AutoConfig.from_pretrained(str(source)), source, what)
    wanted = getattr(kind, "config_class", None)  # the Auto classes have none, and refuse by themselves
    if wanted is not None and not isinstance(config, wanted):
        raise FluxError(
            f"{source} is not {what} but of the kind {config.model_type!r}; name one of the kind {wanted.model_type!r}"
        )


def load_processor(kind: Any, source: str | Path, what: str, **options: Any) -> Any:
    """The image processor, tokenizer or both that belong to a checkpoint."""
    return _explained(lambda: kind.from_pretrained(str(source), **options), source, what)


def without_torchvision(name: str) -> Any:
    """transformers' image processor of this name that uses PIL; before transformers 5 that was the only one."""
    import transformers

    return getattr(transformers, f"{name}Pil", None) or getattr(transformers, name)


def _dtype_name() -> str:
    """transformers 4.56 renamed the argument."""
    import transformers

    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    return "dtype" if version >= (4, 56) else "torch_dtype"


def _explained(load: Callable[[], Any], source: str | Path, what: str) -> Any:
    """Turn what transformers raises for a file that is none of its own into one sentence."""
    from .weights.hub import split_source  # here, because the loaders of weights import this module

    if not Path(source).is_dir() and split_source(str(source)) is None:
        raise FluxError(f"{source} is neither a folder nor a Hugging Face repository (owner/name): name {what}")
    try:
        return load()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).split("\n")[0][:200]
        raise FluxError(
            f"{source} cannot be loaded as {what} ({reason}); name a whole checkpoint of that kind"
        ) from error
