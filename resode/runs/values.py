"""Plain values and their JSON: what a run folder holds, and when two configurations are the same."""

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from resode.errors import RunError


def jsonable(obj: object) -> Any:
    """``obj`` as JSON has it.

    Dataclasses and mappings become dicts; tuples, lists, arrays and tensors lists; paths strings; enums their
    values; NaN and infinities None.

    Raises:
        RunError: for anything else, named by its key, and for keys that are neither strings nor integers.
    """
    return plain(obj, "value")


def digest(obj: object) -> str:
    """Eight hexadecimal digits that tell ``obj`` (as JSON has it) from any other, for the name of a file or folder."""
    return hashlib.sha256(json.dumps(jsonable(obj), sort_keys=True).encode()).hexdigest()[:8]


def plain(obj: object, where: str, finite: bool = False) -> Any:
    """`jsonable`; ``where`` names ``obj`` in errors. With ``finite``, NaN and infinities are errors, not None."""
    if isinstance(obj, Enum):
        return plain(obj.value, where, finite)
    if obj is None or isinstance(obj, bool):
        return obj
    if isinstance(obj, str | int):
        return str(obj) if isinstance(obj, str) else int(obj)
    if isinstance(obj, float):
        if math.isfinite(obj):
            return float(obj)
        if finite:
            raise RunError(f"{where} is {float(obj)}, which JSON does not have: use None, or a finite number")
        return None
    if isinstance(obj, os.PathLike):
        return os.fsdecode(obj)
    if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        obj = {field.name: getattr(obj, field.name) for field in dataclasses.fields(obj)}
    if isinstance(obj, Mapping):
        result: dict[str, Any] = {}
        for key, value in obj.items():
            if not isinstance(key, str | int) or isinstance(key, bool) or str(key) in result:
                raise RunError(f"{where} has the key {key!r}: use strings or integers, each of them once")
            result[str(key)] = plain(value, f"{where}.{key}", finite)
        return result
    if isinstance(obj, list | tuple):
        return [plain(value, f"{where}[{i}]", finite) for i, value in enumerate(obj)]
    if callable(tolist := getattr(obj, "tolist", None)):  # arrays and tensors, their scalars too
        return plain(tolist(), where, finite)
    raise RunError(
        f"{where} is a {type(obj).__name__}, which JSON does not have: use numbers, strings, None, lists, "
        "mappings, dataclasses or paths"
    )


def dump(obj: Any, indent: int | None = 1) -> bytes:
    """Plain values as JSON, on one line for ``indent`` None."""
    return (json.dumps(obj, indent=indent, allow_nan=False) + "\n").encode()


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        RunError: when it cannot be read.
    """
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise RunError(
            f"cannot read {path} ({error}): restore it from a copy, or run again in another folder"
        ) from error
    if not isinstance(value, dict):
        raise RunError(f"{path} holds no JSON object: restore it from a copy, or run again in another folder")
    return value


def refuse_another(there: dict[str, Any], here: dict[str, Any], path: Path) -> None:
    """Raise if the run at ``path``, made for the config ``there``, is not one for ``here``."""

    def leaves(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        flat: dict[str, Any] = {}
        for key, value in config.items():
            nested = isinstance(value, dict) and value
            flat |= leaves(value, f"{prefix}{key}.") if nested else {prefix + key: value}
        return flat

    def show(config: dict[str, Any], key: str) -> str:
        text = json.dumps(config[key]) if key in config else "absent"
        return text if len(text) <= 60 else text[:57] + "..."

    old, new, absent = leaves(there), leaves(here), object()
    differing = [key for key in old | new if old.get(key, absent) != new.get(key, absent)]
    if differing:
        named = "; ".join(f"{key} is {show(old, key)} there, {show(new, key)} here" for key in differing[:5])
        more = f" (and {len(differing) - 5} more)" if len(differing) > 5 else ""
        raise RunError(f"{path} belongs to another configuration: {named}{more}; choose another folder")
