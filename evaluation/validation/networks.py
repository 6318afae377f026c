"""The networks that measure in the validation of a feature-conditioned model, and their loading."""

import dataclasses
import os
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from PIL.Image import Image

from data.features.dataset import FeatureDataset
from dnnlib.config import did_you_mean
from encoders.text import TextEncoder, load_text_encoder
from encoders.visual import VisualEncoder, load_visual_encoder
from evaluation.in_loop.features import ValidateFn
from evaluation.validation.config import METRIC_PREFIX, SIZES, TESTS, ValidationConfig
from evaluation.validation.trials import Missing, choose_items
from evaluation.validation.validate import validate
from evaluation.validation.word_edits import edit_caption
from metrics.lpips import LPIPS, WEIGHTS_VARIABLE
from sampling.features import FeatureGenerator
from torch_utils import distributed

_UNNEEDED = Missing("no test needs it")


class EncodedTexts:
    """Hidden states of texts that were encoded in advance, so that a large encoder can be freed."""

    def __init__(self, encoder: TextEncoder, captions: Sequence[str]) -> None:
        self.sha256 = encoder.sha256
        self._hidden: dict[str, torch.Tensor] = {}
        for caption in dict.fromkeys(captions):
            hidden, mask, _ = encoder.encode([caption])
            self._hidden[caption] = hidden[0, mask[0]].cpu()

    def encode(self, captions: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Return hidden states [N, L, T], mask [N, L] and 0 cut texts, like a TextEncoder.

        Raises KeyError for a text that was not encoded in advance.
        """
        rows = [self._hidden[caption] for caption in captions]
        hidden = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        lengths = torch.tensor([len(row) for row in rows])
        return hidden, torch.arange(hidden.shape[1]) < lengths[:, None], 0


@dataclasses.dataclass(frozen=True)
class Networks:
    """The networks that measure; each may be :class:`Missing`, with a reason."""

    lpips: LPIPS | Missing
    visual: VisualEncoder | Missing
    text: TextEncoder | EncodedTexts | Missing

    def absent(self) -> dict[str, str]:
        """Return the reason for each network that is needed but missing, by name."""
        return {
            name: network.reason
            for name, network in vars(self).items()
            if isinstance(network, Missing) and network is not _UNNEEDED
        }


def load_networks(
    config: ValidationConfig,
    dataset: FeatureDataset,
    device: torch.device | str,
    *,
    visual: str | None = None,
    text: str | None = None,
) -> Networks:
    """Return the networks that the tests of ``config`` need. Collective.

    The texts of edits are encoded here, and their encoder is not kept. A network whose location was
    given raises ValueError if it cannot be loaded; one that is not at its default location becomes
    :class:`Missing`.

    Args:
        config: Its ``lpips_weights`` or $SETDIFFIT_LPIPS give the weights of LPIPS; without either,
            the published ones are fetched.
        dataset: The held-out images, whose record names the encoders.
        device: Where to compute.
        visual, text: Locations of the encoders, if not those in the record.
    """

    def load(is_named: bool, read: Callable[[], Any]) -> Any:
        try:
            return read()
        except ValueError as error:
            if is_named:
                raise
            return Missing(str(error).rstrip("."))

    def load_encoder(function: Callable[..., Any], name: str, location: str | None) -> Any:
        facts = getattr(dataset.record, name)
        options = dict(expected_hash=facts["hash"], precision=facts["precision"])
        place = location or facts["location"]
        return load(location is not None, lambda: function(place, device, **options))

    is_named = bool(config.lpips_weights or os.environ.get(WEIGHTS_VARIABLE))
    lpips = load(is_named, lambda: LPIPS.load(config.lpips_net, config.lpips_weights, device))
    visual_encoder = text_encoder = _UNNEEDED
    if "reconstruction" in config.tests:
        visual_encoder = load_encoder(load_visual_encoder, "visual", visual)
    if "text_edit" in config.tests:
        text_encoder = load_encoder(load_text_encoder, "text", text)
        if not isinstance(text_encoder, Missing):
            text_encoder = EncodedTexts(text_encoder, texts_of_edits(dataset, config.num_edits))
    return Networks(lpips, visual_encoder, text_encoder)


def texts_of_edits(dataset: FeatureDataset, num: int) -> list[str]:
    """Return all texts that the test ``text_edit`` on ``num`` images encodes."""
    own = [dataset.caption(item[0]) for item in choose_items(dataset, num)]
    return own + [edit_caption(caption)[0] for caption in own]


def chosen_tests(
    names: Sequence[str], *, option: str, prefix: str = METRIC_PREFIX
) -> tuple[str, ...]:
    """Return the tests that ``names`` of an option stand for, each once, without ``prefix``.

    Raises ValueError for a name that is not that of a test.
    """
    known = [prefix + test for test in TESTS]
    for name in names:
        if name not in known:
            but = f"the tests of a feature-conditioned model are {', '.join(known)}"
            raise ValueError(f"{option}: got {name}, but {but}.{did_you_mean(name, known)}")
    return tuple(name.removeprefix(prefix) for name in dict.fromkeys(names))


def check_used(given: Collection[str], tests: Sequence[str], choice: str) -> None:
    """Raise ValueError for an option in ``given`` that none of the ``tests`` uses.

    ``choice`` is the option that chose the tests, for the message.
    """
    owners = {name: (test,) for test, name in SIZES.items()}
    owners |= dict.fromkeys(("num_shown", "lpips_net", "lpips_weights"), TESTS)
    for name, own in owners.items():
        if name in given and not set(own) & set(tests):
            option = name.replace("_", "-")
            raise ValueError(f"--{option} has no effect with {choice}; leave it out.")


def make_validate(
    config: ValidationConfig, dataset: FeatureDataset, device: torch.device
) -> ValidateFn:
    """Return the function with which the training loop runs the tests of ``config`` on a model.

    Networks are loaded here, so that a run reports at its start what it cannot measure. Collective.
    """
    networks = load_networks(config, dataset, device)
    for name, reason in networks.absent().items():
        distributed.print0(f"Validation continues without {name}: {reason}.")

    def evaluate(
        names: tuple[str, ...], generator: FeatureGenerator
    ) -> tuple[list[dict[str, Any]], dict[str, Image]]:
        own = dataclasses.replace(config, tests=chosen_tests(names, option="--metrics"))
        return validate(generator, dataset, config=own, **vars(networks))

    return evaluate
