"""benchmark.py gpu: all measurements on one GPU, without data or downloads."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks import gpu_kernels, gpu_rates, gpu_train
from benchmarks.gpu_report import advice, goals, markdown, merged, read_results, results_for
from benchmarks.gpu_session import Session
from benchmarks.measure import describe_device, device_name
from benchmarks.options import GPU_PARTS, GpuOptions
from dnnlib.errors import refusal
from dnnlib.files import atomic_write, check_target, write_json
from models.attention import AUTO_ATTENTION
from torch_utils import distributed

_PARTS: dict[str, Callable[[Session], dict[str, Any]]] = {
    "gemm": gpu_kernels.measure_gemm,
    "attention": gpu_kernels.measure_attention,
    "train": gpu_train.measure_train,
    "sample": gpu_rates.measure_sample,
    "metrics": gpu_rates.measure_metrics,
    "loading": gpu_rates.measure_loading,
}


def measure(options: GpuOptions) -> None:
    """Measure the requested parts, and write the results of each as soon as it is finished."""
    out, table = options.out, options.out.with_suffix(".md")
    if table == out:
        remedy = "give the name of a JSON file; the table is written beside it"
        raise refusal("--out", out, remedy=remedy)
    for path in (out, table):
        check_target("--out", path)
    read_results(out)
    device = _device(options.dry_run)
    card = device_name(device) + " (dry run)" * options.dry_run
    results = results_for(out, card)
    click.echo(describe_device(device))
    for name in GPU_PARTS if options.part is None else (options.part,):
        part = _measure_part(name, options, device, results["parts"])
        results = merged(results_for(out, card), name, part)
        results["parts"] = {key: results["parts"][key] for key in _PARTS if key in results["parts"]}
        write_json(out, results)
        with atomic_write(table, "w", encoding="utf-8") as file:
            file.write(markdown(results))
        click.echo(f"{name}: {len(part['rows'])} measurements in {part['seconds']:.0f} s")
        for note in part["left_out"]:
            click.echo(f"  left out: {note}")
    _conclude(results["parts"], (out, table))


def _device(dry_run: bool) -> torch.device:
    if dry_run:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError("There is no GPU here; try the command on the CPU with --dry-run.")
    return distributed.init()


def _measure_part(
    name: str, options: GpuOptions, device: torch.device, found: dict[str, Any]
) -> dict[str, Any]:
    click.echo(f"{name} ...")
    session = Session(
        device=device,
        tiny=options.dry_run,
        budget_sec=GPU_PARTS[name],
        found=found,
        folder=str(options.out.absolute().parent),
    )
    result = _PARTS[name](session)
    return dict(
        torch=torch.__version__,
        cuda=torch.version.cuda,
        date=time.strftime("%Y-%m-%d"),
        budget_sec=session.budget_sec,
        seconds=session.budget_sec - session.left_sec,
        left_out=session.left_out,
        **result,
    )


def _conclude(parts: dict[str, Any], files: tuple[Path, Path]) -> None:
    """Print the goals, the defaults that should change, and where the results are."""
    for line in goals(parts):
        click.echo(line)
    lines = advice(parts, AUTO_ATTENTION["cuda"], gpu_train.defaults_of_presets())
    if lines:
        click.echo("Defaults to change:")
    for line in lines or ["Nothing to change."]:
        click.echo(line)
    click.echo(f"Results: {files[0]}, as a table {files[1]}")
