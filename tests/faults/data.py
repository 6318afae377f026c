"""Faults of data, of what is drawn in each step, and of the conditions that the network gets."""

import dataclasses

import numpy as np
import torch

import data.features.dataset as feature_data
import data.images.dataset as image_data
import data.latents.codec as latent_codec
import data.latents.dataset as latent_data
import data.samplers as samplers
import training.feature_objective as feature_objective
from data.features.codec import FeatureStatistics
from data.fewshot.sets import SetDataset
from diffusion.precond import EDMPrecond
from faults import Fault
from models.conditioners import ClassTable
from models.set_conditioner import SetConditioner
from training.objective import Draws, Objective

ALL = ("digits", "digits-latent", "fsdm-digits", "nanodit-tiny")


def replace(owner, name, make):
    """Put ``make(original)`` in the place of a function of a module or class."""
    setattr(owner, name, make(getattr(owner, name)))


def shuffle_labels():
    """The labels of images are those of other images, as in a wrong list of labels."""

    def make(read):
        def shuffled(archive):
            labels, names = read(archive)
            return np.random.default_rng(1).permutation(labels), names

        return shuffled

    replace(image_data, "read_labels", make)


def shuffle_labels_of_latents():
    """The labels of latents are those of other images."""

    def make(read):
        def shuffled(path, record):
            return np.random.default_rng(1).permutation(read(path, record))

        return shuffled

    replace(latent_data, "read_archive_labels", make)


def shuffle_captions():
    """Every image of a batch has the text of the next one."""

    def make(read):
        def shuffled(self, indices, **how):
            latents, cond = read(self, indices, **how)
            texts = {name: cond[name].roll(1, 0) for name in ("text", "text_mask")}
            return latents, {**cond, **texts}

        return shuffled

    replace(feature_data.FeatureDataset, "__getitems__", make)


def shift_patches():
    """Every patch is the one after it, as with a register token too few."""

    def make(read):
        def shifted(item, bits, target):
            read(item, bits, target)
            target[...] = np.roll(target, -1, axis=0)

        return shifted

    replace(feature_data, "_read_patches", make)


def scale_latents():
    """Latents are multiplied by a scale that they have already."""
    replace(latent_codec, "normalise", lambda old: lambda *args: old(*args) * 0.18215)


def scale_latents_of_features():
    """Latents are normalised as if they were those of another autoencoder."""
    replace(FeatureStatistics, "normalise", lambda old: lambda self, x: old(self, x) / 0.3611)


def scale_visual_features():
    """Visual features are not normalised, and larger by far than normalised ones."""

    def make(normalise):
        def skipped(self, cond):
            found = normalise(self, cond)
            return {**found, "cls": 8 * found["cls"]} if "cls" in found else found

        return skipped

    replace(FeatureStatistics, "normalise_features", make)


def quadruple_sigma_data():
    """The standard deviation of the data is set to four times another one."""

    def make(init):
        def wrong(self, sigma_data=0.5, *args):
            init(self, 4 * sigma_data, *args)

        return wrong

    replace(EDMPrecond, "__init__", make)


def read_in_order():
    """Images come in the order of the files."""
    replace(samplers, "epoch_permutation", lambda old: lambda seed, epoch, num: np.arange(num))


def read_buckets_in_order():
    """Images of a bucket come in the order of the files."""

    def make(permute):
        return lambda self, stream, epoch: np.arange(len(permute(self, stream, epoch)))

    replace(samplers.BucketSampler, "_make_permutation", make)


def repeat_sets():
    """Every set comes eight times in a row."""
    replace(SetDataset, "draw", lambda draw: lambda self, position: draw(self, position // 8))


def share_noise():
    """Every rank takes the rows of rank 0."""
    replace(Draws, "rows", lambda rows: lambda self, start, stop: rows(self, 0, stop - start))


def drop_always():
    """The class is always dropped."""

    def make(draw):
        def dropped(self, step):
            draws = draw(self, step)
            return dataclasses.replace(draws, drop=torch.ones_like(draws.drop))

        return dropped

    replace(Objective, "draw", make)


def drop_features_always():
    """Text and image are always dropped."""

    def make(drop):
        return lambda config, uniform: torch.ones_like(drop(config, uniform))

    replace(feature_objective, "drop_of_uniform", make)


def drop_in_conditioner():
    """The conditioner takes every class for the null class."""

    def make(forward):
        def blind(self, cond, drop=None, num=None):
            return forward(self, cond, torch.ones_like(cond["label"], dtype=torch.bool), num)

        return blind

    replace(ClassTable, "forward", make)


def drop_sets_in_conditioner():
    """The conditioner takes every set for one that is dropped."""

    def make(forward):
        def blind(self, cond, drop=None, num=None):
            rows = len(next(iter(cond.values())))
            return forward(self, cond, torch.ones(rows, dtype=torch.bool), num)

        return blind

    replace(SetConditioner, "forward", make)


def give_one_class():
    """Every image is delivered with the label 0."""

    def make(with_labels):
        def constant(self, images, indices):
            images, cond = with_labels(self, images, indices)
            return images, {name: torch.zeros_like(value) for name, value in cond.items()}

        return constant

    replace(image_data.LabelledDataset, "_with_labels", make)


def give_no_text():
    """The features of texts are zero."""

    def make(normalise):
        def zero(self, cond):
            cond = normalise(self, cond)
            return {**cond, "text": torch.zeros_like(cond["text"])}

        return zero

    replace(FeatureStatistics, "normalise_features", make)


def _fault(plant, expects, *presets, **settings):
    return Fault(name=plant.__name__, presets=presets, expects=expects, plant=plant, **settings)


FAULTS = (
    _fault(shuffle_labels, "labels_shuffled", "digits", "fsdm-digits"),
    _fault(shuffle_labels_of_latents, "labels_shuffled", "digits-latent"),
    _fault(shuffle_captions, "captions_shuffled", "nanodit-tiny"),
    _fault(shift_patches, "patches_shifted", "nanodit-tiny"),
    _fault(scale_latents, "latents_scale", "digits-latent"),
    _fault(scale_latents_of_features, "latents_scale", "nanodit-tiny"),
    _fault(scale_visual_features, "features_scale", "nanodit-tiny"),
    _fault(quadruple_sigma_data, "sigma_data_wrong", "digits", "fsdm-digits"),
    _fault(read_in_order, "unshuffled", "digits", "digits-latent"),
    _fault(read_buckets_in_order, "unshuffled", "nanodit-tiny"),
    _fault(repeat_sets, "unshuffled", "fsdm-digits"),
    _fault(share_noise, "noise_equal", *ALL, ranks=2),
    _fault(drop_always, "condition_dropped", "digits", "digits-latent"),
    _fault(drop_features_always, "condition_dropped", "nanodit-tiny"),
    _fault(drop_in_conditioner, "condition_dropped", "digits-latent"),
    _fault(drop_sets_in_conditioner, "condition_dropped", "fsdm-digits"),
    _fault(give_one_class, "condition_constant", "digits", "digits-latent"),
    _fault(give_no_text, "condition_constant", "nanodit-tiny"),
)
