"""Names of published weights, and how they become the weights of a network."""

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
# What training code wraps names in.
_WRAPPERS = ("module.", "_orig_mod.")


@dataclasses.dataclass(frozen=True)
class Source:
    """Where one tensor of a network comes from.

    Attributes:
        own: Its name in the network.
        names: Published names of what it is made of.
        shapes: Returns the published shapes for the shape that it has.
        make: Returns it, from the published tensors.
    """

    own: str
    names: tuple[str, ...]
    shapes: Callable[[Shape], tuple[Shape, ...]]
    make: Callable[..., Tensor]


@dataclasses.dataclass(frozen=True)
class Constant:
    """A published tensor that a network here makes itself, and what it must then hold."""

    value: Tensor
    problem: str  # What other values are, for a message.
    is_optional: bool = False


class Layout(abc.ABC):
    """The names of one kind of published weights.

    Attributes:
        title: Of what code the weights are, for messages.
        marker: A published name that no other layout has.
        needs_data: Whether a snapshot needs what a folder of training data knows.
    """

    title: str
    marker: str
    needs_data: ClassVar[bool] = False

    def rename(self, name: str) -> str:
        """Return the name in this layout of a file's tensor, without what varies."""
        return stripped(name)

    def settings(self, shapes: Mapping[str, Shape]) -> dict[str, Any]:
        """Return the settings of a model that the published code has, or that names tell.

        Raises ValueError for weights of a form that no model here has.
        """
        return {}

    @abc.abstractmethod
    def sources(self, config: Any) -> Sequence[Source]:
        """Return where each tensor of the network of ``config`` comes from."""

    def constants(self, config: Any) -> dict[str, Constant]:
        """Return what is published beside the weights."""
        return {}

    def features(self, known: Any) -> Any:
        """Return what a snapshot keeps of stored features, as the published code takes them.

        ``known`` is what it would keep by itself: nothing for a model without features.
        """
        return known

    def is_unused(self, name: str, config: Any) -> bool:
        """Return whether a tensor is known, and takes no part in what the model computes."""
        return False


def stripped(name: str) -> str:
    """Return a name without what training code wraps around modules."""
    for wrapper in _WRAPPERS:
        name = name.removeprefix(wrapper).replace(f".{wrapper}", ".")
    return name


def published_shapes(layout: Layout, config: ModelConfig) -> dict[str, Shape]:
    """Return the shape of every published tensor of a model, optional ones too."""
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

    Raises ValueError that lists all missing, unexpected and mismatched names, or if the constants
    among the tensors are not those of this network.
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
    """Return the family of whose layout some names are, or None."""
    for family, layout in layouts.items():
        if any(layout.rename(name) == layout.marker for name in names):
            return family
    return None


# Sources of the usual kinds.


def same(own: str, name: str) -> Source:
    """Return the source of a tensor that has only another name."""
    return Source(own, (name,), lambda shape: (shape,), lambda value: value)


def filled(own: str, make: Callable[[], Tensor]) -> Source:
    """Return the source of a tensor that is not published."""
    return Source(own, (), lambda shape: (), make)


def both(own: str, name: str) -> tuple[Source, Source]:
    """Return the sources of the weight and the bias of a layer that has another name."""
    return same(f"{own}.weight", f"{name}.weight"), same(f"{own}.bias", f"{name}.bias")


def reordered(source: Source, order: Sequence[int]) -> Source:
    """Return a source whose rows are blocks of equal size in another order.

    Block ``i`` is the published block ``order[i]``.
    """

    def make(*tensors: Tensor) -> Tensor:
        blocks = source.make(*tensors).chunk(len(order))
        return torch.cat([blocks[index] for index in order])

    return dataclasses.replace(source, make=make)
