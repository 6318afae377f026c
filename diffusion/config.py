"""Settings of preconditioning, sampling and guidance. Needs no torch."""

import dataclasses
from typing import Any, ClassVar, Self

from diffusion import respacing
from dnnlib.config import Config, option
from dnnlib.errors import refusal

# Values of --precision after auto has been resolved.
PRECISIONS = ("fp32", "bf16", "fp16")

# Samplers by their --sampler names; diffusion/samplers.py fills in the values.
SAMPLERS: dict[str, Any] = dict.fromkeys(("heun", "euler", "ddim", "dpmpp_2m", "ddpm"))

# Rules that several options share.
_RANGE: dict[str, Any] = dict(min=1e-8, unless={"grid": ("timesteps", "time")})
_CHURNED: dict[str, Any] = dict(min=0, requires={"sampler": ("heun",)}, unless={"s_churn": (0.0,)})
_IF_GUIDED: dict[str, Any] = dict(unless={"cfg_scale": (1.0,)})


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrecondConfig(Config):
    """Parametrization of the denoiser and its training noise; defaults are EDM's."""

    title: ClassVar[str] = "Preconditioning"

    precond: str = option(
        "edm",
        choices=("edm", "vp", "ve", "iddpm", "ddpm", "flow"),
        help="Parametrization of the denoiser, with its noise density and loss weight.",
    )
    diffusion_steps: int = option(
        1000,
        min=25,
        max=1_000_000,
        requires={"precond": ("ddpm",)},
        help="Timesteps of the linear schedule.",
    )
    learned_variance: bool = option(
        False,
        requires={"precond": ("ddpm", "iddpm")},
        help="Learn the variance of ancestral steps as a second output.",
    )
    sigma_data: float = option(
        0.5, min=1e-3, requires={"precond": ("edm",)}, help="Standard deviation of the data."
    )
    P_mean: float = option(
        -1.2, name="p-mean", requires={"precond": ("edm",)}, help="Mean of ln(sigma) in training."
    )
    P_std: float = option(
        1.2,
        min=0,
        name="p-std",
        requires={"precond": ("edm",)},
        help="Standard deviation of ln(sigma) in training.",
    )
    logit_mean: float = option(
        0.0, requires={"precond": ("flow",)}, help="Mean of ln(t / (1 - t)) in training."
    )
    logit_std: float = option(
        1.0,
        min=0,
        requires={"precond": ("flow",)},
        help="Standard deviation of ln(t / (1 - t)) in training.",
    )
    flow_shift: float = option(
        1.0,
        min=1e-3,
        requires={"precond": ("flow",)},
        help="Shift s of the times in training, s t / (1 + (s - 1) t); above 1: more noise.",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig(Config):
    """Sampler and noise levels; defaults are EDM's for 32x32 images.

    With ``respacing``, ``steps`` becomes the number of timesteps that it names.
    """

    title: ClassVar[str] = "Sampling"
    affects: ClassVar[str] = "speed"

    sampler: str = option("heun", choices=SAMPLERS, help="Sampler that goes from noise to images.")
    steps: int = option(
        18,
        min=1,
        max=100_000,
        requires={"respacing": (None,)},
        help="Number of sampling steps.",
    )
    grid: str = option(
        "karras",
        choices=("karras", "linear", "vp", "ve", "iddpm", "timesteps", "time"),
        name="sigma-grid",
        help="Spacing of the noise levels; timesteps: evenly over the timesteps of ddpm or iddpm; "
        "time: evenly over the time of a flow, from 1 (noise) to 0.",
    )
    respacing: str | None = option(
        None,
        aliases=("timestep-respacing",),
        requires={"grid": ("timesteps",)},
        help="Timesteps to visit, in the notation of published samplers, instead of --steps. "
        "ddim50: every 20th of 1,000, from 980 down to 0; 250: that many, evenly spaced; 10,10,5: "
        "that many from each third, lowest noise first.",
    )
    grid_steps: int | None = option(
        None,
        min=1,
        max=100_000,
        requires={"respacing": (None,)},
        unless={"grid": ("time",)},
        help="Number of steps in a finer grid; --steps then visits every k-th of its noise "
        "levels, as distilled students do. none: --steps.",
    )
    sigma_min: float = option(
        0.002, **_RANGE, help="Lowest noise level before 0; the network's own limit still holds."
    )
    sigma_max: float = option(
        80.0, **_RANGE, help="Highest noise level; the network's own limit still holds."
    )
    rho: float = option(
        7.0, min=1, requires={"grid": ("karras",)}, help="Exponent of the noise levels."
    )
    time_shift: float = option(
        1.0,
        min=1e-3,
        requires={"grid": ("time",)},
        help="Shift s of the times, s t / (1 + (s - 1) t); above 1: more steps at high noise.",
    )
    s_churn: float = option(
        0.0,
        min=0,
        requires={"sampler": ("heun",)},
        unless={"grid": ("time",)},
        help="Stochasticity, spread over the steps; 0 is deterministic.",
    )
    s_min: float = option(0.0, **_CHURNED, help="Lowest noise level with churn.")
    s_max: float | None = option(
        None, **_CHURNED, help="Highest noise level with churn; none: no limit."
    )
    s_noise: float = option(
        1.0, **_CHURNED, help="Standard deviation of the noise that churn adds."
    )
    variance: str = option(
        "small",
        choices=("small", "large"),
        requires={"sampler": ("ddpm",)},
        help="Variance of an ancestral step: the smaller or the larger of DDPM's two choices. A "
        "learned variance replaces it.",
    )
    clip_denoised: bool = option(
        False,
        unless={"grid": ("time",)},
        help="Clip the denoised image to [-1, 1] at every step; for pixel-space models.",
    )
    eta: float = option(
        0.0,
        min=0,
        max=1,
        requires={"sampler": ("ddim",)},
        help="Stochasticity: 0 is deterministic, 1 is ancestral.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.respacing is not None:
            object.__setattr__(self, "steps", respacing.num_steps(self.respacing))
        if self.sigma_min >= self.sigma_max:
            accepted = f"a number below --sigma-max, which is {self.sigma_max:g}"
            raise refusal("--sigma-min", f"{self.sigma_min:g}", accepted=accepted)
        if self.grid == "time" and self.sampler not in ("heun", "euler", "dpmpp_2m"):
            got = f"{self.sampler}, which --sigma-grid=time does not support"
            raise refusal("--sampler", got, accepted="heun, euler or dpmpp_2m")
        if self.grid_steps is not None and self.grid_steps % self.steps:
            but = f"--grid-steps={self.grid_steps} is not a multiple of it"
            raise refusal("--steps", self.steps, but=but, remedy="give a divisor")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GuidanceConfig(Config):
    """Strength of guidance as a function of the noise level; none by default."""

    title: ClassVar[str] = "Guidance"
    affects: ClassVar[str] = "speed"

    cfg_scale: float = option(
        1.0, min=0, help="Guidance scale: 1 is none, above 1 extrapolates, 0 ignores the condition."
    )
    cfg_schedule: str = option(
        "constant",
        choices=("constant", "power-cosine"),
        **_IF_GUIDED,
        help="Schedule of the scale; power-cosine rises from 1 at the highest noise to the full "
        "scale.",
    )
    cfg_power: float = option(
        4.0,
        min=0,
        requires={"cfg_schedule": ("power-cosine",)},
        help="Exponent of power-cosine; a larger one shifts guidance towards lower noise.",
    )
    cfg_channels: int | None = option(
        None,
        min=1,
        max=65_536,
        **_IF_GUIDED,
        help="Guide only this many channels, counted from the first; none: all.",
    )
    cfg_interval: tuple[float, float] | None = option(
        None,
        min=0,
        **_IF_GUIDED,
        help="Guide only at noise levels (sigma) above the first value and up to the second.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cfg_interval is not None and self.cfg_interval[0] >= self.cfg_interval[1]:
            low, high = self.cfg_interval
            accepted = "two noise levels, the lower one first"
            raise refusal("--cfg-interval", f"{low:g},{high:g}", accepted=accepted)

    def switched_off(self) -> Self:
        """Return these settings with guidance off: estimates are the network's own."""
        return dataclasses.replace(self, cfg_scale=1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DualGuidanceConfig(Config):
    """Strength of guidance by two conditions, a text and a reference image."""

    title: ClassVar[str] = "Guidance"
    affects: ClassVar[str] = "speed"

    text_scale: float = option(
        3.0, min=0, help="Guidance scale of the text; 1 is none, 0 ignores it."
    )
    visual_scale: float = option(
        2.5, min=0, help="Guidance scale of the reference image; 1 is none, 0 ignores it."
    )
    guidance_form: str = option(
        "nested",
        choices=("nested", "seed", "joint"),
        help="How the two scales are combined. nested: towards the image, then from there towards "
        "the text; seed: towards each separately; joint: like seed, with a third scale for both "
        "together.",
    )
    joint_scale: float = option(
        1.0,
        min=0,
        requires={"guidance_form": ("joint",)},
        help="Guidance scale for what text and image do together, beyond what each does alone.",
    )

    def switched_off(self) -> Self:
        """Return these settings with guidance off: estimates are the network's own."""
        return dataclasses.replace(self, guidance_form="nested", text_scale=1.0, visual_scale=1.0)
