"""Conditioners: they turn a batch's named conditions into a :class:`~models.context.Context`."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from models.context import Context


class Conditioner(nn.Module):
    """Base class of the conditioners: knows the number of classes, and checks labels."""

    num_classes: int

    def forward(
        self, cond: dict[str, Tensor], drop: Tensor | None = None, num: int | None = None
    ) -> Context:
        """Return the context of N images; fields without a condition are None.

        Args:
            cond: Named conditions, as the subclass describes them.
            drop: Bool, true where a condition is replaced by its learned null; by default none is.
            num: N; needed if ``cond`` does not determine it.
        """
        raise NotImplementedError

    def resolve(self, context: Context, c_noise: Tensor) -> Context:
        """Return the context at noise levels ``c_noise`` [N], on which it may depend."""
        return context

    def compile_parts(self, backend: str | Callable) -> None:
        """Compile the parts that gain from torch.compile; by default none."""

    def check(self, cond: dict[str, Tensor]) -> None:
        """Raise ValueError if a condition is missing or out of range.

        It reads the labels, so call it while they are still on the CPU; the forward pass does not
        check them, because that would synchronise with the device.
        """
        if self.num_classes == 0:
            return
        if "label" not in cond:
            raise ValueError(
                f"This model is conditioned on {self.num_classes} classes, but no labels are given."
            )
        for label in cond["label"].flatten().tolist():
            if not 0 <= label < self.num_classes:
                classes = f"this model has the classes 0 to {self.num_classes - 1}"
                raise ValueError(f"Class index {label} is out of range; {classes}.")


class ClassConditioner(Conditioner):
    """Sums an embedding of the class label and one of the augmentation labels into one vector.

    The embedding of class i is sqrt(num_classes) times row i of a weight. It equals EDM's
    Linear(sqrt(L) onehot) (Karras et al. 2022, arXiv 2206.00364), and has the same scale and
    effective learning rate. Dropped labels are replaced by a learned null vector, which is in the
    graph of every batch.

    Conditions: ``label``, int64 class indices [N], which a class-conditional model needs, and
    ``augment``, float [N, augment_dim], zeros if absent. ``drop`` is bool [N].
    """

    def __init__(self, num_classes: int, augment_dim: int, dim: int) -> None:
        super().__init__()
        self.num_classes, self.augment_dim = num_classes, augment_dim
        if num_classes > 0:
            self.label_weight = nn.Parameter(torch.empty(num_classes, dim))
            self.null = nn.Parameter(torch.zeros(dim))
            nn.init.xavier_uniform_(self.label_weight)
        if augment_dim > 0:
            self.augment = nn.Linear(augment_dim, dim, bias=False)
            nn.init.xavier_uniform_(self.augment.weight)

    def forward(
        self, cond: dict[str, Tensor], drop: Tensor | None = None, num: int | None = None
    ) -> Context:
        """Return a vector [N, dim]; raises ValueError for missing labels, or an unknown N."""
        parts = []
        if self.num_classes > 0:
            if "label" not in cond:
                self.check(cond)
            label = cond["label"]
            vector = nn.functional.embedding(label, self.label_weight) * math.sqrt(self.num_classes)
            if drop is None:
                drop = torch.zeros_like(label, dtype=torch.bool)
            parts.append(torch.where(drop[:, None], self.null, vector))
        if self.augment_dim > 0:
            augment = cond.get("augment")
            if augment is None:
                num = parts[0].shape[0] if parts else num
                if num is None:
                    raise ValueError("Without conditions the number of images is needed.")
                augment = self.augment.weight.new_zeros(num, self.augment_dim)
            parts.append(self.augment(augment))
        return Context(vector=sum(parts[1:], parts[0]) if parts else None)


class ClassTable(Conditioner):
    """An embedding of the class label whose last row is the null label (DiT, arXiv 2212.09748).

    Condition: ``label``, int64 [N], which a class-conditional model needs. ``drop`` is bool [N].
    """

    def __init__(self, num_classes: int, dim: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        if num_classes > 0:
            self.embedding_table = nn.Embedding(num_classes + 1, dim)
            nn.init.normal_(self.embedding_table.weight, std=0.02)

    def forward(
        self, cond: dict[str, Tensor], drop: Tensor | None = None, num: int | None = None
    ) -> Context:
        """Return a vector [N, dim], or none without classes; ValueError if labels are missing."""
        if self.num_classes == 0:
            return Context()
        if "label" not in cond:
            self.check(cond)
        label = cond["label"]
        if drop is not None:
            label = torch.where(drop, self.num_classes, label)
        return Context(vector=self.embedding_table(label))
