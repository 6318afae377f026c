"""A network: a backbone and the conditioner that prepares its context."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from models.config import ModelConfig
from models.context import Context

_OTHER_SHAPES = 16  # Batches of pictures, scores, validation and probes, and last ones of fewer.


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
        """Compile what is run at every step, for each of ``num_shapes`` shapes of inputs.

        Of a sharded network, that is what is gathered by itself.
        """
        # Beyond the limit, further shapes would silently run without compilation.
        limits, graphs = torch._dynamo.config, num_shapes + _OTHER_SHAPES
        limits.recompile_limit = max(limits.recompile_limit, graphs)
        total = max(limits.accumulated_recompile_limit, 4 * graphs)
        limits.accumulated_recompile_limit = total
        # Blocks that are equal share one graph, which is compiled once.
        config = self.config
        parts_of = config.sharded_parts if is_sharded else config.compiled_parts
        for part in parts_of(self.backbone):
            # One graph for any shape would compute other last digits, and be used or not by what
            # came first: a run that goes on would not equal one that was never stopped.
            part.compile(backend=backend, dynamic=False)
        self.conditioner.compile_parts(backend)
        self.is_compiled = True

    @staticmethod
    def compile_seconds() -> float:
        """Return how long torch.compile has worked in this process."""
        return torch._dynamo.utils.calculate_time_spent()["total_wall_time"]

    def check(self, cond: dict[str, Tensor]) -> None:
        """Raise ValueError if conditions are missing or out of range; reads them, so on the CPU."""
        self.conditioner.check(cond)

    def context(
        self, cond: dict[str, Tensor], drop: Tensor | None = None, num: int | None = None
    ) -> Context:
        """Return the context of a batch of N images.

        Args:
            cond: Named conditions: ``label`` [N] int64 class indices, ``augment`` [N, 9] labels of
                the augmentation (zeros if absent). Those of sets: see
                :class:`~models.set_conditioner.SetConditioner`.
            drop: [N] bool, true where the condition is replaced by the learned null condition;
                none by default.
            num: N, needed where ``cond`` is empty.
        """
        return self.conditioner(cond, drop, num)

    def prepare(self, context: Context) -> Context:
        """Return a context for many noise levels: what depends on it alone is computed now.

        The weights must not change while it is used.
        """
        return self.config.prepared(self.backbone, context)

    def forward(self, x: Tensor, c_noise: Tensor, context: Context) -> Tensor:
        """Return F [N, C_out, H, W] of inputs x [N, C, H, W], noise levels c_noise [N], context."""
        return self.backbone(x, c_noise, self.conditioner.resolve(context, c_noise))
