"""One thing that is wrong with a run, and what to do about it."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """What a watcher has to say.

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
