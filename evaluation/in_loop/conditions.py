"""Reports on the effect of each condition, made while a run trains."""

import json
from collections.abc import Callable, Sequence
from typing import Any

import torch

from dnnlib.files import atomic_write
from dnnlib.text import format_kimg
from evaluation.conditioning.panel import Panel
from evaluation.conditioning.picture import report_picture
from evaluation.conditioning.report import Report, report_conditions
from torch_utils import distributed
from torch_utils.charts import check_charts
from torch_utils.fingerprints import weights_hash
from torch_utils.pictures import save_image
from training.checkpoint import count_name, snapshot_path
from training.config import RunConfig
from training.family import Evaluator, Outputs


class ConditionsEvaluator:
    """Adds reports on conditions to an evaluator; a :class:`training.family.Evaluator`.

    ``make_panel`` returns the images to denoise; it is called once. Raises ValueError if the
    package that draws the picture is missing.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        config: RunConfig,
        make_panel: Callable[[], Panel],
        device: torch.device,
    ) -> None:
        check_charts("--report-conditions")
        self._evaluator, self._config, self._device = evaluator, config, device
        self._make_panel, self._panel = make_panel, None

    def save_pictures(
        self, generator: Any, outputs: Outputs, cur_nimg: int
    ) -> Sequence[torch.Tensor] | None:
        return self._evaluator.save_pictures(generator, outputs, cur_nimg)

    def score(self, generator: Any, outputs: Outputs, cur_nimg: int) -> None:
        """Score, and write ``conditioning-KIMG.png`` and ``conditioning-KIMG.jsonl``."""
        self._evaluator.score(generator, outputs, cur_nimg)
        outputs.stop_signal.check()
        with distributed.together():
            distributed.on_main(lambda: self._report(generator, outputs, cur_nimg))

    def _report(self, generator: Any, outputs: Outputs, cur_nimg: int) -> None:
        name = f"conditioning-{count_name(cur_nimg)}"
        rows_path = outputs.run_dir / f"{name}.jsonl"
        if rows_path.is_file():
            return
        self._panel = self._panel or self._make_panel()
        network, snapshot = generator.network, snapshot_path(outputs.run_dir, cur_nimg)
        source = dict(snapshot_hash=weights_hash(network.state_dict()), network=str(snapshot))
        run = (network, self._config, self._panel, self._device, source)
        report = report_conditions(*run, trained_nimg=cur_nimg)
        kimg = format_kimg(cur_nimg / 1000)
        picture = report_picture(report, f"What conditions do at kimg {kimg}")
        with outputs.stop_signal.deferred():  # Rows mark the report as done, so they come last.
            save_image(picture, outputs.run_dir / f"{name}.png")
            with atomic_write(rows_path, "w", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in report.score_rows())
        if outputs.telemetry is not None:
            outputs.telemetry.message(f"conditioning: {_strongest(report)} at kimg {kimg}")


def _strongest(report: Report) -> str:
    rows = report.overall()
    if not rows:
        return "the data show no change of a condition whose effect could be measured"
    row = max(rows, key=lambda row: row["value"])
    return f"{row['condition']} {row['change']} changes the output by {row['value']:.3f}"
