"""fid.py conditions: the effect of each condition on a model's output."""

import dataclasses
import json
from pathlib import Path

import click

from dnnlib.click_options import overwrites, param, takes
from dnnlib.files import atomic_write


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConditionsOptions:
    network: str = param(required=True, help="Snapshot of a model with conditions.")
    data: str | None = param(help="Images with their conditions.  [default: the training data]")
    num: int = param(default=64, min=2, max=1_000_000, help="Number of images to denoise.")
    batch: int = param(
        default=16, min=1, max=1_000_000, help="Number of images to denoise at a time."
    )
    seed: int = param(default=0, min=0, max=2**32 - 1, help="Seed of the noise.")
    out: Path | None = param(help="File to write the picture of the report to (.png).")
    jsonl: Path | None = param(help="File to write the rows of the report to, one per line.")


@click.command(context_settings=dict(help_option_names=["-h", "--help"]))
@takes(ConditionsOptions)
@overwrites
def command(options: ConditionsOptions) -> None:
    """Measure the effect of each condition: class, support, or text, CLS token and patches.

    Held-out images are denoised at five noise levels, with their own conditions and with one of
    them dropped, shuffled or swapped. How much the output and the loss change shows what the model
    uses. For a feature-conditioned model, the report also shows how attention is divided among the
    conditions. See docs/conditioning.md.

    \b
    Example:
      python fid.py conditions --network=network.pkl --out=report.png
    """
    import families
    from commands.options import check_targets
    from evaluation.conditioning.picture import report_picture
    from evaluation.conditioning.report import describe_report, report_conditions
    from sampling.images import cached_snapshot
    from torch_utils import distributed
    from torch_utils.charts import check_charts
    from torch_utils.pictures import save_image

    check_targets(out=options.out, jsonl=options.jsonl)
    if options.out is not None:
        check_charts("--out")
    device = distributed.init()
    if distributed.world_size() > 1:
        raise ValueError("This report is made by one process; start it without torchrun.")
    snapshot = cached_snapshot(options.network)
    run = snapshot.config
    known = snapshot.data.features
    panel = families.of(run).panel(run, options.data, options.num, device, known)
    report = report_conditions(
        snapshot.build(device),
        run,
        panel,
        device,
        dict(snapshot_hash=snapshot.sha256, network=str(snapshot.path)),
        trained_nimg=snapshot.trained_nimg,
        batch=options.batch,
        seed=options.seed,
    )
    click.echo(f"{report.rows[0]['panel']}\n{describe_report(report)}")
    if options.out is not None:
        title = f"What conditions do in {snapshot.path.name}"
        save_image(report_picture(report, title), options.out)
    if options.jsonl is not None:
        with atomic_write(options.jsonl, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in report.score_rows())
    distributed.shutdown()
