"""Option names of EDM, StyleGAN3, DiT, diffusers and others, and the equivalent options here."""

_SHARED = {
    "ckpt": "--network",
    "batch-size": "--batch",
    "num-steps": "--steps",
    "output-dir": "--outdir",
    "num-workers": "--workers",
    "mixed-precision": "--precision",
    "fp16": "--precision=fp16 (or bf16)",
    "bf16": "--precision=bf16",
    "gpus": "torchrun --nproc_per_node=N before the script",
    "num-gpus": "torchrun --nproc_per_node=N before the script",
    "local-rank": "torchrun, which gives every process its rank",
}
_TRAIN = {
    "duration": "--kimg, in thousands of images: 200 million (EDM's 200) are --kimg=200000",
    "epochs": "--kimg: epochs x images of the dataset / 1000",
    "num-epochs": "--kimg: epochs x images of the dataset / 1000",
    "num-train-epochs": "--kimg: epochs x images of the dataset / 1000",
    "max-train-steps": "--iters",
    "total-steps": "--iters",
    "train-steps": "--iters",
    "num-steps": "--iters (of training) or --steps (of sampling)",
    "ema": "--ema-kimg, in thousands of images: half a million (EDM's 0.5) is --ema-kimg=500",
    "ema-halflife": "--ema-kimg, in thousands of images",
    "xflip": "--hflip",
    "mirror": "--hflip",
    "random-flip": "--hflip",
    "arch": "--preset",
    "ls": "--loss-scaling",
    "learning-rate": "--lr",
    "warmup": "--lr-rampup, in thousands of images",
    "warmup-steps": "--lr-rampup, in thousands of images",
    "lr-warmup-steps": "--lr-rampup, in thousands of images",
    "lr-scheduler": "--lr-schedule",
    "max-grad-norm": "--clip-grad",
    "grad-clip": "--clip-grad",
    "global-batch-size": "--batch",
    "train-batch-size": "--batch, over all processes",
    "gradient-accumulation-steps": "--batch-gpu; gradients are accumulated up to --batch",
    "ckpt": "--resume (a run) or --transfer (weights)",
    "ckpt-every": "--save-interval",
    "checkpointing-steps": "--save-interval",
    "resume-from-checkpoint": "--resume",
    "log-every": "--log-interval",
    "data-path": "--data",
    "train-data-dir": "--data",
    "results-dir": "--outdir",
    "global-seed": "--seed",
    "class-dropout-prob": "--label-drop",
    "gradient-checkpointing": "--checkpointing",
    "report-to": "--board",
}
_SAMPLE = {
    "net": "--network",
    "gnet": "--guide",
    "guidance": "--cfg-scale",
    "guidance-scale": "--cfg-scale",
    "cfg": "--cfg-scale",
    "num-sampling-steps": "--steps",
    "num-inference-steps": "--steps",
    "solver": "--sampler",
    "scheduler": "--sampler",
    "num-samples": "--num-images",
    "num-fid-samples": "--num-images",
    "max-batch-size": "--batch",
    "per-proc-batch-size": "--batch",
    "images-per-prompt": "--num-images",
}
_INSTEAD = {"cfg-scale": "Feature-conditioned models have --text-scale and --visual-scale."}


def used_here(name: str, *, training: bool = False) -> str | None:
    """Return a sentence that names the equivalent of an unknown option, or None.

    For commands other than train.py (without ``training``), it also recognises train.py's options.
    """
    here = (_TRAIN if training else _SAMPLE).get(name) or _SHARED.get(name)
    if here is not None:
        return f"--{name}: here it is {here}."
    return None if training else _of_training(name)


def _of_training(name: str) -> str | None:
    from configs import PRESETS
    from dnnlib.cli import settings

    for preset, chosen in PRESETS.items():
        if any(name in (own.name, *own.aliases) for own in settings(chosen.run)):
            told = f"--{name}: an option of train.py --preset={preset}, which is not one of these."
            return f"{told} {_INSTEAD[name]}" if name in _INSTEAD else told
    return None
