"""The one exception of this library."""

from collections.abc import Sequence


class LongpatchError(ValueError):
    """A call that cannot be carried out: names the call, every reason, and what is supported. Nothing was changed."""

    def __init__(self, call: str, reasons: Sequence[str], supported: str | None = None):
        self.call, self.reasons, self.supported = call, list(reasons), supported
        message = f"{call}: " + "; ".join(self.reasons)
        super().__init__(f"{message}. Supported: {supported}" if supported else message)

    def __reduce__(self):
        return type(self), (self.call, self.reasons, self.supported)
