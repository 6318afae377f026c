"""Datasets as they are usually written, with one file per item that is opened on access."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from data.images.dataset import ImageDataset
from data.latents.dataset import LatentDataset


class PlainPictures(Dataset):
    """Images uint8 [C, H, W] of PNG files, opened with Pillow; labels are the index modulo 10."""

    def __init__(self, source: ImageDataset, folder: Path) -> None:
        self._files = [folder / f"{index:06}.png" for index in range(source.num_images)]
        for index, file in enumerate(self._files):
            file.write_bytes(source.archive.read(index))

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        pixels = np.array(Image.open(self._files[index]))
        pixels = pixels[:, :, None] if pixels.ndim == 2 else pixels
        return torch.from_numpy(pixels).permute(2, 0, 1), index % 10


class PlainLatents(Dataset):
    """Latents float16 [2 C, H, W] of .npy files; labels are the index modulo 10."""

    def __init__(self, source: LatentDataset, folder: Path) -> None:
        shards = [np.load(source.path / shard["file"]) for shard in source.record.shards]
        latents = [row[0] for shard in shards for row in shard]
        self._files = [folder / f"{index:06}.npy" for index in range(len(latents))]
        for file, latent in zip(self._files, latents, strict=True):
            np.save(file, latent)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.from_numpy(np.load(self._files[index])), index % 10
