"""A finding: one thing that is wrong with a run, and its remedy."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that a watcher reports about a run.

    Attributes:
        name: A short fixed identifier, such as ``labels_shuffled``.
        message: One sentence, with the measured and the expected value.
        remedy: One sentence: what to do.
        level: ``error``, ``warning`` or ``info``.
    """

    name: str
    message: str
    remedy: str
    level: str = "warning"
