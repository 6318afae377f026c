"""What a watcher of a run has found: a likely fault, and what to do about it."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """One likely fault of a run.

    Attributes:
        name: Which fault, by a fixed identifier such as ``labels_shuffled``.
        message: One sentence with the measured and the expected value.
        remedy: One sentence that says what to do.
        level: How serious it is.
    """

    name: str
    message: str
    remedy: str
    level: str = "warning"
