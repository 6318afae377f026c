"""Score images against real ones: reference statistics, metrics, and comparisons of scores."""

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import click
import torch

from data.features.record import SPLITS
from data.fewshot.episodes import PROTOCOLS
from dnnlib.cli import ConfigCommand, is_given, raw_value, run
from dnnlib.files import atomic_write, check_target, write_json
from evaluation.conditioning.panel import make_panel
from evaluation.conditioning.picture import report_picture
from evaluation.conditioning.report import describe_report, report_conditions
from evaluation.fewshot import score_fewshot
from evaluation.images import ImageSource, ScoreConfig, open_source, shape_of
from evaluation.in_loop.features import describe_row as describe_test
from evaluation.neighbours import check_neighbours, find_neighbours, write_report
from evaluation.scoring import (
    RealImages,
    check_images,
    dataset_references,
    describe_row,
    make_detectors,
    score_images,
)
from evaluation.validation.config import TESTS
from evaluation.validation.networks import (
    ValidateConfig,
    check_used,
    chosen_tests,
    validate_snapshot,
)
from metrics.features import DETECTORS
from metrics.metric import METRICS, MetricSpec, get_metrics, needed_features
from metrics.reference import save_references
from metrics.rows import compare_rows, read_rows
from sampling.images import AUTOCAST_DTYPES, cached_snapshot
from torch_utils import distributed
from torch_utils.misc import allow_tf32
from torch_utils.pictures import save_image
from training.config import DetectorConfig
from training.samples import open_images

EXAMPLES = """
  # Score a snapshot, generating on the fly, against the data that it was trained on:
  torchrun --standalone --nproc_per_node=8 fid.py calc --network=network.pkl \\
      --ref=datasets/cifar10.zip --metrics=fid50k_full,kid50k_full,pr50k3_full --json=score.json

  # Score a folder of images against published statistics:
  python fid.py calc --images=out --ref=cifar10-32x32.npz --metrics=fid50k_full

  # How much the score of a snapshot depends on the seeds:
  python fid.py calc --network=network.pkl --ref=cifar10.npz --metrics=fid50k_full --noise-band=3
"""


def base_config(args: Sequence[str]) -> ScoreConfig | DetectorConfig:
    """Return the detectors, and the sampling protocol of the snapshot if one is named."""
    network = raw_value(args, "network")
    if network is None and "--help" not in args:
        return DetectorConfig()
    return ScoreConfig.of_snapshot(network)


def option_elsewhere(name: str, config: ScoreConfig | DetectorConfig | None) -> str | None:
    """Return a sentence for a sampling option without a snapshot to sample from."""
    if isinstance(config, DetectorConfig):
        return f"--{name} describes sampling and needs --network; images are scored as they are."
    return None


def parse_metrics(text: str, *, of_supports: bool = False) -> list[MetricSpec]:
    """Return the metrics of a comma-separated list.

    Raises UsageError for one of images made from supports among others, and the reverse.
    """
    specs = get_metrics(name.strip() for name in text.split(","))
    for spec in specs:
        if spec.of_supports and not of_supports:
            raise click.UsageError(f"--metrics: {spec.name} is for fid.py fewshot.")
        if of_supports and not spec.of_supports:
            raise click.UsageError(f"--metrics: {spec.name} is not of images made from supports.")
    return specs


def metric_names(*, of_supports: bool) -> str:
    """Return the names of the metrics of images made from supports, or of the others."""
    return ", ".join(name for name, spec in METRICS.items() if spec.of_supports == of_supports)


def used_detectors(
    config: ScoreConfig | DetectorConfig, names: Collection[str], choice: str
) -> DetectorConfig:
    """Return the options of the detectors; raises ValueError for one that none of them has."""
    detectors = config if isinstance(config, DetectorConfig) else config.detectors
    detectors.check_used(click.get_current_context().meta["given"], names, choice)
    return detectors


def open_given_source(
    config: ScoreConfig | DetectorConfig,
    *,
    network: str | None,
    images: str | None,
    guide: str | None,
    tf32: bool,
    vae: str | None,
    seed: int,
    batch: int,
    precision: str | None,
    shuffled: bool = False,
) -> tuple[ImageSource, torch.device]:
    """Start the processes, and return the images that the options name and this rank's device.

    Raises UsageError unless one source of images is given, with options that it has.
    """
    if (network is None) == (images is None):
        raise click.UsageError("Give either --network or --images.")
    for name in ("seed", "precision", "guide", "vae", "tf32"):
        if images is not None and is_given(name):
            raise click.UsageError(option_elsewhere(name, config))
    device = distributed.init()
    allow_tf32(tf32)
    source = open_source(
        images or network,
        config if network else None,
        device,
        first_seed=seed,
        batch=batch,
        precision=precision,
        guide=guide,
        vae=vae,
        shuffled=shuffled,
    )
    return source, device


batch_option = click.option(
    "--batch", default=64, show_default=True, type=click.IntRange(1), help="Images per rank."
)


def source_options(command: click.Command) -> click.Command:
    """Add the options that say which images are looked at."""
    for option in (
        click.option(
            "--precision", type=click.Choice(list(AUTOCAST_DTYPES)), help="As in training."
        ),
        batch_option,
        click.option("--seed", default=0, show_default=True, help="Seed of the first image."),
        click.option("--tf32", is_flag=True, help="Allow TF32 products on NVIDIA GPUs."),
        click.option("--vae", help="Autoencoder of a latent model, if not where it was."),
        click.option("--guide", help="Second snapshot, to guide away from with --cfg-scale."),
        click.option("--images", help="Folder, zip or .npz of generated images instead."),
        click.option("--network", help="Snapshot to generate images from."),
    ):
        command = option(command)
    return command


@click.group(context_settings=dict(help_option_names=["-h", "--help"]))
def main() -> None:
    """Score images: `ref` keeps what metrics need of real images, `calc` scores images or a
    snapshot against them, `compare` prints scores side by side, `neighbours` looks for copies of
    training images, `fewshot` scores images made from supports of a class, `validate` puts a model
    of text and reference images to tests, `conditions` tells what each condition of a model does.
    """


@main.command(cls=ConfigCommand, base=lambda args: DetectorConfig())
@click.option("--data", required=True, help="Folder, zip or .npz of real images.")
@click.option("--dest", required=True, type=click.Path(path_type=Path), help="The .npz to write.")
@click.option(
    "--metrics",
    default="fid50k_full",
    show_default=True,
    help="Comma-separated; what these need is kept.",
)
@batch_option
def ref(config: DetectorConfig, data: str, dest: Path, metrics: str, batch: int) -> None:
    """Write what metrics need to know of real images: statistics or vectors of features.

    Example: python fid.py ref --data=datasets/cifar10.zip --dest=cifar10.npz
    """
    check_target("--dest", dest)
    if dest.suffix != ".npz":
        raise click.UsageError(f"--dest: got {dest}; the file's name must end with .npz.")
    specs = parse_metrics(metrics)
    needs = needed_features(specs, of_reference=True)
    if not needs:
        raise click.UsageError(f"--metrics: {metrics} compares with no real images.")
    names = {feature.detector for feature in needs}
    used_detectors(config, names, f"--metrics={metrics}")
    device = distributed.init()
    dataset = open_images(data)
    detectors = make_detectors(names, config, shape_of(dataset), device)
    references = dataset_references(dataset, needs, detectors, device, batch)
    if distributed.is_main():
        save_references(dest, references)
        print(f"{len(dataset):,} images: {', '.join(map(str, references))} written to {dest}")
    distributed.shutdown()


@main.command(cls=ConfigCommand, base=base_config, elsewhere=option_elsewhere, examples=EXAMPLES)
@source_options
@click.option("--ref", help="Real images, or statistics (.npz, EDM2's .pkl; URL).")
@click.option(
    "--metrics", required=True, help=f"Comma-separated: {metric_names(of_supports=False)}."
)
@click.option("--num-images", type=click.IntRange(2), help="Instead of the metric's number.")
@click.option(
    "--per-class/--no-per-class",
    default=True,
    show_default=True,
    help="Numbers of each class too, where labels are known.",
)
@click.option(
    "--noise-band",
    type=click.IntRange(2),
    metavar="BLOCKS",
    help="Score this many disjoint blocks of seeds, and give the spread.",
)
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Also write the rows.")
def calc(
    config: ScoreConfig | DetectorConfig,
    ref: str | None,
    metrics: str,
    num_images: int | None,
    per_class: bool,
    noise_band: int | None,
    json_path: Path | None,
    **source_args: Any,
) -> None:
    """Score the images of a snapshot, folder, zip or .npz against real ones.

    Nothing is written but the rows asked for; a snapshot's images never touch the disk.
    """
    if json_path is not None:
        check_target("--json", json_path)
    specs = parse_metrics(metrics)
    names = sorted({spec.feature.detector for spec in specs})
    detector_config = used_detectors(config, names, f"--metrics={metrics}")
    num_blocks = noise_band or 1
    with_reference = [spec.name for spec in specs if spec.has_reference]
    if with_reference and ref is None:
        raise click.UsageError(f"--ref: {with_reference[0]} compares with real images; give them.")
    if ref is not None and not with_reference:
        raise click.UsageError(f"--ref has no effect with --metrics={metrics}; leave it out.")
    source, device = open_given_source(config, **source_args, shuffled=True)
    real = None if ref is None else RealImages(ref)
    real_shape = None if real is None else real.image_shape
    warnings = check_images(specs, source, real_shape, num_images, num_blocks)
    has_classes = source.labels(range(1)) is not None and (real is None or real.knows_classes())
    if is_given("per_class") and per_class and not has_classes:
        raise click.UsageError("--per-class: the images or the reference have no class labels.")
    per_class = per_class and has_classes

    detectors = make_detectors(names, detector_config, source.image_shape, device)
    needs = needed_features(specs, of_reference=True, per_class=per_class)
    references = {}
    if real is not None:
        references = real.references(needs, detectors, device, source_args["batch"])
    rows = score_images(
        specs,
        source,
        references,
        detectors,
        device,
        num_images=num_images,
        per_class=per_class,
        num_blocks=num_blocks,
    )
    rows = [{**row, "warnings": warnings + row["warnings"]} for row in rows]
    if distributed.is_main():
        for row in rows:
            print(describe_row(row))
        if json_path is not None:
            write_json(json_path, {"rows": rows})
    distributed.shutdown()


@main.command(cls=ConfigCommand, base=base_config, elsewhere=option_elsewhere)
@source_options
@click.option("--data", required=True, help="The training images: folder, zip or .npz.")
@click.option("--held-out", help="Real images not trained on, instead of training images left out.")
@click.option(
    "--detector",
    default="inception",
    show_default=True,
    type=click.Choice(DETECTORS),
    help="What distances are taken by.",
)
@click.option("--num-images", type=click.IntRange(1), help="[default: 1000, or all of --images]")
@click.option(
    "--neighbours",
    "k",
    default=4,
    show_default=True,
    type=click.IntRange(1),
    help="Training images shown beside each generated one.",
)
@click.option(
    "--rows", default=16, show_default=True, type=click.IntRange(1), help="In the picture."
)
@click.option("--outdir", required=True, type=click.Path(path_type=Path), help="For the report.")
def neighbours(
    config: ScoreConfig | DetectorConfig,
    data: str,
    held_out: str | None,
    detector: str,
    num_images: int | None,
    k: int,
    rows: int,
    outdir: Path,
    **source_args: Any,
) -> None:
    """Look for copies: the nearest training images of generated ones, beside held-out reals.

    Writes neighbours.png (the images nearest to the training data, each with its neighbours and
    their distances), distances.png (how near, against held-out reals) and neighbours.json.

    Example: python fid.py neighbours --network=network.pkl --data=cifar10.zip --outdir=report
    """
    detector_config = used_detectors(config, [detector], f"--detector={detector}")
    check_target("--outdir", outdir, is_folder=True)
    source, device = open_given_source(config, **source_args)
    dataset = open_images(data)
    unseen = None if held_out is None else open_images(held_out)
    if num_images is None:
        num_images = source.num_images or 1000
    check_neighbours(source, num_images, dataset, k, unseen)
    detectors = make_detectors([detector], detector_config, source.image_shape, device)
    found = find_neighbours(
        source,
        dataset,
        detectors[detector],
        device,
        num_images=num_images,
        num_neighbours=k,
        batch=source_args["batch"],
        held_out=unseen,
    )
    write_report(found, outdir, source, dataset, num_images=num_images, num_rows=rows)
    distributed.shutdown()


@main.command(cls=ConfigCommand, base=base_config, elsewhere=option_elsewhere)
@click.option("--network", required=True, help="Snapshot of a model of sets.")
@click.option("--data", help="What it was trained on, if not where it was then.")
@click.option("--transfer", help="Another labelled dataset, whose (test) classes are scored too.")
@click.option(
    "--protocols",
    default="seen,unseen",
    show_default=True,
    help=f"Classes: {', '.join(PROTOCOLS)}; transfer comes with --transfer.",
)
@click.option(
    "--metrics",
    default="fewshot_kid,fewshot_fid,fewshot_pr",
    show_default=True,
    help=f"Comma-separated: {metric_names(of_supports=True)}.",
)
@click.option("--num-images", type=click.IntRange(2), help="[default: 10,000, or as many as reals]")
@click.option(
    "--episodes-per-class",
    type=click.IntRange(1),
    help="Supports of a class.  [default: as use a fifth of its images, up to 20]",
)
@click.option("--seed", default=0, show_default=True, help="Seed of the first image.")
@click.option("--precision", type=click.Choice(list(AUTOCAST_DTYPES)), help="As in training.")
@batch_option
@click.option("--outdir", type=click.Path(path_type=Path), help="For pictures.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Also write the rows.")
def fewshot(
    config: ScoreConfig,
    network: str,
    data: str | None,
    transfer: str | None,
    protocols: str,
    metrics: str,
    num_images: int | None,
    episodes_per_class: int | None,
    seed: int,
    precision: str | None,
    batch: int,
    outdir: Path | None,
    json_path: Path | None,
) -> None:
    """Score images that a model makes from supports, against images of the same classes.

    Seen classes are those trained on, with images that were not; unseen ones were never trained on.
    No image is compared with that is in a support. Numbers are for each class too, and the distance
    to the nearest image of the support tells copies.

    Example: python fid.py fewshot --network=network.pkl --transfer=mini-imagenet.zip --outdir=out
    """
    specs = parse_metrics(metrics, of_supports=True)
    names = [name.strip() for name in protocols.split(",") if name.strip()]
    unknown = [name for name in names if name not in PROTOCOLS]
    if unknown:
        raise click.UsageError(f"--protocols: got {unknown[0]}; accepted: {', '.join(PROTOCOLS)}.")
    names += ["transfer"] if transfer is not None else []
    if not names:
        raise click.UsageError("--protocols: there is nothing to score; name some.")
    for option, path in (("--json", json_path), ("--outdir", outdir)):
        if path is not None:
            check_target(option, path, is_folder=path is outdir)
    used_detectors(config, {spec.feature.detector for spec in specs}, f"--metrics={metrics}")
    snapshot = cached_snapshot(network)
    if snapshot.config.sets is None:
        raise click.UsageError(f"--network: {network} was not trained on sets of images.")
    device = distributed.init()
    rows = []
    for found in score_fewshot(
        snapshot,
        config,
        specs,
        device,
        protocols=names,
        data=data,
        transfer=None if transfer is None else open_images(transfer),
        num_images=num_images,
        episodes_per_class=episodes_per_class,
        first_seed=seed,
        batch=batch,
        precision=precision,
        outdir=outdir,
    ):
        distributed.print0(found.describe())
        rows += [dict(row, copying=found.copying) for row in found.rows]
    if json_path is not None and distributed.is_main():
        write_json(json_path, {"rows": rows})
    distributed.shutdown()


@main.command(
    cls=ConfigCommand,
    base=lambda args: ValidateConfig.of_snapshot(raw_value(args, "network")),
    elsewhere=option_elsewhere,
)
@click.option("--network", required=True, help="Snapshot of a model of features.")
@click.option("--data", help="Its feature folder, if not where it was in training.")
@click.option(
    "--split",
    default="validation",
    show_default=True,
    type=click.Choice(SPLITS),
    help="Which of its images; those of train were seen in training.",
)
@click.option(
    "--tests", default=",".join(TESTS), show_default=True, help="Comma-separated, in this order."
)
@click.option("--vae", help="Autoencoder, if not where it was.")
@click.option("--visual", help="Visual encoder, if not where it was.")
@click.option("--text", help="Text encoder, if not where it was.")
@click.option("--precision", type=click.Choice(list(AUTOCAST_DTYPES)), help="As in training.")
@click.option("--tf32", is_flag=True, help="Allow TF32 products on NVIDIA GPUs.")
@click.option(
    "--outdir", required=True, type=click.Path(path_type=Path), help="For rows and pictures."
)
def validate(config: ValidateConfig, outdir: Path, tests: str, tf32: bool, **options: Any) -> None:
    """Put a model of features to tests on held-out images: does it use text and reference?

    Writes validation.json and a picture for each test: images made again from their own features
    (LPIPS, and the cosine of their patch features), with another's reference, with words of their
    text replaced, from their text alone, and guided by either condition. What cannot be measured,
    because weights are not there, is absent with the reason.

    Example: python fid.py validate --network=network.pkl --data=photos-features --outdir=report
    """
    names = [name.strip() for name in tests.split(",") if name.strip()]
    chosen = chosen_tests(names, option="--tests", prefix="")
    if not chosen:
        raise click.UsageError("--tests: there is nothing to do; name some.")
    check_used(click.get_current_context().meta["given"], chosen, f"--tests={','.join(chosen)}")
    for name, test in (("visual", "reconstruction"), ("text", "text_edit")):
        if options[name] is not None and test not in chosen:
            raise click.UsageError(f"--{name}: only the test {test} encodes anything with it.")
    check_target("--outdir", outdir, is_folder=True)
    device = distributed.init()
    allow_tf32(tf32)
    rows, pictures = validate_snapshot(config.with_tests(chosen), device, **options)
    if distributed.is_main():
        for row in rows:
            print("\n".join([describe_test(row), *(f"  warning: {w}" for w in row["warnings"])]))
        for name, picture in pictures.items():
            save_image(picture, outdir / f"{name}.png")
        write_json(outdir / "validation.json", {"rows": rows})
    distributed.shutdown()


@main.command()
@click.option("--network", required=True, help="Snapshot of a model with conditions.")
@click.option("--data", help="Images with their conditions, if not those of the training.")
@click.option("--num", default=64, show_default=True, type=click.IntRange(2), help="Images.")
@click.option("--batch", default=16, show_default=True, type=click.IntRange(1), help="At once.")
@click.option("--seed", default=0, show_default=True, help="Of the noise.")
@click.option("--out", type=click.Path(path_type=Path), help="Picture of the report (.png).")
@click.option("--jsonl", type=click.Path(path_type=Path), help="Rows of the report, one a line.")
def conditions(
    network: str,
    data: str | None,
    num: int,
    batch: int,
    seed: int,
    out: Path | None,
    jsonl: Path | None,
) -> None:
    """Tell what each condition of a model does: class, support, or text, CLS token and patches.

    Held-out images are denoised at five noise levels, with their own conditions and with one of
    them dropped, shuffled or swapped. How much output and loss change tells what the model uses;
    of models of features also how attention divides. See docs/conditioning.md.

    \b
    Example:
      python fid.py conditions --network=network.pkl --out=report.png
    """
    for option, path in (("--out", out), ("--jsonl", jsonl)):
        if path is not None:
            check_target(option, path)
    device = distributed.init()
    if distributed.world_size() > 1:
        raise ValueError("This report is made by one process; start it without torchrun.")
    snapshot = cached_snapshot(network)
    report = report_conditions(
        snapshot, make_panel(snapshot, data, num, device), device, batch=batch, seed=seed
    )
    click.echo(report.rows[0]["panel"])
    click.echo(describe_report(report))
    if out is not None:
        save_image(report_picture(report, f"What conditions do in {snapshot.path.name}"), out)
    if jsonl is not None:
        with atomic_write(jsonl, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in report.score_rows())
    distributed.shutdown()


@main.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--anyway", is_flag=True, help="Print rows of different protocols side by side.")
def compare(files: tuple[Path, ...], anyway: bool) -> None:
    """Print score rows (.jsonl of a run, .json of calc) side by side.

    Rows of a metric whose protocols differ are refused, with the fields in which they do.

    Example: python fid.py compare runs/00000-a/metric-fid50k_full.jsonl score.json
    """
    print(compare_rows([row for path in files for row in read_rows(path)], anyway=anyway))


if __name__ == "__main__":
    run(main)
