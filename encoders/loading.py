"""Reads frozen networks from folders and Hugging Face ids: tensors only, never code."""

import contextlib
import dataclasses
import hashlib
import importlib
import json
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dnnlib.errors import refusal
from torch_utils import distributed
from torch_utils.fingerprints import weights_hash

T = TypeVar("T")
Device = torch.device | str
PRECISIONS = ("fp32", "bf16")
# Entries of a configuration that have no influence on the network's outputs.
_BOOKKEEPING = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype")
_NO_CONVERSION = "DISABLE_SAFETENSORS_CONVERSION"


class FrozenEncoder:
    """A network that is never trained, in float32 or under bfloat16 autocast.

    Attributes:
        location: Folder or Hugging Face id that it was read from.
        sha256: Identity of the function that it computes.
        device: Device that it runs on.
        described: Names of further attributes that :meth:`facts` includes.
    """

    described: tuple[str, ...] = ()

    def __init__(
        self, network: nn.Module, location: str, device: Device, precision: str, sha256: str
    ) -> None:
        """``precision`` is one of :data:`PRECISIONS`; raises ValueError for any other."""
        if precision not in PRECISIONS:
            raise ValueError(f"Precision {precision!r}; accepted: {', '.join(PRECISIONS)}.")
        self.location = location
        self.sha256 = sha256
        self.device = torch.device(device)
        self._precision = precision
        self._network = network.eval().requires_grad_(False).to(self.device)

    def facts(self) -> dict[str, Any]:
        """Return the facts that records store: location, hash, described attributes, precision."""
        own = {name: getattr(self, name) for name in self.described}
        return dict(location=self.location, hash=self.sha256, **own, precision=self._precision)

    def _products(self) -> torch.autocast:
        """Return the autocast of this network's precision, which overrides the caller's."""
        enabled = self._precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    def _in_chunks(
        self, function: Callable[[Tensor], Tensor], values: Tensor, size: int, rest: Sequence[int]
    ) -> Tensor:
        """Return ``function(values)``, float32 [N, *rest], computed on ``size`` rows at a time.

        A ``size`` below 1 counts as 1.
        """
        result = torch.empty((len(values), *rest), dtype=torch.float32, device=self.device)
        size = max(size, 1)
        for first in range(0, len(values), size):
            part = values[first : first + size].to(self.device, non_blocking=True)
            result[first : first + size] = function(part)
        return result


E = TypeVar("E", bound=FrozenEncoder)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pretrained:
    """The kind of network of ``transformers`` that an option names, and how it is read.

    Attributes:
        option: Option whose value is a folder or a Hugging Face id.
        noun: Name of such a network, for messages.
        makes: Name of its outputs, for messages.
        files: Files that a folder must contain, for messages.
        extra: Extra of this project that installs the library.
        library: Package that defines the network's class.
        class_name: Name of that class.
        kinds: Accepted values of ``model_type`` in ``config.json``.
        attention: The library's attention implementation to use.
        pickles: Whether weights may be in a pickle, from which only tensors are read.
    """

    option: str
    noun: str = "encoder"
    makes: str = "features"
    files: str = "config.json and model.safetensors"
    extra: str = "features"
    library: str = "transformers"
    class_name: str
    kinds: tuple[str, ...]
    attention: str = "sdpa"
    pickles: bool = False

    @property
    def _hint(self) -> str:
        return f"Give {self.option}=FOLDER with {self.files}."

    def check_location(self, location: str) -> None:
        """Raise ValueError if ``location`` cannot hold such a network; cheap, reads no weights."""
        if os.path.isdir(location):
            if os.path.isfile(os.path.join(location, "config.json")):
                return
            problem = f"holds no {self.noun} (no config.json)"
        elif location.count("/") != 1 or location[0] in "./~":
            problem = "is neither a folder nor a Hugging Face id"
        else:
            return
        raise ValueError(f"{self.option}: {location} {problem}. {self._hint}")

    def read(self, location: str) -> nn.Module:
        """Return the network of a folder or Hugging Face id, float32 on the CPU.

        Only tensors are read, never code that comes with them. Raises ValueError, with a remedy, if
        the location holds no network or one of another kind, and for missing or misshapen weights.
        """
        self.check_location(location)
        with self.using(location) as library:
            kind = self._kind(location)
            if kind not in self.kinds:
                accepted = " or ".join(self.kinds)
                raise ValueError(f"it holds a model of type {kind!r}, not {accepted}")
            network, info = getattr(library, self.class_name).from_pretrained(
                location, output_loading_info=True, **self._arguments()
            )
            # Versions before 5 list names; later ones list names with both shapes.
            misfits = [k if isinstance(k, str) else k[0] for k in info.get("mismatched_keys", ())]
            problems = {"have other shapes than config.json says": misfits}
            for problem, keys in (problems | {"are missing": info["missing_keys"]}).items():
                if keys:
                    names = ", ".join(sorted(keys)[:3])
                    raise ValueError(f"{len(keys)} weights {problem}: {names}")
        return network

    def load(self, location: str) -> nn.Module:
        """Return the network of :meth:`read` on every rank. Collective: rank 0 reads the files."""
        box: list[nn.Module] = []

        def read() -> dict[str, Any]:
            box.append(self.read(location))
            return {"config": self._config(box[0]), "state": box[0].state_dict()}

        tree = distributed.on_main_tree(read)
        return box[0] if box else self.rebuild(tree["config"], tree["state"])

    def rebuild(self, config: dict[str, Any], state: dict[str, torch.Tensor]) -> nn.Module:
        """Return a network with this configuration and state; leaves the random state unchanged."""
        network_class = getattr(importlib.import_module(self.library), self.class_name)
        with torch.random.fork_rng(devices=[]), quiet(self.library):
            network = self._build(network_class, config)
        network.load_state_dict(state)
        return network

    @contextlib.contextmanager
    def using(self, location: str) -> Iterator[Any]:
        """Yield the library, with its output silenced and its errors turned into a ValueError.

        The random state is restored afterwards: initial values that are overwritten do not advance
        it. Raises ValueError if the library is not installed.
        """
        try:
            library = importlib.import_module(self.library)
        except ModuleNotFoundError as error:
            raise refusal(
                self.option,
                but=f"the {self.noun} needs the package {error.name}, which is not installed",
                remedy=f'pip install {error.name}, or pip install -e ".[{self.extra}]"',
            ) from None
        try:
            with quiet(self.library), torch.random.fork_rng(devices=[]):
                yield library
        # The library's errors for a missing, damaged or foreign file have no common base.
        except Exception as error:
            problem = "cannot be used"
            if not os.path.isdir(location):
                problem = "is not a folder, and cannot be fetched from Hugging Face"
            problem += f" ({_reason(error)})"
            raise ValueError(f"{self.option}: {location} {problem}. {self._hint}") from error

    def checked(self, encoder: E, expected_hash: str | None) -> E:
        """Return ``encoder``; raises ValueError unless its hash is the one expected, if any is."""
        if expected_hash not in (None, encoder.sha256):
            given = f"{encoder.location} is another {self.noun} ({encoder.sha256[:16]}...)"
            wanted = f"the one whose {self.makes} are in use ({expected_hash[:16]}...)"
            remedy = "give that one's folder or id"
            raise refusal(self.option, but=f"{given} than {wanted}", remedy=remedy)
        return encoder

    def _kind(self, location: str) -> Any:
        from transformers import PretrainedConfig

        return PretrainedConfig.get_config_dict(location)[0].get("model_type")

    def _arguments(self) -> dict[str, Any]:
        weights = dict(weights_only=True) if self.pickles else dict(use_safetensors=True)
        return dict(
            weights,
            trust_remote_code=False,
            attn_implementation=self.attention,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,  # :meth:`read` refuses them, with their names.
        )

    def _config(self, network: nn.Module) -> dict[str, Any]:
        return network.config.to_dict()

    def _build(self, network_class: Any, config: dict[str, Any]) -> nn.Module:
        config = network_class.config_class.from_dict(config)
        return network_class._from_config(config, attn_implementation=self.attention)


def absolute(location: str | os.PathLike) -> str:
    """Return the absolute path of a folder; a Hugging Face id is returned unchanged."""
    return os.path.abspath(location) if os.path.isdir(location) else str(location)


def identity(network: nn.Module, *others: str) -> str:
    """Return a hash of a ``transformers`` network: class, configuration, weights and ``others``."""
    config = {k: v for k, v in network.config.to_dict().items() if k not in _BOOKKEEPING}
    text = json.dumps(config, sort_keys=True, default=str)
    parts = (type(network).__name__, text, weights_hash(network.state_dict()), *others)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _reason(error: Exception) -> str:
    """Return the first line of an error's message, and the next if the first ends in a colon."""
    first, *others = str(error).strip().split("\n")
    if first.rstrip().endswith(":") and others:
        first = f"{first.strip()} {others[0].strip()}"
    return first.strip().rstrip(".:") or type(error).__name__


@contextlib.contextmanager
def quiet(library: str) -> Iterator[None]:
    """Silence reports, warnings and progress bars of a library and of its downloads.

    ``library`` is ``transformers`` or ``diffusers``.
    """
    from huggingface_hub.utils import logging as hub_logging

    logging = importlib.import_module(f"{library}.utils.logging")
    with contextlib.ExitStack() as after, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for part in (logging, hub_logging):
            after.callback(part.set_verbosity, part.get_verbosity())
        logging.set_verbosity(logging.CRITICAL)
        hub_logging.set_verbosity_error()
        if logging.is_progress_bar_enabled():
            after.callback(logging.enable_progress_bar)
        logging.disable_progress_bar()
        before = {k: v for k, v in os.environ.items() if k == _NO_CONVERSION}
        after.callback(os.environ.update, before)
        after.callback(os.environ.pop, _NO_CONVERSION)
        os.environ[_NO_CONVERSION] = "1"  # Otherwise the library asks the hub to convert pickles.
        yield
