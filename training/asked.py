"""Requests to a snapshot: how it is sampled, and what its images are made from."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dnnlib.click_options import param
from dnnlib.config import Config

if TYPE_CHECKING:
    import torch

    from diffusion.config import SamplingConfig
    from models.network import Network
    from training.checkpoint import Snapshot

# Options of other families' requests, and why they are refused.
_OF_SETS = ("support", "episodes", "split", "data")
_OF_FEATURES = ("prompt", "reference", "bucket", "features", "ids", "text", "visual")
NOT_SETS = (_OF_SETS, "this model was not trained on sets of images")
NOT_FEATURES = (_OF_FEATURES, "this model was not trained on features")
# Fields of GeneratorOptions besides sampling and guidance.
HOW = ("precision", "cpu_matmul", "compile", "guide", "vae")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GeneratorOptions:
    """How to sample a snapshot; None means as in its training.

    Attributes:
        sampling, guidance: Settings of the sampler, and of the family's kind of guidance.
        precision: Arithmetic of the network.
        cpu_matmul: Library for float32 matrix products on a CPU.
        compile: Whether networks are compiled with torch.compile.
        guide: Snapshot whose errors are extrapolated away from (autoguidance); None for no guide.
        vae: Location of the autoencoder.
    """

    sampling: SamplingConfig | None = None
    guidance: Config | None = None
    precision: str | None = None
    cpu_matmul: str | None = None
    compile: bool = False
    guide: str | None = None
    vae: str | None = None

    @classmethod
    def of(cls, options: Any, config: Any) -> GeneratorOptions:
        """Return the settings that a command's options of the same names hold.

        ``config`` is the sampling protocol, with ``sampling`` and ``guidance``.
        """
        own = {name: getattr(options, name) for name in HOW}
        return cls(**own, sampling=config.sampling, guidance=config.guidance)

    def build(self, snapshot: Snapshot, device: torch.device) -> Network:
        """Return the network of a snapshot, compiled if that is asked for."""
        network = snapshot.build(device)
        if self.compile:
            network.compile_parts()
        return network


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """What the options of generate.py ask for, as typed; None or empty if not given.

    ``given`` has the names of the sampling and guidance settings that were typed.
    """

    classes: str | None = param(
        "--class", help="Classes through which the seeds cycle, by name or number: cat or 7 or 0-9."
    )
    support: tuple[str, ...] = param(
        multiple=True, help="Support images: a file, folder or zip; repeatable."
    )
    episodes: int | None = param(
        min=1, max=1_000_000, help="Number of support sets to draw from --split."
    )
    split: str | None = param(
        choices=("seen", "unseen", "val"),
        help="Classes that --episodes come from.  [default: unseen]",
    )
    data: str | None = param(
        help="Dataset that --episodes come from.  [default: where it was in training]"
    )
    prompt: tuple[str, ...] = param(multiple=True, may_be_empty=True, help="Prompt; repeatable.")
    reference: Path | None = param(help="Reference image for style and layout.")
    bucket: str | None = param(
        help="Size of the images, such as 1216x832.  [default: nearest to --reference]"
    )
    features: str | None = param(
        help="Folder of stored features to use instead of a prompt; see --id."
    )
    ids: str | None = param("--id", help="Samples of --features to use, such as ID,ID.")
    text: str | None = param(
        help="Text encoder for --prompt.  [default: where it was when features were made]"
    )
    visual: str | None = param(
        help="Visual encoder for --reference.  [default: where it was when features were made]"
    )
    given: Collection[str] = ()

    def refuse(self, names: Sequence[str], reason: str) -> None:
        """Raise ValueError with ``reason`` if one of the options ``names`` was given."""
        for name in names:
            if getattr(self, name) not in (None, ()):
                option = {"classes": "class", "ids": "id"}.get(name, name)
                raise ValueError(f"--{option}: {reason}.")
