"""For tests: training whose layers overflow or whose loss spikes, and that is killed while it is
about to go back.

    python tests/unstable_runs.py --faults='{"overflow": [3], "kill": "after the record"}' ...

The other options are those of train.py.
"""

import json
import os
import signal
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

import torch

from families import image
from torch_utils import distributed
from training import launch
from training.stability import rollbacks

# A module in the first block of networks of one stage, whose output overflows.
LAYER = "backbone.encoder.0.0.block.mlp.fc1"
KILLS = ("before the record", "after the record", "between removals", "after the rollback")


class Unstable(image.Objective):
    """The objective of images, with faults at steps of the run, before its rollbacks or always.

    Class attributes: ``overflow``, ``spike``: steps, counted from 0; ``always``: after rollbacks
    too; ``one_rank``: only on the last.
    """

    overflow, spike, always, one_rank = frozenset(), frozenset(), False, False
    grad_factor = 1e4  # Of the layer's weight, in a spike.

    def __init__(self, network, *args, **kwargs):
        super().__init__(network, *args, **kwargs)
        self._step = None
        layer = network.get_submodule(LAYER)
        layer.register_forward_hook(self._overflow)
        if layer.weight.requires_grad:  # Those of the average do not.
            layer.weight.register_hook(
                lambda grad: grad * self.grad_factor if self._is(self.spike) else grad
            )

    def draw(self, step):
        self._step = step
        return super().draw(step)

    def has_gone_on(self, num_images):
        """Whether so many images came after the state at image 24 and a rollback."""
        return self._step.seed != 0 and self._step.cur_nimg >= 24 + num_images

    def _is(self, steps):
        if self._step is None or self._step.cur_nimg // self._step.batch not in steps:
            return False
        at_rank = not self.one_rank or distributed.rank() == distributed.world_size() - 1
        return at_rank and (self.always or self._step.seed == 0)

    def _overflow(self, module, args, output):
        return output * torch.inf if self._is(self.overflow) else None

    def forward(self, *args):
        loss = super().forward(*args)
        return loss * 1e3 if self._is(self.spike) else loss


@contextmanager
def planted(kill_at=None, **faults):
    """Within it, training of images has faults, and dies at one of :data:`KILLS`."""
    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(image, "Objective", Unstable))
        patches.enter_context(mock.patch.multiple(Unstable, **faults))
        if kill_at is not None:
            owner, name = {
                "before the record": (launch, "add_rollback"),
                "after the record": (rollbacks, "remove_abandoned"),
                "between removals": (rollbacks, "remove_state"),
                "after the rollback": (Unstable, "prepare"),
            }[kill_at]
            original = getattr(owner, name)

            def die(*args, **kwargs):
                if kill_at == "between removals":
                    original(*args, **kwargs)
                # Two steps after the state that the run went back to.
                is_late = name != "prepare" or args[0].has_gone_on(num_images=16)
                if is_late:
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(*args, **kwargs)

            patches.enter_context(mock.patch.object(owner, name, die))
        yield


if __name__ == "__main__":
    import dnnlib.program
    import train
    from evaluation.in_loop import images

    images.GRID_SEEDS = 16  # As in the runs that it is compared with: see conftest.py.

    place = next(i for i, text in enumerate(sys.argv) if text.startswith("--faults="))
    found = json.loads(sys.argv.pop(place).partition("=")[2])
    with planted(found.pop("kill", None), **found):
        dnnlib.program.run(train.main)
