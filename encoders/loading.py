"""Finds and reads frozen networks: Hugging Face ids and folders, tensors only."""

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
# What in a configuration has no influence on what a network computes.
_BOOKKEEPING = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype")
_NO_CONVERSION = "DISABLE_SAFETENSORS_CONVERSION"


class FrozenEncoder:
    """A network that never trains. It computes in float32, or with bfloat16 products.

    Attributes:
        location: Folder or Hugging Face id that it came from.
        sha256: Identity of what it computes.
        device: Where it computes.
        described: Names of further attributes that :meth:`facts` has.
    """

    described: tuple[str, ...] = ()

    def __init__(
        self, network: nn.Module, location: str, device: Device, precision: str, sha256: str
    ) -> None:
        """``precision`` is one of PRECISIONS; raises ValueError for another."""
        if precision not in PRECISIONS:
            raise ValueError(f"Precision {precision!r}; accepted: {', '.join(PRECISIONS)}.")
        self.location = location
        self.sha256 = sha256
        self.device = torch.device(device)
        self._precision = precision
        self._network = network.eval().requires_grad_(False).to(self.device)

    def facts(self) -> dict[str, Any]:
        """Return what a record says of it: where it came from, what it is, how it computes."""
        own = {name: getattr(self, name) for name in self.described}
        return dict(location=self.location, hash=self.sha256, **own, precision=self._precision)

    def _products(self) -> torch.autocast:
        """Return the arithmetic to compute in, whatever autocast the caller is in."""
        enabled = self._precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    def _in_chunks(
        self, function: Callable[[Tensor], Tensor], values: Tensor, size: int, rest: Sequence[int]
    ) -> Tensor:
        """Return ``function`` of all rows, float32 [N, *rest], ``size`` or one at a time."""
        result = torch.empty((len(values), *rest), dtype=torch.float32, device=self.device)
        size = max(size, 1)
        for first in range(0, len(values), size):
            part = values[first : first + size].to(self.device, non_blocking=True)
            result[first : first + size] = function(part)
        return result


E = TypeVar("E", bound=FrozenEncoder)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pretrained:
    """The networks of ``transformers`` that an option names, and how they are read.

    Attributes:
        option: Option that names a folder or a Hugging Face id.
        noun: What it names, for messages.
        makes: What such a network makes, for messages.
        files: What a folder has to hold, for messages.
        extra: Extra of this project that installs the library.
        library: Package with the network's class.
        class_name: Name of that class.
        kinds: Accepted ``model_type`` of ``config.json``.
        attention: The library's implementation of attention.
        pickles: Whether weights may be in a pickle, of which only tensors are read.
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
        """Raise ValueError if there cannot be one; cheap, and blind to what a file holds."""
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

        Only tensors are read, and no code that comes with them. Raises ValueError, one sentence
        with the remedy, if there is none, it is of another kind, or weights are missing.
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
            # Versions before 5 give names alone, later ones names with both shapes.
            misfits = [k if isinstance(k, str) else k[0] for k in info.get("mismatched_keys", ())]
            problems = {"have other shapes than config.json says": misfits}
            for problem, keys in (problems | {"are missing": info["missing_keys"]}).items():
                if keys:
                    names = ", ".join(sorted(keys)[:3])
                    raise ValueError(f"{len(keys)} weights {problem}: {names}")
        return network

    def load(self, location: str) -> nn.Module:
        """Return the network as :meth:`read` does. Collective: rank 0 alone needs the files."""
        box: list[nn.Module] = []

        def read() -> dict[str, Any]:
            box.append(self.read(location))
            return {"config": self._config(box[0]), "state": box[0].state_dict()}

        tree = distributed.on_main_tree(read)
        return box[0] if box else self.rebuild(tree["config"], tree["state"])

    def rebuild(self, config: dict[str, Any], state: dict[str, torch.Tensor]) -> nn.Module:
        """Return the network with these weights; random numbers stay as they are."""
        network_class = getattr(importlib.import_module(self.library), self.class_name)
        with torch.random.fork_rng(devices=[]), quiet(self.library):
            network = self._build(network_class, config)
        network.load_state_dict(state)
        return network

    @contextlib.contextmanager
    def using(self, location: str) -> Iterator[Any]:
        """Yield the library, quiet; anything that it raises becomes one sentence.

        Initial values that are overwritten do not advance this rank's random numbers.
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
        # A missing, damaged or foreign file makes the library raise what has no common base.
        except Exception as error:
            problem = "cannot be used"
            if not os.path.isdir(location):
                problem = "is not a folder, and cannot be fetched from Hugging Face"
            problem += f" ({_reason(error)})"
            raise ValueError(f"{self.option}: {location} {problem}. {self._hint}") from error

    def checked(self, encoder: E, expected_hash: str | None) -> E:
        """Return ``encoder``; raises ValueError if it has another hash than the one expected."""
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
            ignore_mismatched_sizes=True,  # They are refused by name.
        )

    def _config(self, network: nn.Module) -> dict[str, Any]:
        return network.config.to_dict()

    def _build(self, network_class: Any, config: dict[str, Any]) -> nn.Module:
        config = network_class.config_class.from_dict(config)
        return network_class._from_config(config, attn_implementation=self.attention)


def absolute(location: str | os.PathLike) -> str:
    """Return a folder's absolute path, or a Hugging Face id as it is."""
    return os.path.abspath(location) if os.path.isdir(location) else str(location)


def in_turn(read: Callable[[], T]) -> T:
    """Return what ``read`` gives on this rank; rank 0 fetches what the others find on the disk."""
    box = []
    for turn in (True, False):
        with distributed.together():
            if distributed.is_main() == turn:
                box.append(read())
    return box[0]


def identity(network: nn.Module, *others: str) -> str:
    """Return a hash of a network of transformers, its configuration and its weights."""
    config = {k: v for k, v in network.config.to_dict().items() if k not in _BOOKKEEPING}
    text = json.dumps(config, sort_keys=True, default=str)
    parts = (type(network).__name__, text, weights_hash(network.state_dict()), *others)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _reason(error: Exception) -> str:
    """Return the first line of a message, with the next one if it announces that."""
    first, *others = str(error).strip().split("\n")
    if first.rstrip().endswith(":") and others:
        first = f"{first.strip()} {others[0].strip()}"
    return first.strip().rstrip(".:") or type(error).__name__


@contextlib.contextmanager
def quiet(library: str) -> Iterator[None]:
    """Keep reports, warnings and progress bars of a library, and of its downloads, off the console.

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
        os.environ[_NO_CONVERSION] = "1"  # Else the library asks the hub to convert pickles.
        yield
