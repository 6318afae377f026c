"""Tiny random encoders, photographs with captions and feature folders for tests."""

import functools

import torch
from latent_files import tiny_autoencoder
from PIL import Image

BUCKETS = "128x128,160x96,96x160"
# Words that captions of the photographs are of; the tokenizer knows no others.
_WORDS = "a the of in red pink old temple flower roof petals sky wide tall square detail photograph"


def tiny_visual(folder, *, seed=0, patch_size=16, num_registers=4, dim=32):
    """Write a random DINOv3 of two blocks; return its folder."""
    import transformers

    config = transformers.DINOv3ViTConfig(
        patch_size=patch_size,
        num_register_tokens=num_registers,
        hidden_size=dim,
        intermediate_size=2 * dim,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=128,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = transformers.DINOv3ViTModel(config)
        for name, value in network.named_parameters():
            # Initial values are so small that patches would hardly differ.
            if value.ndim > 1:
                torch.nn.init.normal_(value, std=0.02 if "token" in name else 0.1)
    network.save_pretrained(folder)
    return folder


def tiny_text(folder, *, seed=0, dim=32, words=_WORDS):
    """Write a random T5 of two blocks, and a tokenizer of words; return their folder."""
    import tokenizers
    import transformers

    vocabulary = ["<pad>", "</s>", "<unk>", *words.split()]
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="<unk>")
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    config = transformers.T5Config(
        vocab_size=len(vocabulary),
        d_model=dim,
        d_kv=8,
        d_ff=2 * dim,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = transformers.T5EncoderModel(config)
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_encoders(base):
    """Write an autoencoder, a visual and a text encoder to ``base``; return the options of them."""
    vae, visual, text = base / "vae", base / "visual", base / "text"
    if not vae.is_dir():
        tiny_autoencoder(
            vae, latent_channels=16, num_stages=4, scaling_factor=0.3611, shift_factor=0.1159
        )
    if not visual.is_dir():
        tiny_visual(visual)
    if not text.is_dir():
        tiny_text(text)
    return (f"--vae={vae}", f"--visual={visual}", f"--text={text}")


@functools.cache
def photographs():
    """Return two photographs of 640x427, a temple and a flower."""
    from sklearn.datasets import load_sample_images

    return [Image.fromarray(pixels) for pixels in load_sample_images().images]
