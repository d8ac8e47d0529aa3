"""Weights from a file: a state dict, and nothing that runs code when it is read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from resode.errors import InvalidInput

WRAPPERS = ("state_dict", "model")
"""Where checkpoints of a training keep the state dict of its model."""

PREFIXES = ("module.", "_orig_mod.")
"""What DataParallel and torch.compile put before every name."""

StateDict = Mapping[str, Tensor]


def read_state_dict(path: str | Path) -> StateDict:
    """The state dict in ``path``, on the CPU.

    It may lie under one of `WRAPPERS`, and its names may begin with one of `PREFIXES`. A file *.safetensors is read by
    the package of that name; any other by ``torch.load(weights_only=True)``, which makes tensors and runs no code.

    Raises:
        InvalidInput: for a file that is not there, cannot be read so, or holds no state dict.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise InvalidInput(
            f"there is no file {path}: expected a state dict, as torch.save(model.state_dict(), …) writes"
        )
    held = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    while isinstance(held, Mapping) and (wrapper := next((key for key in WRAPPERS if _is_mapping(held, key)), None)):
        held = held[wrapper]
    if not _is_state_dict(held):
        raise InvalidInput(
            f"{path} holds {_said(held)}, and no state dict (names and tensors): save model.state_dict(), or a dict "
            f"with it under {' or '.join(map(repr, WRAPPERS))}"
        )
    return _without_prefix(held)


def fit(model: nn.Module, state: StateDict, where: str | Path) -> None:
    """Put ``state``, which was found ``where``, into ``model``: every entry, and no other.

    Raises:
        InvalidInput: when names or shapes do not agree, with the first of them.
    """
    wanted = model.state_dict()
    shapes = [
        f"{name} {tuple(state[name].shape)} in place of {tuple(wanted[name].shape)}"
        for name in wanted
        if name in state and state[name].shape != wanted[name].shape
    ]
    problems = _few("other shapes", shapes)
    if not problems:
        # Not strict, since modules may know older names of their weights.
        unmatched = model.load_state_dict(state, strict=False)
        problems = _few("missing", unmatched.missing_keys) + _few("unexpected", unmatched.unexpected_keys)
    if problems:
        raise InvalidInput(
            f"the state dict in {where} does not fit {type(model).__name__}: {'; '.join(problems)}; load it into the "
            "model that it was made with (num_classes included)"
        )


def last_layer(model: nn.Module) -> str:
    """Name of the last linear or convolutional layer of ``model``: its classifier, where it ends in one."""
    return [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)][-1]


def _read_torch(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a file of another kind raises nearly anything
        reason = str(error).split("\n")[0] or type(error).__name__
        raise InvalidInput(
            f"cannot read {path} as tensors alone ({reason}): expected a state dict, as torch.save(model.state_dict(), "
            "…) writes; a pickled model runs code when it is read, and is never read here"
        ) from error


def _read_safetensors(path: Path) -> Any:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise InvalidInput(f"{path} needs the package safetensors: pip install safetensors") from error
    try:
        return load_file(path)
    except Exception as error:  # its reader's own errors, which only that package names
        raise InvalidInput(f"cannot read {path} as safetensors ({error}): replace it") from error


def _is_state_dict(held: Any) -> bool:
    if not isinstance(held, Mapping) or not held:
        return False
    return all(isinstance(name, str) and isinstance(value, Tensor) for name, value in held.items())


def _is_mapping(held: Mapping[Any, Any], key: str) -> bool:
    return isinstance(held.get(key), Mapping)


def _said(held: Any) -> str:
    if not isinstance(held, Mapping):
        return f"a {type(held).__name__}"
    entries = [f"{key} ({type(value).__name__})" for key, value in held.items()]
    return "a dict of " + (", ".join(entries[:6] + ["…"] * (len(entries) > 6)) or "nothing")


def _without_prefix(state: StateDict) -> StateDict:
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in state):
            return _without_prefix({name.removeprefix(prefix): value for name, value in state.items()})
    return state


def _few(what: str, found: list[str], most: int = 3) -> list[str]:
    if not found:
        return []
    return [f"{len(found)} {what}: {', '.join(found[:most] + ['…'] * (len(found) > most))}"]
