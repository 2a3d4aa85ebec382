"""The one exception of this library, and reasons for it."""

from collections.abc import Sequence
from typing import Any


class LongpatchError(ValueError):
    """A call that cannot be carried out: names the call, every reason, and what is supported. Nothing was changed."""

    def __init__(self, call: str, reasons: Sequence[str], supported: str | None = None):
        self.call, self.reasons, self.supported = call, list(reasons), supported
        message = f"{call}: " + "; ".join(self.reasons)
        super().__init__(f"{message}. Supported: {supported}" if supported else message)

    def __reduce__(self):
        return type(self), (self.call, self.reasons, self.supported)


def at_least(least: int, **values: Any) -> list[str]:
    return [
        f"{name}={value!r} must be an integer of at least {least}"
        for name, value in values.items()
        if not isinstance(value, int) or isinstance(value, bool) or value < least
    ]


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
