"""A network: a backbone, and the conditioner that prepares its context."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from models.config import ModelConfig
from models.context import Context

# Graphs to allow beside those of training steps: pictures, scores, validation, probes, and their
# smaller last batches.
_OTHER_SHAPES = 16


class Network(nn.Module):
    """The raw network F(x, c_noise, context) of a configuration, with its conditioner."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = config.make_backbone()
        self.conditioner = config.make_conditioner(self.backbone.context_dim)
        self.is_compiled = False

    def compile_parts(
        self,
        num_shapes: int = 1,
        backend: str | Callable = "inductor",
        *,
        is_sharded: bool = False,
    ) -> None:
        """Compile the parts that run at every step, for ``num_shapes`` different input shapes.

        In a sharded network they are the modules whose weights are gathered separately.
        """
        # Beyond the limit, further shapes would silently run uncompiled.
        limits, graphs = torch._dynamo.config, num_shapes + _OTHER_SHAPES
        limits.recompile_limit = max(limits.recompile_limit, graphs)
        total = max(limits.accumulated_recompile_limit, 4 * graphs)
        limits.accumulated_recompile_limit = total
        # Equal blocks share one graph, which is compiled once.
        config = self.config
        parts_of = config.sharded_parts if is_sharded else config.compiled_parts
        for part in parts_of(self.backbone):
            # A graph for dynamic shapes rounds differently, and whether it is used depends on which
            # shapes came first: a resumed run would not equal an uninterrupted one.
            part.compile(backend=backend, dynamic=False)
        self.conditioner.compile_parts(backend)
        self.is_compiled = True

    @staticmethod
    def compile_seconds() -> float:
        """Return the seconds that torch.compile has taken in this process."""
        return torch._dynamo.utils.calculate_time_spent()["total_wall_time"]

    def check(self, cond: dict[str, Tensor]) -> None:
        """Raise ValueError if conditions are missing or out of range; pass them on the CPU."""
        self.conditioner.check(cond)

    def context(
        self, cond: dict[str, Tensor], drop: Tensor | None = None, num: int | None = None
    ) -> Context:
        """Return the context of a batch of N images.

        Args:
            cond: Named conditions: ``label``, int64 class indices [N]; ``augment``, augmentation
                labels [N, 9], zeros if absent. For sets and features see
                :class:`~models.set_conditioner.SetConditioner` and
                :class:`~models.feature_conditioner.FeatureConditioner`.
            drop: Bool [N] ([N, 3] for features), true where a condition is replaced by its learned
                null; by default none is.
            num: N; needed if ``cond`` is empty.
        """
        return self.conditioner(cond, drop, num)

    def prepare(self, context: Context) -> Context:
        """Return the context with all that depends on it alone computed, for many noise levels.

        The weights must not change while it is in use.
        """
        return self.config.prepared(self.backbone, context)

    def forward(self, x: Tensor, c_noise: Tensor, context: Context) -> Tensor:
        """Return F [N, C_out, H, W] for x [N, C, H, W], noise levels c_noise [N] and a context."""
        return self.backbone(x, c_noise, self.conditioner.resolve(context, c_noise))
