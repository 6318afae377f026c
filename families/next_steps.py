"""Commands that sample and evaluate a snapshot, as listed in the report of a run.

They contain ``{network}`` for the snapshot and ``{run}`` for the run folder.
"""

import shlex

from training.config import RunConfig

CONDITIONS_STEP = {
    "Measure the effect of each condition": "python fid.py conditions --network={network} "
    "--jsonl={run}/conditions.jsonl"
}
_LEAST_FOR_INCEPTION = 32  # Pixels a side; smaller images give Inception little to look at.


def is_for_inception(run: RunConfig) -> bool:
    """Return whether the images of a run are large enough for metrics based on Inception."""
    return run.model.resolution >= _LEAST_FOR_INCEPTION


def generate_step(title: str, request: str) -> dict[str, str]:
    """Return the step that generates images and a grid of them, by the options ``request``."""
    command = f"python generate.py --network={{network}} --outdir={{run}}/samples {request}"
    return {title: f"{command} --grid={{run}}/samples.png"}


def image_steps(run: RunConfig, data: str | None) -> dict[str, str]:
    """Return the next steps for a class-conditional or unconditional model.

    ``data`` is the location of its training images; if None, the commands name IMAGES.zip.
    """
    usual = "fid50k_full" if is_for_inception(run) else "fd_pixels"
    metrics = ",".join(run.logging.metrics) or usual
    reals = shlex.quote(run.logging.metrics_ref or data or "IMAGES.zip")
    calc = f"python fid.py calc --network={{network}} --ref={reals} --metrics={metrics}"
    copies = f"--data={shlex.quote(data or 'IMAGES.zip')} --outdir={{run}}/neighbours"
    return {
        **generate_step("Generate 64 images", "--seeds=0-63"),
        "Score it on three sets of seeds, for the noise band": f"{calc} --noise-band=3 "
        "--json={run}/score.json",
        "Look for copies of training images": "python fid.py neighbours --network={network} "
        + copies,
        **(CONDITIONS_STEP if run.model.num_classes else {}),
    }
