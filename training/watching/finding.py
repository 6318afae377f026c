"""What is told of a run that is watched."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that is wrong with a run, or may be.

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
