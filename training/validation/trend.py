"""The trend of the validation loss: its best so far, its slope, and signs of overfitting."""

import dataclasses
import math
from typing import Any

import numpy as np
import torch

_NUM_ERRORS = 2.0  # Standard errors that a difference must exceed to be more than chance.
_MIN_POINTS, _MAX_POINTS = 4, 2000  # Fewest validations for a slope, and most that are kept.


def standard_error(values: np.ndarray) -> float:
    """Return the standard error of the mean of independent values [N]; NaN for fewer than two."""
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def is_beyond_chance(differences: np.ndarray) -> bool:
    """Return whether the mean of paired differences [N] is over two standard errors below 0.

    A single difference has no standard error; its sign decides.
    """
    mean, error = float(differences.mean()), standard_error(differences)
    return mean < 0 and not mean >= -_NUM_ERRORS * error


@dataclasses.dataclass
class Trend:
    """The validations of a run so far.

    Attributes:
        source: Identity of the examples; losses of other examples are not comparable.
        points: Training images and loss of each of the newest 2,000 validations.
        best: Losses of the held-out items, float64 [I], at the best validation.
        best_nimg: Training images at the best validation.
        best_trained: Loss on training images at the best validation.
        num_since: Validations since the best.
    """

    source: str
    points: list[tuple[int, float]] = dataclasses.field(default_factory=list)
    best: np.ndarray | None = None
    best_nimg: int = 0
    best_trained: float = math.nan
    num_since: int = 0

    def add(self, cur_nimg: int, losses: np.ndarray, trained: float) -> None:
        """Add a validation: the losses of the held-out items, [I], and that on training images.

        It becomes the best if the losses are lower than the best so far by more than chance. The
        comparison is paired: the same items under the same noise.
        """
        self.points = [*self.points, (cur_nimg, float(losses.mean()))][-_MAX_POINTS:]
        if not math.isfinite(self.best_loss) or is_beyond_chance(losses - self.best):
            self.best, self.best_nimg, self.best_trained = losses, cur_nimg, trained
            self.num_since = 0
        else:
            self.num_since += 1

    @property
    def best_loss(self) -> float:
        return math.nan if self.best is None else float(self.best.mean())

    def overfits(self, losses: np.ndarray, trained: float) -> bool:
        """Return whether held-out losses [I] have risen while the training loss has fallen.

        Both are compared with the best validation; the rise must be more than chance.
        """
        has_risen = self.best is not None and is_beyond_chance(self.best - losses)
        return has_risen and trained < self.best_trained

    def slope(self) -> tuple[float, float] | None:
        """Return the relative change of the loss per doubling of the images, with standard error.

        It is the slope of the least-squares line of the loss over log2(images), through the
        validations in the second half of the images so far, divided by their mean loss. None if
        those are fewer than four.
        """
        newest = self.points[-1][0] if self.points else 0
        points = [(n, y) for n, y in self.points if n > 0 and 2 * n >= newest and math.isfinite(y)]
        if len(points) < _MIN_POINTS:
            return None
        x, y = np.log2([n for n, _ in points]), np.array([y for _, y in points])
        x = x - x.mean()
        slope = float((x * y).sum() / (x**2).sum())
        rest = y - y.mean() - slope * x
        error = math.sqrt(float((rest**2).sum()) / (len(x) - 2) / float((x**2).sum()))
        return slope / float(y.mean()), error / float(y.mean())

    def state_dict(self) -> dict[str, Any]:
        """Return what a training state keeps."""
        points = torch.tensor(self.points, dtype=torch.float64).reshape(-1, 2)
        best = torch.empty(0) if self.best is None else torch.from_numpy(self.best.copy())
        found = dict(
            points=points,
            best=best,
            best_trained=torch.tensor([self.best_trained], dtype=torch.float64),
        )
        return dict(found, **{name: getattr(self, name) for name in _PLAIN})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned, unless it is of other examples."""
        if state.get("source") != self.source:
            return
        for name in _PLAIN:
            setattr(self, name, state[name])
        self.points = [(int(nimg), loss) for nimg, loss in state["points"].tolist()]
        self.best = state["best"].numpy().copy() if len(state["best"]) else None
        self.best_trained = state["best_trained"].item()


_PLAIN = ("source", "best_nimg", "num_since")
