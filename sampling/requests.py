"""Requests for images: from a text, a reference image, both, or stored features."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from data.features.buckets import Bucket, fit_image, nearest_bucket, parse_buckets
from data.features.dataset import FeatureDataset, pad_texts
from data.features.record import SPLITS
from data.images.dataset import Cond
from data.images.decode import decode_image
from diffusion.guidance import branch_weights
from diffusion.samplers import num_evaluations
from dnnlib.errors import refusal
from dnnlib.files import read_file
from encoders.text import load_text_encoder
from encoders.visual import load_visual_encoder
from models.architectures.feature_dit import FeatureDiTConfig
from sampling.features import FeatureGenerator
from sampling.trajectory import Frame
from torch_utils.pictures import Titles, mixed_grid
from training.asked import Asked
from training.checkpoint import Snapshot

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclasses.dataclass(frozen=True)
class Request:
    """The conditions of one image, [1, ...] each, and its size.

    ``name`` is for people; ``facts`` records where the conditions come from.
    """

    name: str
    cond: Cond
    bucket: Bucket
    facts: dict[str, Any]

    def repeated(self, num: int) -> Cond:
        """Return the conditions of ``num`` such images, [num, ...] each; ``size`` is shared."""
        return {
            name: value if name == "size" else value.expand(num, *value.shape[1:])
            for name, value in self.cond.items()
        }


@dataclasses.dataclass(frozen=True)
class RequestGenerator:
    """Generates images from numbered requests: a label is the index of a request."""

    generator: FeatureGenerator
    requests: Sequence[Request]

    def generate(self, seeds: Sequence[int], labels: Sequence[int]) -> list[torch.Tensor]:
        """Return one image [3, H, W], uint8, per seed, on the CPU, from the requests ``labels``."""
        images: dict[int, torch.Tensor] = {}
        for request, rows in self._by_request(labels):
            own = [seeds[row] for row in rows]
            made = self.generator.generate(own, request.repeated(len(rows)), request.bucket)
            images.update(zip(rows, made.cpu(), strict=True))
        return [images[row] for row in range(len(seeds))]

    def path(self, seeds: Sequence[int], labels: Sequence[int], num_frames: int) -> list[Frame]:
        """Return frames as :meth:`FeatureGenerator.path` does, from the requests ``labels``."""
        frames: dict[float, dict[int, torch.Tensor]] = {}
        for request, rows in self._by_request(labels):
            own = [seeds[row] for row in rows]
            cond = request.repeated(len(rows))
            for frame in self.generator.path(own, cond, request.bucket, num_frames):
                images = frames.setdefault(frame.level, {})
                images.update(zip(rows, frame.images, strict=True))
        order = range(len(seeds))
        return [Frame(level, [images[row] for row in order]) for level, images in frames.items()]

    def denoise(self, x: torch.Tensor, sigma: float, labels: Sequence[int]) -> torch.Tensor:
        """Return the guided x0 estimate from noisy x [N, c, h, w], for the requests ``labels``."""
        estimate = torch.empty_like(x)
        for request, rows in self._by_request(labels):
            cond = request.repeated(len(rows))
            estimate[rows] = self.generator.denoise(x[rows], sigma, cond, request.bucket)
        return estimate

    def _by_request(self, labels: Sequence[int]) -> Iterator[tuple[Request, list[int]]]:
        for label in dict.fromkeys(labels):
            yield self.requests[label], [row for row, own in enumerate(labels) if own == label]

    def protocol(self) -> dict[str, Any]:
        """Return the sampling protocol together with the requests."""
        num_branches = set()
        for cond in (request.cond for request in self.requests):
            given = dict(has_text="text" in cond, has_visual="cls" in cond)
            num_branches.add(len(branch_weights(self.generator.guidance, **given)))
        nfe = num_evaluations(self.generator.sampling) * max(num_branches)
        requests = [dict(r.facts, bucket=r.bucket.name) for r in self.requests]
        return dict(self.generator.protocol(), nfe=nfe, requests=requests)


@dataclasses.dataclass(frozen=True)
class PromptRequests:
    """Prompts, a reference or stored features; see :class:`training.family.Requests`.

    Raises ValueError for options that contradict each other or lack one that they need.
    """

    snapshot: Snapshot
    asked: Asked
    facts: dict[str, Any] = dataclasses.field(default_factory=lambda: dict(classes=()))

    def __post_init__(self) -> None:
        asked = self.asked
        is_stored = asked.features is not None or asked.ids is not None
        if is_stored == bool(asked.prompt or asked.reference is not None):
            raise ValueError(
                "This model makes images from a text, an image, or both: give --prompt or "
                "--reference, or --features and --id."
            )
        if is_stored:
            if asked.features is None or asked.ids is None:
                raise ValueError("Give --features and --id together.")
            asked.refuse(("text", "visual"), "stored features are already encoded; leave it out")
            asked.refuse(("bucket",), "stored features have the size of their images; leave it out")
        for name, option in (("text", "prompt"), ("visual", "reference")):
            if getattr(asked, name) is not None and not getattr(asked, option):
                raise ValueError(f"--{name} encodes --{option}; give that too.")
        if not is_stored:
            self._check_guidance()

    def _check_guidance(self) -> None:
        """Raise ValueError for guidance by a condition that is not given."""
        text, visual = bool(self.asked.prompt), self.asked.reference is not None
        both = ("--prompt and --reference", text and visual)
        settings = dict(text_scale=("--prompt", text), visual_scale=("--reference", visual))
        settings |= dict(guidance_form=both, joint_scale=both)
        for setting, (needed, is_there) in settings.items():
            if setting in self.asked.given and not is_there:
                option = setting.replace("_", "-")
                raise ValueError(f"--{option} has no effect without {needed}; leave it out.")

    @property
    def num_parts(self) -> int:
        return max(len(self._names), 1)

    @property
    def _names(self) -> Sequence[str]:
        """The prompts, or the ids of stored conditions."""
        asked = self.asked
        return asked.prompt if asked.ids is None else [id.strip() for id in asked.ids.split(",")]

    @property
    def has_folders(self) -> bool:
        return self.num_parts > 1

    def label(self, part: int, seed: int) -> int:
        return part

    def bind(self, generator: FeatureGenerator, device: torch.device) -> RequestGenerator:
        asked = self.asked
        if asked.ids is not None:
            requests = stored_requests(self.snapshot, asked.features, self._names)
        else:
            requests = encode_requests(self.snapshot, device, asked)
        return RequestGenerator(generator, requests)

    def picture(
        self, images: Sequence[torch.Tensor], labels: Sequence[int], columns: int, heading: str
    ) -> Image:
        asked, names = self.asked, self._names
        rows: list[Sequence[Any]] = []
        titles: list[str] = []
        if asked.reference is not None:
            bucket = choose_bucket(self.snapshot, asked.bucket, asked.reference)
            rows.append([fit_image(_open_image(asked.reference), bucket)[0]])
            titles.append("Reference")
        for part in dict.fromkeys(labels):
            own = [image for image, label in zip(images, labels, strict=True) if label == part]
            lines = [own[start : start + columns] for start in range(0, len(own), columns)]
            rows += lines
            titles += [names[part] if names else "", *[""] * (len(lines) - 1)]
        return mixed_grid(rows, titles=Titles(heading, rows=titles))


def choose_bucket(snapshot: Snapshot, text: str | None, reference: Path | None) -> Bucket:
    """Return the size of the images: that named by ``text``, else the nearest to the reference's.

    With neither, it is the model's first. Raises ValueError if ``text`` names a size that the model
    was not trained on.
    """
    known = parse_buckets(",".join(snapshot.config.model.buckets))
    if text is not None:
        by_name = {bucket.name: bucket for bucket in known}
        if text.lower() not in by_name:
            remedy = f"the model was trained on {', '.join(by_name)}"
            raise refusal("--bucket", text, remedy=remedy)
        return by_name[text.lower()]
    return nearest_bucket(*_open_image(reference).size, known) if reference else known[0]


def encode_requests(snapshot: Snapshot, device: torch.device, asked: Asked) -> list[Request]:
    """Return one request per prompt, with the features of the reference if there is one.

    A reference without prompts makes one request. ``asked.text`` and ``asked.visual`` locate the
    encoders if they have moved since the model was trained. Loading the encoders is collective.
    Raises ValueError for a prompt that is too long or not UTF-8, and for an unfit reference.
    """
    prompts, reference = asked.prompt, asked.reference
    model, features = snapshot.config.model, snapshot.config.features
    size = choose_bucket(snapshot, asked.bucket, reference)
    shared: Cond = {"size": torch.tensor(size.size)}
    facts: dict[str, Any] = {}
    if reference is not None:
        location = asked.visual or model.visual
        encoder = load_visual_encoder(location, device, expected_hash=model.visual_hash)
        image = _open_image(reference)
        try:
            image, _ = fit_image(image, size)
        except ValueError as error:
            raise refusal("--reference", but=f"{reference} {error}") from None
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
        shared["cls"], shared["patches"] = (value.cpu() for value in encoder.encode(pixels))
        facts["reference"] = hashlib.sha256(reference.read_bytes()).hexdigest()
    if not prompts:
        return [Request(str(reference), shared, size, facts)]
    for prompt in prompts:
        try:
            prompt.encode()
        except UnicodeEncodeError:
            raise refusal("--prompt", ascii(prompt), accepted="text in UTF-8") from None
    encoder = load_text_encoder(asked.text or model.text, device, expected_hash=model.text_hash)
    hidden, mask, num_truncated = encoder.encode(list(prompts))
    if num_truncated:
        but = f"{num_truncated} text(s) have more than {encoder.max_tokens} tokens"
        raise refusal("--prompt", but=but, remedy="shorten them")
    requests = []
    for row, prompt in enumerate(prompts):
        own = hidden[row, mask[row]].cpu().numpy()
        if len(own) > features.text_lengths[-1]:
            but = f"{prompt!r} has {len(own)} tokens, and the model was trained on texts of up to"
            raise refusal("--prompt", but=f"{but} {features.text_lengths[-1]}", remedy="shorten it")
        padded, valid = pad_texts([own], features.text_lengths)
        cond = dict(shared, text=torch.from_numpy(padded), text_mask=torch.from_numpy(valid))
        requests.append(Request(prompt, cond, size, dict(facts, prompt=prompt)))
    return requests


def check_encoders(model: FeatureDiTConfig, dataset: FeatureDataset, option: str) -> None:
    """Raise ValueError if a dataset's features come from other encoders than the model's.

    ``option`` is the option that named the dataset, for the message.
    """
    for name, expected in model.encoder_hashes.items():
        if expected is not None and getattr(dataset.record, name)["hash"] != expected:
            but = f"{dataset.path} was made with another encoder (--{name}) than the model's"
            remedy = "give the features that it was trained on, or others made alike"
            raise refusal(option, but=but, remedy=remedy)


def stored_requests(snapshot: Snapshot, folder: str, ids: Sequence[str]) -> list[Request]:
    """Return one request for each of the samples ``ids`` of a feature folder, from any split.

    Raises ValueError for an id that is not there, and for features from other encoders than the
    model's.
    """
    config, found = snapshot.config, {}
    for split in SPLITS:
        dataset = FeatureDataset(folder, split, text_lengths=config.features.text_lengths)
        check_encoders(config.model, dataset, "--features")
        places = {name: row for row, name in enumerate(dataset.ids)}
        for name in ids:
            if name in places:
                _, cond = dataset.__getitems__([places[name]])
                size = dataset.buckets[dataset.bucket_index(places[name])]
                facts = dict(id=name, features=dataset.content_hash)
                found[name] = Request(name, cond, size, facts)
    missing = [name for name in ids if name not in found]
    if missing:
        remedy = "images.jsonl in that folder lists the ids"
        raise refusal("--id", but=f"{missing[0]} is not in {folder}", remedy=remedy)
    return [found[name] for name in ids]


def _open_image(path: Path):
    try:
        return decode_image(read_file(path))
    except OSError as error:
        raise ValueError(f"--reference: {path} cannot be read ({error.strerror}).") from None
    except ValueError as error:
        raise ValueError(f"--reference: {path}: {error}.") from None
