"""Layouts of published weights: their names, and how they become the weights of a network."""

import abc
import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from models import ModelConfig, build_network
from models.network import Network

Shape = tuple[int, ...]
_MAX_LISTED = 5
# Prefixes that wrappers in training code add to names.
_WRAPPERS = ("module.", "_orig_mod.")


@dataclasses.dataclass(frozen=True)
class Source:
    """How one tensor of a network is made from published tensors.

    Attributes:
        own: Name of the tensor in the network.
        names: Names of the published tensors that it is made from.
        shapes: Returns the shapes of the published tensors, given the shape of the network's.
        make: Returns the tensor, given the published ones.
    """

    own: str
    names: tuple[str, ...]
    shapes: Callable[[Shape], tuple[Shape, ...]]
    make: Callable[..., Tensor]


@dataclasses.dataclass(frozen=True)
class Constant:
    """A published tensor that our networks compute themselves, to compare with."""

    value: Tensor  # What the published tensor must hold.
    problem: str  # What any other values are, for the error message.
    is_optional: bool = False  # Whether it may be missing.


class Layout(abc.ABC):
    """The names of one kind of published weights.

    Attributes:
        title: Name of the published code, for messages.
        marker: A published tensor name that no other layout has.
        needs_data: Whether making a snapshot also takes a folder of training data.
    """

    title: str
    marker: str
    needs_data: ClassVar[bool] = False

    def rename(self, name: str) -> str:
        """Return the name in this layout of a tensor in a file: without parts that vary."""
        return stripped(name)

    def settings(self, shapes: Mapping[str, Shape]) -> dict[str, Any]:
        """Return the model settings that the published code fixes, or that ``shapes`` reveal.

        ``shapes`` are the published shapes by name. Raises ValueError for weights of a form that no
        model here has.
        """
        return {}

    @abc.abstractmethod
    def sources(self, config: Any) -> Sequence[Source]:
        """Return the source of each tensor of the network of ``config``."""

    def constants(self, config: Any) -> dict[str, Constant]:
        """Return the tensors that are published besides the weights, by name."""
        return {}

    def features(self, known: Any) -> Any:
        """Return the facts on stored features that a snapshot keeps, changed to fit these weights.

        ``known`` are those of the training data; there are none for a model without features.
        """
        return known

    def is_unused(self, name: str, config: Any) -> bool:
        """Return whether a published tensor has no influence on what the model computes."""
        return False


def stripped(name: str) -> str:
    """Return a name without the prefixes that wrappers in training code add."""
    for wrapper in _WRAPPERS:
        name = name.removeprefix(wrapper).replace(f".{wrapper}", ".")
    return name


def published_shapes(layout: Layout, config: ModelConfig) -> dict[str, Shape]:
    """Return the shape of every published tensor of a model by name, optional ones included."""
    with torch.device("meta"):
        own = build_network(config).state_dict()
    shapes = {}
    for source in layout.sources(config):
        found = source.shapes(tuple(own[source.own].shape))
        shapes |= dict(zip(source.names, found, strict=True))
    constants = layout.constants(config).items()
    return shapes | {name: tuple(constant.value.shape) for name, constant in constants}


def network_of_published(
    layout: Layout, tensors: Mapping[str, Tensor], config: ModelConfig
) -> Network:
    """Return a network of ``config`` with published weights, in float32.

    Raises ValueError, which counts missing, unexpected and mismatched names and lists the first of
    each, or if a constant among the tensors has other values than in this network.
    """
    constants = layout.constants(config)
    tensors = {n: value for n, value in tensors.items() if not layout.is_unused(n, config)}
    _check_names(tensors, published_shapes(layout, config), constants)
    for name, constant in constants.items():
        if name in tensors:
            value = tensors[name].to(constant.value.dtype)
            if not torch.allclose(value, constant.value, atol=1e-4):
                raise ValueError(f"{name} holds {constant.problem}.")
    tensors = {name: value.to(torch.float32) for name, value in tensors.items()}
    network = build_network(config)
    state = {}
    for source in layout.sources(config):
        state[source.own] = source.make(*(tensors[name] for name in source.names))
    network.load_state_dict(state)
    return network


def _check_names(
    tensors: Mapping[str, Tensor], shapes: Mapping[str, Shape], constants: Mapping[str, Constant]
) -> None:
    optional = {name for name, constant in constants.items() if constant.is_optional}
    others = {
        "missing": [n for n in shapes if n not in tensors and n not in optional],
        "unexpected": [n for n in tensors if n not in shapes],
        "of another shape": [
            f"{name} {list(tensors[name].shape)} instead of {list(shape)}"
            for name, shape in shapes.items()
            if name in tensors and tuple(tensors[name].shape) != shape
        ],
    }
    problems = []
    for title, names in others.items():
        if names:
            listed = ", ".join(names[:_MAX_LISTED])
            rest = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
            problems.append(f"{len(names)} {title}: {listed}{rest}")
    if problems:
        raise ValueError(f"the weights are not of this model; {'; '.join(problems)}.")


def layout_of(names: Collection[str], layouts: Mapping[str, Layout]) -> str | None:
    """Return the family whose layout has its marker among ``names``; None if no layout has."""
    for family, layout in layouts.items():
        if any(layout.rename(name) == layout.marker for name in names):
            return family
    return None


# The usual kinds of sources.


def same(own: str, name: str) -> Source:
    """Return the source of a tensor that differs in its name alone."""
    return Source(own, (name,), lambda shape: (shape,), lambda value: value)


def filled(own: str, make: Callable[[], Tensor]) -> Source:
    """Return the source of a tensor that is not published; ``make`` returns its value."""
    return Source(own, (), lambda shape: (), make)


def both(own: str, name: str) -> tuple[Source, Source]:
    """Return the sources of a layer's weight and bias, which differ in their names alone."""
    return same(f"{own}.weight", f"{name}.weight"), same(f"{own}.bias", f"{name}.bias")


def reordered(source: Source, order: Sequence[int]) -> Source:
    """Return ``source`` with its rows, as ``len(order)`` blocks of equal size, in another order.

    Block ``i`` becomes the published block ``order[i]``.
    """

    def make(*tensors: Tensor) -> Tensor:
        blocks = source.make(*tensors).chunk(len(order))
        return torch.cat([blocks[index] for index in order])

    return dataclasses.replace(source, make=make)
