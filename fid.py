"""Score images against real ones, and evaluate what a model has learned."""

import click

from dnnlib.click_options import LazyGroup
from dnnlib.program import run


@click.group(
    cls=LazyGroup,
    package="commands",
    summaries={
        "ref": "Write reference statistics of real images.",
        "calc": "Score a snapshot, or images in files, against real images.",
        "sweep": "Search for the best guidance, steps and weight average.",
        "compare": "Print scores side by side.",
        "neighbours": "Look for copies of training images among generated ones.",
        "fewshot": "Score images that a set-conditioned model makes from supports.",
        "validate": "Test a feature-conditioned model on held-out images.",
        "conditions": "Measure the effect of each condition of a model.",
        "curves": "Write what is normal for a configuration, from runs with several seeds.",
        "check": "Check whether a run is normal.",
        "report": "Show one training run, or several side by side, on a page.",
    },
)
def main() -> None:
    """Score images against real ones, and evaluate what a model has learned.

    \b
    Examples:
      python fid.py ref --data=datasets/cifar10.zip --dest=cifar10.npz
      python fid.py calc --network=network.pkl --ref=cifar10.npz --metrics=fid50k_full
      python fid.py sweep --network=network.pkl --ref=cifar10.npz --metrics=fid50k_full \\
          --cfg-scale=1:3:0.25 --steps=9,18,32 --outdir=sweep
      python fid.py compare runs/00000-a/metric-fid50k_full.jsonl score.json
      python fid.py neighbours --network=network.pkl --data=datasets/cifar10.zip --outdir=copies
      python fid.py report runs/00000-a runs/00001-b --out=comparison.html
      python fid.py check runs/00000-a

    \b
    Each command explains its options and shows examples: python fid.py calc --help
    """


if __name__ == "__main__":
    run(main)
