"""The effect of each condition on output and loss when it is dropped, shuffled or swapped."""

import contextlib
import dataclasses
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from data.images.dataset import Cond
from diffusion.denoiser import AUTOCAST_DTYPES, Denoiser, autocast
from diffusion.precond import make_precond
from dnnlib.errors import NotFiniteError
from dnnlib.progress import progress
from evaluation.conditioning.panel import Condition, Group, Panel, derangement
from models.attention_probe import AttentionMass, record_attention
from models.network import Network
from torch_utils.fingerprints import package_versions
from torch_utils.rng import SeededNoise
from training.config import RunConfig

CHANGES = ("dropped", "shuffled", "swapped")
QUANTILES = (0.1, 0.3, 0.5, 0.7, 0.9)  # Of the noise levels in training.
ALL_LEVELS = "all"  # Value of ``sigma`` in rows that average over noise levels.


@dataclasses.dataclass(frozen=True)
class Report:
    """Rows of a report, and the attention of each layer to text, CLS token and patches.

    ``attention`` holds shares by name; it is empty for models without such a context.
    """

    rows: list[dict[str, Any]]
    attention: list[dict[str, float]]

    def overall(self) -> list[dict[str, Any]]:
        """Return the rows that average over noise levels, without those that have no value."""
        return [r for r in self.rows if r["sigma"] == ALL_LEVELS and r["value"] is not None]

    def score_rows(self) -> list[dict[str, Any]]:
        """Return the report as score rows: those of the conditions, and one for each layer."""
        head = {k: self.rows[0][k] for k in ("panel", "seed", "snapshot_hash", "network")}
        layers = [
            dict(metric="conditioning_attention", layer=index, value=None, values=layer, **head)
            for index, layer in enumerate(self.attention)
        ]
        return [*self.rows, *layers]


def report_conditions(
    network: Network,
    config: RunConfig,
    panel: Panel,
    device: torch.device,
    source: Mapping[str, str],
    *,
    trained_nimg: int,
    batch: int = 16,
    seed: int = 0,
) -> Report:
    """Return how the output and loss of a run's network depend on each condition of a panel.

    At each of five noise levels (quantiles of those in training), every image is denoised with its
    own conditions and, from the same noise, with each of them changed. ``output_change`` is the
    root mean square difference of the outputs, relative to the root mean square deviation of the
    outputs from their mean over images of one size. ``loss_change`` is the relative increase of the
    loss, and ``worse_share`` the share of images whose loss increases. Keys with ``_se`` are
    standard errors over images. Raises NotFiniteError if a loss is not finite.

    Args:
        source: Where the network is from, added to every row.
        trained_nimg: Number of images that the network was trained on.
        batch: Number of images per pass.
        seed: Seed of the noise.
    """
    precond = make_precond(config.precond)
    dtype = AUTOCAST_DTYPES[config.training.precision]
    sigmas = precond.training_levels(QUANTILES)
    found: dict[tuple[str, str], _Changes] = defaultdict(lambda: defaultdict(list))
    masses: list[AttentionMass] = []
    total = len(panel.groups) * len(sigmas)
    bar = progress(total=total, label="Conditions", unit="level", transient=True)
    with torch.inference_mode(), bar:
        for group in panel.groups:
            group = _as_after(config, trained_nimg, group)
            run = _Runs(Denoiser(network, precond, dtype), group, batch, seed)
            for level, sigma in enumerate(sigmas):
                with _probe(network, group) as mass:
                    reference = run(sigma, group.cond)
                masses += [] if mass is None else [mass]
                for condition in panel.conditions:
                    for change, cond, drop, rows in _variations(group, condition):
                        effect = _compare(reference, run(sigma, cond, drop))
                        found[condition.name, change][level].append(effect[:, rows])
                bar.update()
    rows = []
    facts = dict(
        metric="conditioning",
        panel=panel.name,
        seed=seed,
        **source,
        packages=package_versions(),
    )
    for condition in panel.conditions:
        for change in CHANGES:
            parts = found.get((condition.name, change), {})
            rows += _rows(condition, change, parts, sigmas, facts)
    return Report(rows, _mean_attention(masses))


def _as_after(config: RunConfig, trained_nimg: int, group: Group) -> Group:
    """Return a group with the conditions that depend on training progress added."""
    inputs = group.inputs
    values = config.cond_after(trained_nimg, tuple(inputs.shape[1:]))
    cond = {name: inputs.new_full((len(inputs),), value) for name, value in values.items()}
    return dataclasses.replace(group, cond={**group.cond, **cond})


# By noise level, an array [3, n] for each group: change of the output, loss, loss before.
_Changes = dict[int, list[np.ndarray]]


class _Runs:
    """Denoises the images of a group, always from the same noise, under any conditions."""

    def __init__(self, denoise: Denoiser, group: Group, batch: int, seed: int) -> None:
        self._denoise, self._inputs, self._batch = denoise, group.inputs, batch
        seeds = [seed * 2**20 + row for row in range(len(group.inputs))]
        self._noise = SeededNoise(seeds, group.inputs.device).randn(group.inputs.shape[1:])

    def __call__(
        self, sigma: float, cond: Cond, drop: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return denoised images [N, C, H, W] and their losses [N], float32 on the CPU.

        Conditions are dropped where ``drop``, bool [N] or [N, K], is true.
        """
        denoise, parts = self._denoise, []
        weight = denoise.precond.weight(torch.tensor(sigma)).item()
        for start in range(0, len(self._inputs), self._batch):
            rows = slice(start, start + self._batch)
            images = self._inputs[rows]
            own = {name: v if name == "size" else v[rows] for name, v in cond.items()}
            dropped = None if drop is None else drop[rows]
            with autocast(images.device, denoise.autocast_dtype):
                context = denoise.network.context(own, dropped, num=len(images))
            denoised = denoise(images + sigma * self._noise[rows], sigma, context)
            loss = weight * (denoised - images).square().mean(dim=(1, 2, 3))
            parts.append((denoised.cpu(), loss.cpu()))
        denoised, loss = (torch.cat(values) for values in zip(*parts, strict=True))
        if not loss.isfinite().all():
            raise NotFiniteError("Denoising gave values that are not finite; try another snapshot.")
        return denoised, loss


def _variations(
    group: Group, condition: Condition
) -> Iterator[tuple[str, Cond, torch.Tensor | None, np.ndarray]]:
    """Yield each possible change: its name, conditions, drop mask, and the rows it affects."""
    num, device = len(group.inputs), group.inputs.device
    if condition.reason is None:
        drop = torch.ones(num, dtype=torch.bool, device=device)
        if condition.drop is not None:
            drop = torch.zeros(num, 3, dtype=torch.bool, device=device)
            drop[:, list(condition.drop)] = True
        yield "dropped", group.cond, drop, np.ones(num, bool)
    for change in CHANGES[1:]:
        source, rows = derangement(group.kinds, change)
        if rows.any():
            index = torch.from_numpy(source).to(device)
            changed = {name: group.cond[name][index] for name in condition.entries}
            yield change, {**group.cond, **changed}, None, rows


def _compare(
    reference: tuple[torch.Tensor, torch.Tensor], varied: tuple[torch.Tensor, torch.Tensor]
) -> np.ndarray:
    (own, own_loss), (other, loss) = reference, varied
    mean = own.mean(dim=0) if len(own) > 1 else own.mean()  # A single image equals its mean.
    spread = (own - mean).square().mean().sqrt().clamp(min=1e-12)
    output = (other - own).square().mean(dim=(1, 2, 3)).sqrt() / spread
    return torch.stack([output, loss, own_loss]).numpy()


def _rows(
    condition: Condition,
    change: str,
    found: _Changes,
    sigmas: list[float],
    facts: dict[str, Any],
) -> list[dict[str, Any]]:
    """Return a row that averages over noise levels, and one for each level."""
    head = dict(facts, condition=condition.name, change=change)
    dropped = change == "dropped"
    if dropped and condition.note is not None:
        head["note"] = condition.note
    if not found:
        reason = (dropped and condition.reason) or "no two images of the panel differ in it"
        return [dict(head, sigma=ALL_LEVELS, num=0, value=None, values={}, reason=reason)]
    rows = []
    levels = [(sigmas[level], np.concatenate(own, axis=1)) for level, own in found.items()]
    mean = np.mean([values for _, values in levels], axis=0)
    for sigma, (output, loss, reference) in [(ALL_LEVELS, mean), *levels]:
        rise = (loss - reference) / reference.mean()
        values = dict(
            output_change=float(output.mean()),
            output_change_se=_standard_error(output),
            loss_change=float(rise.mean()),
            loss_change_se=_standard_error(rise),
            worse_share=float((loss > reference).mean()),
        )
        row = dict(head, sigma=sigma, num=len(output), value=values["output_change"])
        rows.append(dict(row, values=values))
    return rows


def _standard_error(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else 0.0


def _probe(
    network: Network, group: Group
) -> contextlib.AbstractContextManager[AttentionMass | None]:
    """Return a recorder of attention to the segments of a group; without any, a null context."""
    if not group.segments:
        return contextlib.nullcontext()
    return record_attention(network.backbone, dict(group.segments))


def _mean_attention(masses: list[AttentionMass]) -> list[dict[str, float]]:
    """Return the shares of attention of each layer, averaged over noise levels and groups."""
    layers = [mass.by_layer() for mass in masses]
    return [
        {name: float(np.mean([layer[name] for layer in same])) for name in same[0]}
        for same in zip(*layers, strict=True)
    ]


def signed_percent(share: float) -> str:
    """Return a share as text such as ``+1.5%``; zero has no sign."""
    text = f"{share:+.1%}"
    return text[1:] if text in ("+0.0%", "-0.0%") else text


def describe_report(report: Report) -> str:
    """Return a report as a text table."""
    lines = [f"{'condition':<14} {'change':<9} {'output':>16} {'loss':>18} {'worse for':>10}"]
    for row in report.rows:
        if row["sigma"] != ALL_LEVELS:
            continue
        start = f"{row['condition']:<14} {row['change']:<9}"
        if row["value"] is None:
            lines.append(f"{start} absent: {row['reason']}")
            continue
        v = row["values"]
        loss = signed_percent(v["loss_change"])
        lines.append(
            f"{start} {v['output_change']:8.3f} ± {v['output_change_se']:5.3f} "
            f"{loss:>10} ± {v['loss_change_se']:5.1%} {v['worse_share']:10.0%}"
            + (f"  ({row['note']})" if "note" in row else "")
        )
    for index, layer in enumerate(report.attention):
        shares = ", ".join(f"{name} {share:.1%}" for name, share in layer.items())
        lines.append(f"attention of layer {index:<3} {shares}")
    return "\n".join(lines)
