"""Conditioner of the set-conditioned DiT: sets of images, and labels, become a context."""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.architectures.set_dit import SetDiTConfig
from models.conditioners import ClassTable, Conditioner
from models.context import Context
from models.layers import unpatchify
from models.set_encoder import SetEncoder, leave_one_out_index

_MAX_LOG_VARIANCE = 10.0


@dataclasses.dataclass(frozen=True)
class SetContext(Context):
    """The context of N images, each of which is conditioned on a set of images."""

    kl: Tensor | None = None  # [N], KL divergence of a variational context from its prior, in nats
    prediction: Tensor | None = None  # [N, C, H, W] in [-1, 1], predictions of the target images
    # While a time-aware encoder waits for the noise level: the tokens of each set [N, ...], which
    # of its images are present [N, k], and whether it is dropped [N].
    set_tokens: Tensor | None = None
    set_mask: Tensor | None = None
    set_drop: Tensor | None = None


class SetConditioner(Conditioner):
    """Encodes sets of images, and embeds class labels.

    The condition is either ``set`` [b, n, C, H, W], for generating these images: it gives N = b n
    contexts, b-major, one for each image from the other images of its set (without leave-one-out,
    from all of them); or ``support`` [N, k, C, H, W], which gives one context per set. Images are
    in [-1, 1]. Further conditions:

    - ``mask``, bool [b, n] or [N, k], true where an image is present; without it, all are. The
      content of absent places has no effect. A set without any image gets a learned null context.
    - ``label``, int64 [b] or [N], for a class-conditional model. The value num_classes stands for
      an unknown class, and so do missing labels.
    - ``context_noise`` [b, n, hdim], standard normal, from which a variational context is drawn;
      without it, the context is the mean of its distribution.
    - ``c_noise`` [b] or [N], for a time-aware encoder. Without it the encoding is put off until
      :meth:`resolve`.

    ``dim`` is the width of a label's embedding.
    """

    def __init__(self, config: SetDiTConfig, dim: int) -> None:
        super().__init__()
        self.config = config
        self.num_classes = config.num_classes
        width = config.encoder_dim
        self.encoder = SetEncoder(config)
        self.is_variational = config.mode_context == "variational"
        if self.is_variational:
            layers = (nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2 * width))
            self.posterior = nn.Sequential(*layers)
        self.projection = nn.Identity()
        if config.context_proj:
            self.projection = nn.Linear(width, config.context_dim)
        if config.reconstructs:
            is_film = config.mode_conditioning == "film"
            self.edge = config.resolution // (1 if is_film else config.context_grid)
            self.reconstruction = nn.Linear(config.context_dim, config.img_channels * self.edge**2)
        # Not zeros: the DiT's normalisation would have its steepest gradient there.
        self.null = nn.Parameter(0.02 * torch.randn(config.context_dim))
        self.null.spares_decay = True
        if self.num_classes > 0:
            self.table = ClassTable(self.num_classes, dim)

    def compile_parts(self, backend: str | Callable) -> None:
        self.encoder.compile(backend=backend)

    def check(self, cond: dict[str, Tensor]) -> None:
        """Raise ValueError without a set or support, or for a label outside 0 to num_classes."""
        if "set" not in cond and "support" not in cond:
            raise ValueError("This model is conditioned on sets of images, but none is given.")
        if "label" in cond and self.num_classes:
            label = cond["label"]
            super().check({"label": label[label != self.num_classes]})

    def forward(
        self, cond: dict[str, Tensor], drop: Tensor | None = None, num: int | None = None
    ) -> SetContext:
        """Return the context of N images; N = b n for the condition ``set``.

        ``drop``, bool [b] or [N], is true where set and label are replaced by their nulls. Raises
        ValueError for a missing set, and for a ``set`` whose size is not ``sample_size``.
        """
        mask = cond.get("mask")
        if "set" not in cond:
            if "support" not in cond:
                self.check(cond)
            images, repeats = cond["support"], 1
            tokens, set_mask = self.encoder.tokenise(images, mask), mask
        else:
            images = cond["set"]
            repeats = images.shape[1]
            if repeats != self.config.sample_size:
                raise ValueError(
                    f"--sample-size: the model is trained on sets of {self.config.sample_size} "
                    f"images, but a set has {repeats}."
                )
            tokens, set_mask = self._tokens_of_sets(images, mask)
        if drop is None:
            drop = torch.zeros(images.shape[0], dtype=torch.bool, device=images.device)
        label = None
        if self.num_classes:
            label = cond.get("label")
            if label is None:
                label = torch.full([images.shape[0]], self.num_classes, device=drop.device)
            label = self.table({"label": label}, drop).vector.repeat_interleave(repeats, dim=0)
        drop = drop.repeat_interleave(repeats)
        if set_mask is not None:
            drop = drop | ~set_mask.any(1)
        found, num = tokens.shape[0], repeats * images.shape[0]
        assert found == num, f"there are tokens of {found} sets, not of {num}"
        context = SetContext(label=label, set_tokens=tokens, set_mask=set_mask, set_drop=drop)
        c_noise = cond.get("c_noise")
        if self.encoder.with_time and c_noise is None:
            return context
        if c_noise is not None:
            c_noise = c_noise.repeat_interleave(repeats)
        noise = cond.get("context_noise")
        return self._encode(context, c_noise, None if noise is None else noise.flatten(0, 1))

    def resolve(self, context: SetContext, c_noise: Tensor) -> SetContext:
        """Return the context, encoded at noise levels ``c_noise`` [N] if that was put off."""
        return context if context.set_tokens is None else self._encode(context, c_noise, None)

    def _tokens_of_sets(self, images: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return for every image of the sets its context's tokens [b n, ...] and mask [b n, k]."""
        num = images.shape[1]
        if self.config.leave_one_out:
            tokens = self.encoder.tokenise_others(images, mask)
            if mask is None:
                return tokens, None
            others = leave_one_out_index(num, mask.device)
            return tokens, mask[:, others].flatten(0, 1)
        tokens = self.encoder.tokenise(images, mask).repeat_interleave(num, dim=0)
        return tokens, None if mask is None else mask.repeat_interleave(num, dim=0)

    def _encode(
        self, context: SetContext, c_noise: Tensor | None, noise: Tensor | None
    ) -> SetContext:
        """Return the encoded context: a vector (``film``) or tokens (``lag``), and the label.

        ``context`` holds the tokens of the sets. ``c_noise`` is [N]; ``noise`` is
        [N, encoder_dim], without which a variational context is its mean.
        """
        config = self.config
        is_film = config.mode_conditioning == "film"
        vector, tokens = self.encoder(
            context.set_tokens, c_noise, context.set_mask, with_tokens=not is_film
        )
        self._check(vector, tokens, context.set_tokens.shape[0])
        kl = None
        if self.is_variational:
            mean, log_variance = self.posterior(vector).float().chunk(2, dim=-1)
            log_variance = log_variance.clamp(-_MAX_LOG_VARIANCE, _MAX_LOG_VARIANCE)
            kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(-1)
            # A dropped context holds no information on its set.
            kl = torch.where(context.set_drop, 0.0, kl)
            vector = mean
            if noise is not None:
                vector = mean + (0.5 * log_variance).exp() * noise
        if is_film:
            vector = self.projection(vector)
            guess = self._predict(vector[:, None])
            vector = torch.where(context.set_drop[:, None], self.null.to(vector.dtype), vector)
            return SetContext(vector=vector, label=context.label, kl=kl, prediction=guess)
        if config.context_pool_size is not None:
            tokens = _pool_grid(tokens, config.grid, config.context_pool_size)
        if self.is_variational:
            # The drawn vector is an additional token and replaces none.
            tokens = torch.cat([tokens, vector.to(tokens.dtype)[:, None]], dim=1)
        tokens = self.projection(tokens)
        guess = self._predict(tokens[:, : config.context_grid**2])
        tokens = torch.where(context.set_drop[:, None, None], self.null.to(tokens.dtype), tokens)
        return SetContext(tokens=tokens, label=context.label, kl=kl, prediction=guess)

    def _predict(self, tokens: Tensor) -> Tensor | None:
        """Return the images [N, C, H, W] predicted from a square grid of tokens [N, M, d].

        None outside of training, and unless the conditioner is pre-trained by reconstruction.
        """
        if not (self.config.reconstructs and self.training):
            return None
        patches = self.reconstruction(tokens)  #                        [N, M, e e C]
        grid = patches.unflatten(1, (round(patches.shape[1] ** 0.5), -1))
        return unpatchify(grid, self.edge)

    def _check(self, vector: Tensor, tokens: Tensor | None, num: int) -> None:
        """Assert the shapes of the encoder's outputs for ``num`` sets."""
        dim, num_patches = self.config.encoder_dim, self.config.grid**2
        assert vector.shape == (num, dim), f"vector is {list(vector.shape)}, not {[num, dim]}"
        expected = [num, num_patches, dim]
        assert tokens is None or list(tokens.shape) == expected, (
            f"tokens are {list(tokens.shape)}, not {expected}"
        )


def _pool_grid(tokens: Tensor, grid: int, num: int) -> Tensor:
    """Return the averages [N, num, d] over equal squares of a token grid [N, grid * grid, d]."""
    edge = round(num**0.5)
    x = tokens.unflatten(1, (grid, grid)).permute(0, 3, 1, 2)
    x = functional.avg_pool2d(x, grid // edge)
    return x.flatten(2).transpose(1, 2)
