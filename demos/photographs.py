"""Small captioned photographs and small encoders, to try feature conditioning without downloads.

The photographs are crops of the two that scikit-learn includes, an old temple and a flower. The
visual encoder and the text encoder have the published architectures, but are small and randomly
initialised: even so, their features distinguish images and texts. The autoencoder is trained.
"""

import functools
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from demos.steps import minimise, small_autoencoder

_SUBJECTS = ("temple", "flower")
_PLACES = ("left", "middle", "right")
_HEIGHTS = ("top", "centre", "bottom")
_WORDS = ("the", "of", "near", "far", "wide", "square", *_SUBJECTS, *_PLACES, *_HEIGHTS)
_KL_WEIGHT = 1e-6
_CROP = 96  # Edge of the autoencoder's training crops in pixels.


def write_photographs(
    folder: Path, num: int = 16, sizes: tuple[tuple[int, int], ...] = ((128, 128), (160, 96))
) -> None:
    """Write ``num`` crops as PNG files, each with its caption in a .txt file beside it.

    The crops take the ``sizes`` (width, height) in turn. A caption names distance, shape, subject
    and position, and is unique among up to 36 crops of each size.
    """
    photographs = _photographs()
    folder.mkdir(parents=True, exist_ok=True)
    counts = dict.fromkeys(sizes, 0)
    for index in range(num):
        size = sizes[index % len(sizes)]
        number, counts[size] = counts[size], counts[size] + 1
        subject, place = number % 2, number // 2 % 3
        height, far = number // 6 % 3, number // 18 % 2 == 0
        photograph = photographs[subject]
        scale = min(photograph.width / size[0], photograph.height / size[1]) * (0.7 if far else 0.4)
        width, tall = round(size[0] * scale), round(size[1] * scale)
        left = round((photograph.width - width) * place / 2)
        top = round((photograph.height - tall) * height / 2)
        crop = photograph.crop((left, top, left + width, top + tall))
        path = folder / f"{index:03d}.png"
        crop.resize(size, Image.Resampling.LANCZOS).save(path)
        words = ("far" if far else "near", "wide" if size[0] > size[1] else "square")
        caption = f"{' '.join(words)} {_SUBJECTS[subject]} {_PLACES[place]} {_HEIGHTS[height]}"
        path.with_suffix(".txt").write_text(caption + "\n", encoding="utf-8")


def write_encoders(folder: Path, *, vae_steps: int = 300) -> tuple[str, str, str]:
    """Write an autoencoder, a visual and a text encoder; return the options that name them.

    Existing ones are kept.
    """
    write_vae = functools.partial(_write_vae, num_steps=vae_steps)
    writers = dict(vae=write_vae, visual=_write_visual, text=_write_text)
    for name, write in writers.items():
        if not (folder / name).exists():
            write(folder / name)
    return tuple(f"--{name}={folder / name}" for name in writers)


def _photographs() -> list[Image.Image]:
    from sklearn.datasets import load_sample_images

    return [Image.fromarray(pixels) for pixels in load_sample_images().images]


def _write_vae(folder: Path, num_steps: int) -> None:
    """Train an AutoencoderKL on the photographs: 8 latent channels, downsampling by 8."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        widths = (16, 32, 48, 48)
        vae = small_autoencoder(block_out_channels=widths, layers_per_block=1, latent_channels=8)
    smaller = []
    for photograph in _photographs():
        size = (photograph.width // 2, photograph.height // 2)
        smaller.append(np.asarray(photograph.resize(size, Image.Resampling.LANCZOS)))
    generator, noise = np.random.default_rng(0), torch.Generator().manual_seed(0)

    def loss() -> torch.Tensor:
        images = torch.stack([_random_crop(smaller, generator) for _ in range(8)])
        posterior = vae.encode(images).latent_dist
        error = (vae.decode(posterior.sample(noise)).sample - images).abs().mean()
        return error + _KL_WEIGHT * posterior.kl().mean()

    minimise(loss, torch.optim.Adam(vae.parameters(), betas=(0.9, 0.99)), num_steps)
    vae.save_pretrained(folder)


def _random_crop(sources: list[np.ndarray], generator: np.random.Generator) -> torch.Tensor:
    source = sources[generator.integers(len(sources))]
    top, left = (int(generator.integers(side - _CROP + 1)) for side in source.shape[:2])
    crop = source[top : top + _CROP, left : left + _CROP]
    return torch.from_numpy(crop.copy()).permute(2, 0, 1).to(torch.float32) / 127.5 - 1


def _write_visual(folder: Path) -> None:
    """Write a randomly initialised DINOv3 ViT: two blocks, 16x16 patches, four registers."""
    import transformers

    sizes = dict(patch_size=16, image_size=128, num_register_tokens=4, hidden_size=64)
    sizes |= dict(intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    config = transformers.DINOv3ViTConfig(**sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = transformers.DINOv3ViTModel(config)
        for name, value in network.named_parameters():
            # With the default initialisation, features would hardly differ between images.
            if value.ndim > 1:
                torch.nn.init.normal_(value, std=0.02 if "token" in name else 0.1)
    network.save_pretrained(folder)


def _write_text(folder: Path) -> None:
    """Write a randomly initialised T5 encoder of two blocks, and a tokenizer for the captions."""
    import tokenizers
    import transformers

    vocabulary = {word: row for row, word in enumerate(("<pad>", "</s>", "<unk>", *_WORDS))}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    sizes = dict(vocab_size=len(vocabulary), d_model=64, d_kv=16, d_ff=128)
    sizes |= dict(num_layers=2, num_heads=4, feed_forward_proj="gated-gelu")
    config = transformers.T5Config(**sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = transformers.T5EncoderModel(config)
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
