"""The Python interface: load a snapshot, ask what it can do, sample, denoise, encode and score.

    import setdiffit

    model = setdiffit.load("runs/00000-digits")
    images = model.generate(seeds=range(16), classes="3", cfg_scale=1.5)
    images[0].save("three.png")

docs/python.md shows every call, and examples/quickstart.ipynb runs them.
"""

import contextlib
import dataclasses
import functools
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

import families  # noqa: F401 (registers them)
from diffusion.config import PRECISIONS
from dnnlib.config import Config, unknown
from dnnlib.errors import refusal
from dnnlib.text import check_seeds
from torch_utils.pictures import to_pil
from training.asked import HOW, Asked, GeneratorOptions
from training.checkpoint import Snapshot
from training.family import of as family_of
from training.portable import open_snapshot

__all__ = ["Model", "load"]

Picture = str | os.PathLike | Image.Image | Tensor
_MODES = ("1", "L", "LA", "P", "RGB", "RGBA")  # Accepted for pictures in memory.


def load(
    location: str | os.PathLike, device: str | torch.device | None = None, **options: Any
) -> "Model":
    """Return the model of a snapshot.

    Args:
        location: A snapshot, run folder, export or URL, or ``hf://ORG/NAME``.
        device: Where the model computes; by default the GPU, if there is one.
        options: ``precision`` (fp32, bf16, fp16), ``compile``, ``guide`` (a second snapshot for
            autoguidance), ``vae`` (new location of the autoencoder) and ``cpu_matmul``.

    Raises ValueError if the snapshot cannot be read, or for an unknown option, value or device.
    """
    for name in options:
        if name not in HOW:
            raise unknown("option", name, HOW)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    precision = options.get("precision")
    if precision not in (None, *PRECISIONS):
        raise refusal("precision", repr(precision), accepted=", ".join(PRECISIONS))
    try:
        device = torch.device(device)
    except RuntimeError:
        raise refusal("device", repr(device), accepted="cpu, cuda, cuda:1, ...") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise refusal("device", str(device), but="PyTorch finds no GPU", remedy="give cpu")
    return Model(open_snapshot(location), device, options)


class Model:
    """A trained network with everything that sampling and scoring need; see :func:`load`.

    Attributes:
        snapshot: Configuration, data, progress and weights; see training/checkpoint.py.
        device: Where the model computes.
    """

    def __init__(self, snapshot: Snapshot, device: torch.device, options: dict[str, Any]) -> None:
        self.snapshot, self.device = snapshot, device
        self._family = family_of(snapshot.config)
        self._networks: dict[str, Any] = {}
        self._load = functools.lru_cache(4)(self._load_generator)
        self._options = options

    # What it can do.

    @property
    def kind(self) -> str:
        """Name of the family: image, latent, sets or features."""
        return self.snapshot.config.family

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes that the model generates; empty if it has none."""
        return tuple(self.snapshot.data.class_names)

    @property
    def image_sizes(self) -> tuple[tuple[int, int], ...]:
        """Width and height in pixels of each image size that the model generates."""
        return self.snapshot.config.model.image_sizes

    @property
    def inputs(self) -> dict[str, tuple[int, ...]]:
        """Shapes, by name, of the network's inputs for one image besides x and sigma."""
        cond = self.snapshot.config.model.example_cond()
        return {name: tuple(value.shape[1:]) for name, value in cond.items() if name != "size"}

    @property
    def settings(self) -> dict[str, Any]:
        """Sampling and guidance settings that :meth:`generate` accepts, with their defaults."""
        config = self.snapshot.config
        return {
            field.name: getattr(section, field.name)
            for section in (config.sampling, config.guidance)
            for field in dataclasses.fields(section)
        }

    def __repr__(self) -> str:
        config, sizes = self.snapshot.config, ", ".join(f"{w}x{h}" for w, h in self.image_sizes)
        lines = [f"{self.kind} model of preset {config.preset}, images of {sizes} pixels"]
        if self.classes:
            lines.append(f"classes: {', '.join(self.classes[:10])} ({len(self.classes)})")
        lines += [f"{name}: {text}" for name, text in self._family.describe(config).items()]
        lines.append(", ".join(f"{name}={value}" for name, value in self.settings.items()))
        return "\n  ".join(lines)

    # Images.

    def generate(
        self,
        seeds: int | Sequence[int] = 16,
        *,
        classes: str | int | Sequence[str | int] | None = None,
        support: Picture | Sequence[Picture] | None = None,
        prompt: str | Sequence[str] | None = None,
        reference: Picture | None = None,
        size: str | None = None,
        output: str = "pil",
        batch: int = 64,
        **settings: Any,
    ) -> list[Any]:
        """Return one image per seed; with several prompts, every seed of the first comes first.

        Args:
            seeds: Number of images (seeds 0, 1, ...), or the seed of each, from 0 to 2^32 - 1.
            classes: For a class-conditional model, the classes that seeds take in rotation: names,
                numbers and ranges such as ``"cat,3,5-7"``. By default each seed draws its class.
            support: For a set-conditioned model, the images that new ones should be like: files,
                folders, PIL images, or tensors [C, H, W], uint8.
            prompt, reference, size: For a feature-conditioned model, the text, the image for style
                and layout, and the size, such as ``"1216x832"``.
            output: ``"pil"``, or ``"tensor"`` for tensors [C, H, W], uint8, on the device (on the
                CPU for a feature-conditioned model).
            batch: Number of images generated at once, which does not affect them.
            settings: Sampling and guidance settings, such as ``steps=10`` or ``cfg_scale=2``; see
                :attr:`settings`.

        Raises ValueError for arguments and settings that the model does not accept.
        """
        if output not in ("pil", "tensor"):
            raise refusal("output", repr(output), accepted="'pil', 'tensor'")
        if isinstance(seeds, float) or seeds is None:
            raise refusal("seeds", repr(seeds), accepted="a number of images, or a list of seeds")
        seeds = range(seeds) if isinstance(seeds, int) else list(seeds)
        check_seeds("seeds", seeds)
        if batch < 1:
            raise refusal("batch", batch, accepted="1 or more")
        seeds = [int(seed) for seed in seeds]
        asked = dict(classes=classes, support=support, prompt=prompt)
        with self._bound(dict(asked, reference=reference, size=size), settings) as (
            generator,
            asks,
        ):
            wanted = [
                (seed, asks.label(part, seed)) for part in range(asks.num_parts) for seed in seeds
            ]
            images: list[Tensor] = []
            for start in range(0, len(wanted), batch):
                own, labels = zip(*wanted[start : start + batch], strict=True)
                images += generator.generate(own, None if None in labels else labels)
        return images if output == "tensor" else [to_pil(image) for image in images]

    def denoise(
        self,
        x: Tensor,
        sigma: float | Tensor,
        *,
        classes: str | int | Sequence[str | int] | None = None,
        support: Picture | Sequence[Picture] | None = None,
        prompt: str | Sequence[str] | None = None,
        reference: Picture | None = None,
        size: str | None = None,
        **settings: Any,
    ) -> Tensor:
        """Return the estimate of x0 [N, C, h, w], float32, from noisy x = x0 + sigma n.

        Args:
            x: [N, C, h, w], floating point, in the space of :meth:`encode`.
            sigma: Noise level above 0, the same for all images.
            classes, support, prompt, reference, size: As in :meth:`generate`. Image i takes the
                i-th class in rotation; all take the first prompt. Without classes, a
                class-conditional model gives its unconditional estimate, without guidance.
            settings: Guidance settings, which act as in sampling.

        Raises ValueError for arguments and settings that the model does not accept.
        """
        self._check_shape(
            "x", x, [self.snapshot.config.model.shape_of(s) for s in self.image_sizes]
        )
        if isinstance(sigma, Tensor) and sigma.numel() != 1:
            accepted = "one number for all images"
            raise refusal("sigma", f"shape {list(sigma.shape)}", accepted=accepted)
        if not 0 < float(sigma) < math.inf:
            raise refusal("sigma", float(sigma), accepted="a number above 0")
        asked = dict(classes=classes, support=support, prompt=prompt)
        with self._bound(dict(asked, reference=reference, size=size), settings) as (
            generator,
            asks,
        ):
            labels = [asks.label(0, row) for row in range(len(x))]
            if self.classes and None in labels and not self.snapshot.config.training.label_drop:
                but = "this model has learned no unconditional estimate"
                raise refusal("classes", but=but, remedy="name some")
            x = x.to(self.device, torch.float32)
            return generator.denoise(x, float(sigma), None if None in labels else labels)

    def encode(self, images: Tensor) -> Tensor:
        """Return what the network denoises, [N, c, h, w], float32, for images [N, C, H, W], uint8.

        Those are pixels in [-1, 1], or normalised latents.
        """
        channels = self.snapshot.config.model.img_channels
        self._check_shape("images", images, [(channels, h, w) for w, h in self.image_sizes])
        if images.dtype != torch.uint8:
            raise refusal("images", images.dtype, accepted="torch.uint8")
        return self._load(*self._sections()).codec.encode_images(images.to(self.device))

    def decode(self, x: Tensor) -> Tensor:
        """Return the images [N, C, H, W], uint8, that x [N, c, h, w] stands for."""
        self._check_shape(
            "x", x, [self.snapshot.config.model.shape_of(s) for s in self.image_sizes]
        )
        return self._load(*self._sections()).codec.decode(x.to(self.device))

    def score(
        self,
        metrics: str | Sequence[str],
        ref: str | os.PathLike | None = None,
        *,
        num_images: int | None = None,
        first_seed: int = 0,
        batch: int = 64,
        **settings: Any,
    ) -> list[dict[str, Any]]:
        """Return the score row of each metric, as ``fid.py calc`` writes it.

        Args:
            metrics: Names such as ``"fid50k_full"``, in a list or separated by commas.
            ref: Real images or their statistics, which most metrics compare with.
            num_images: Number of images to generate; by default each metric's own.
            first_seed: Seed of the first image.
            batch: Number of images generated at once.
            settings: Sampling and guidance settings.

        Raises ValueError for arguments that the model or a metric does not accept.
        """
        from evaluation.scoring import Comparison, RealImages, check_reference
        from metrics.metric import get_metrics

        specs = get_metrics(metrics.split(",") if isinstance(metrics, str) else metrics)
        check_reference(specs, ref, "ref")
        real = None if ref is None else RealImages(os.fspath(ref))
        source = self._family.images(
            self.snapshot, lambda: self._generator(settings), first_seed, batch
        )
        how = Comparison(metrics=specs, real=real, num_images=num_images, batch=batch)
        return how.rows(source, self.device)

    # How.

    def _check_shape(self, name: str, x: Tensor, shapes: Sequence[tuple[int, int, int]]) -> None:
        """Raise ValueError unless ``x`` is a batch of one of ``shapes``, [C, H, W]."""
        if x.ndim != 4 or tuple(x.shape[1:]) not in shapes:
            accepted = " or ".join(f"[N, {', '.join(map(str, shape))}]" for shape in shapes)
            raise refusal(name, f"shape {list(x.shape)}", accepted=accepted)

    @contextlib.contextmanager
    def _bound(self, asked: dict[str, Any], settings: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
        """Yield the generator bound to the requests in ``asked``, and those requests."""
        with tempfile.TemporaryDirectory() as folder:
            given = _as_typed(asked, Path(folder))
            requests = self._family.requests(
                self.snapshot, dataclasses.replace(given, given=tuple(settings))
            )
            yield requests.bind(self._generator(settings), self.device), requests

    def _generator(self, settings: dict[str, Any]) -> Any:
        for name in settings:
            if name not in self.settings:
                raise unknown("setting", name, sorted(self.settings))
        return self._load(*(_changed(section, settings) for section in self._sections()))

    def _sections(self) -> tuple[Config, Config]:
        return self.snapshot.config.sampling, self.snapshot.config.guidance

    def _load_generator(self, sampling: Config, guidance: Config) -> Any:
        own = dict(sampling=sampling, guidance=guidance, **self._options)
        return self._family.load(self.snapshot, self.device, _Kept(networks=self._networks, **own))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Kept(GeneratorOptions):
    """Options that keep each network that they build, whatever the other settings are."""

    networks: dict[str, Any]

    def build(self, snapshot: Snapshot, device: torch.device) -> Any:
        if snapshot.sha256 not in self.networks:
            self.networks[snapshot.sha256] = super().build(snapshot, device)
        return self.networks[snapshot.sha256]


def _changed(section: Config, settings: dict[str, Any]) -> Config:
    names = {field.name for field in dataclasses.fields(section)}
    own = {name: value for name, value in settings.items() if name in names}
    return dataclasses.replace(section, **own)


def _as_typed(asked: dict[str, Any], folder: Path) -> Asked:
    """Return arguments as generate.py's options; pictures in memory are written to ``folder``."""
    classes, support = asked["classes"], asked["support"]
    if classes is not None and not isinstance(classes, str):
        classes = [str(name) for name in ([classes] if isinstance(classes, int) else classes)]
        if not classes:
            raise refusal("classes", but="the list is empty", remedy="name some, or leave it out")
    if support is None:
        support = []
    elif isinstance(support, Picture) and not (isinstance(support, Tensor) and support.ndim == 4):
        support = [support]
    files = [_file_of(picture, folder / f"{row:06d}.png") for row, picture in enumerate(support)]
    prompt, reference = asked["prompt"], asked["reference"]
    prompts = (prompt,) if isinstance(prompt, str) else tuple(prompt or ())
    if reference is not None:
        reference = Path(_file_of(reference, folder / "reference.png"))
    return Asked(
        classes=classes,
        support=tuple(files),
        prompt=prompts,
        reference=reference,
        bucket=asked["size"],
    )


def _file_of(picture: Picture, path: Path) -> str:
    """Return the path of a picture's file; a picture in memory is written to ``path``."""
    if isinstance(picture, str | os.PathLike):
        return os.fspath(picture)
    if isinstance(picture, Tensor):
        if picture.dtype != torch.uint8 or picture.ndim != 3 or len(picture) not in (1, 3):
            got = f"{picture.dtype} of shape {list(picture.shape)}"
            raise refusal("A picture", got, accepted="torch.uint8 [C, H, W] of 1 or 3 channels")
        picture = to_pil(picture)
    if picture.mode not in _MODES:
        raise refusal("A picture", f"mode {picture.mode}", accepted=", ".join(_MODES))
    picture.save(path)
    return str(path)
