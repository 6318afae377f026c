"""Option values of dataset_tool.py convert, importable without the code behind them."""

SPLITS = ("train", "test", "all")  # Of CIFAR archives, MNIST folders, glyphs and crops.
CIFAR_SPLITS = ("fc100", "cifar-fs")  # Divisions of CIFAR-100's classes for few-shot learning.
TRANSFORMS = ("center-crop", "center-crop-wide", "center-crop-dhariwal")
