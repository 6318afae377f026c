"""dataset_tool.py info: a summary of a dataset, latents or features."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from dnnlib.click_options import TextType
from dnnlib.text import format_count

if TYPE_CHECKING:
    import numpy as np


@click.command(no_args_is_help=True)
@click.argument("data", metavar="ZIP|DIR|NPZ|TAR", type=TextType())
def command(data: str) -> None:
    """Print size, classes and content hash of a dataset, or the record of latents or features.

    \b
    Example:
      python dataset_tool.py info datasets/cifar10.zip
    """
    from data.features.record import is_feature_folder
    from data.latents.record import is_latent_folder

    if is_feature_folder(data):
        from data.features.preparation.report import describe_folder

        lines = describe_folder(data)
    else:
        lines = _latent_lines(data) if is_latent_folder(data) else _image_lines(data)
    for line in lines:
        click.echo(line)


def _image_lines(data: str) -> Iterator[str]:
    from data.images.archive import count_line, left_out
    from data.images.dataset import ImageDataset
    from data.images.labels import CLASS_SPLITS, read_labels

    dataset = ImageDataset(data)
    labels, class_names = read_labels(dataset.archive) or (None, [])
    yield f"images        {len(dataset)}"
    yield f"resolution    {dataset.resolution}x{dataset.resolution}"
    yield f"channels      {dataset.img_channels}"
    yield f"files         {count_line(len(dataset), left_out(dataset.archive))}"
    yield f"size          {format_count(dataset.archive.num_bytes, 'B')}"
    yield f"content hash  {dataset.content_hash}"
    splits = ImageDataset(data, use_labels=None).class_splits
    if splits:
        parts = [f"{len(splits[name])} {name}" for name in CLASS_SPLITS if name in splits]
        yield f"class split   {', '.join(parts)}"
    yield from _class_lines(labels, class_names)


def _latent_lines(data: str) -> Iterator[str]:
    from data.latents.dataset import LatentDataset
    from data.latents.record import known_shards

    dataset = LatentDataset(data)
    record = dataset.record
    num_bytes = sum(shard.size for shard in known_shards(data, record).values())
    twins = ", each with its mirror image" if record.mirrored else ""
    kind = "mean and standard deviation" if record.kind == "mean-std" else "mean alone"
    packages = ", ".join(f"{name} {version}" for name, version in record.packages.items())
    size = "x".join(map(str, record.latent_shape))
    yield f"latents       {record.num_images}{twins}"
    yield f"latent shape  {size}, {kind}, float16"
    yield f"normalised    (latent - {record.shift:g}) * {record.scale:g}"
    yield f"images        {record.resolution}x{record.resolution}x{record.img_channels}"
    yield f"source        {record.source}, content hash {record.source_hash}"
    yield f"autoencoder   {record.vae}, hash {record.vae_hash}"
    yield f"made with     {record.precision}, x = {record.input_transform}; {packages}"
    yield f"size          {format_count(num_bytes, 'B')} in {len(record.shards)} file(s)"
    yield f"content hash  {dataset.content_hash}"
    yield from _class_lines(dataset.labels, dataset.class_names)


def _class_lines(labels: "np.ndarray | None", class_names: list[str]) -> Iterator[str]:
    import numpy as np

    yield f"classes       {len(class_names) if class_names else 'none (no labels)'}"
    if class_names:
        yield "\nindex   images  name"
        counts = np.bincount(labels, minlength=len(class_names))
        for index, (name, count) in enumerate(zip(class_names, counts, strict=True)):
            yield f"{index:5d} {count:8d}  {name}"
