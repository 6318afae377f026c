"""Pictures and scores of a set-conditioned model while it trains, from unseen supports."""

import math
from collections.abc import Callable

import torch

from data.fewshot.episodes import Episodes
from dnnlib.errors import NotFiniteError
from evaluation.in_loop.images import EvaluateFn, ImageEvaluator, is_recorded, record
from sampling.grids import GRID_SEEDS, save_episodes
from sampling.images import ImageGenerator
from sampling.supports import SupportGenerator
from training.checkpoint import pictures_path
from training.config import RunConfig
from training.family import Outputs


class SetEvaluator(ImageEvaluator):
    """Pictures of a few episodes, scores on episodes of unseen classes, and a validation loss.

    Pictures show the episodes ``shown``; scores are on the episodes ``scored``, None without
    metrics. ``validation_loss`` returns the loss of a generator's network on classes that were not
    trained on; None to skip it.
    """

    def __init__(
        self,
        config: RunConfig,
        evaluate: EvaluateFn | None,
        shown: Episodes,
        scored: Episodes | None,
        validation_loss: Callable[[ImageGenerator], float] | None,
    ) -> None:
        super().__init__(config, () if scored is None else scored.counts, evaluate)
        self._shown, self._scored, self._validation_loss = shown, scored, validation_loss

    def save_pictures(
        self, generator: ImageGenerator, outputs: Outputs, cur_nimg: int
    ) -> torch.Tensor | None:
        logging = self._config.logging
        return save_episodes(
            SupportGenerator.of(generator, self._shown),
            GRID_SEEDS * logging.num_sample_batches,
            pictures_path(outputs.run_dir, cur_nimg),
            logging.sample_batch,
        )

    def score(self, generator: ImageGenerator, outputs: Outputs, cur_nimg: int) -> None:
        if self._validation_loss is not None and not is_recorded(outputs, "val_loss", cur_nimg):
            loss = self._validation_loss(generator)
            if not math.isfinite(loss):
                raise NotFiniteError(f"val_loss: the loss of unseen classes is {loss}.")
            row = dict(metric="val_loss", value=loss, values={"val_loss": loss})
            record([row], outputs, cur_nimg)
        if self._scored is not None:
            generator = SupportGenerator.of(generator, self._scored)
        super().score(generator, outputs, cur_nimg)
