"""Results as frozen dataclasses, which become plain values for JSON, and come back."""

import math
import types
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from typing import Any, Self, Union, get_args, get_origin, get_type_hints


class Record:
    """Base of a frozen dataclass whose fields are numbers, words, truth values, None, tuples, and other records."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of :meth:`to_dict`, for what JSON made lists of, and null of numbers that are not finite."""
        return _read(cls, values)


def _read(kind: Any, value: Any) -> Any:
    """``value`` as a ``kind``, which may be optional, a tuple or a record."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        return _read(next(one for one in arguments if one is not types.NoneType), value)
    if origin is tuple:
        kinds = (arguments[0],) * len(value) if arguments[-1] is Ellipsis else arguments
        return tuple(_read(one, each) for one, each in zip(kinds, value, strict=True))
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        return kind(**{field.name: _read(hints[field.name], value[field.name]) for field in fields(kind)})
    if kind is float:
        return math.nan if value is None else float(value)
    return value
