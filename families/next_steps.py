"""Commands that sample and evaluate a snapshot, which the report of a run lists.

In them ``{network}`` stands for the snapshot and ``{run}`` for the run folder.
"""

import shlex

from training.config import RunConfig

CONDITIONS_STEP = {
    "Measure the effect of each condition": "python fid.py conditions --network={network} "
    "--jsonl={run}/conditions.jsonl"
}
_LEAST_FOR_INCEPTION = 32  # Edge of images below which it has little to look at.


def is_for_inception(run: RunConfig) -> bool:
    """Return whether the images of a run are large enough for metrics by Inception."""
    return run.model.resolution >= _LEAST_FOR_INCEPTION


def generate_step(title: str, request: str) -> dict[str, str]:
    """Return the step that makes images, and a picture of them, of what ``request`` asks for."""
    command = f"python generate.py --network={{network}} --outdir={{run}}/samples {request}"
    return {title: f"{command} --grid={{run}}/samples.png"}


def image_steps(run: RunConfig, data: str | None) -> dict[str, str]:
    """Return the steps of a model that makes images of a class or of none.

    ``data`` is where the images are that it is trained on. Where that is not known, the commands
    have IMAGES.zip in its place.
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
