"""Starts a run from the weights of a snapshot, and reports what became of every tensor."""

import dataclasses
import fnmatch
from collections.abc import Callable, Sequence
from pathlib import Path

from dnnlib.errors import refusal
from dnnlib.files import write_json
from models.network import Network
from training.checkpoint import Snapshot

REPORT_FILE = "warm-start.json"
_WRAPPERS = ("module.", "_orig_mod.")
_MIN_SHARE = 0.9


@dataclasses.dataclass(frozen=True)
class Transfer:
    """What became of every tensor of the snapshot and the model, by name."""

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[str, ...]
    share: float  # Share of the model's parameters that are loaded, from 0 to 1.
    source: str
    source_hash: str
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        total = len(self.loaded) + len(self.missing) + len(self.mismatched)
        lines = [
            f"Transfer from {self.source}: {len(self.loaded)} of {total} tensors loaded, "
            f"{self.share:.1%} of the parameters."
        ]
        for title, names in (
            ("Loaded", _by_module(self.loaded)),
            ("Missing (kept as initialised)", self.missing),
            ("Mismatched shape (kept as initialised)", self.mismatched),
            ("Unexpected (not used)", self.unexpected),
        ):
            if names:
                lines.append(f"  {title}: {', '.join(names)}")
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])

    def save(self, run_dir: Path) -> None:
        """Write ``warm-start.json``."""
        write_json(run_dir / REPORT_FILE, dataclasses.asdict(self))

    def refuse_differences(self, allowed: Sequence[str], optional: Sequence[str]) -> None:
        """Raise ValueError for a tensor that is missing, unexpected or of another shape.

        Tensors whose names match patterns in ``allowed`` may be any of these, and those that match
        ``optional`` may be missing. Less than 90% of the parameters is refused in any case.
        """
        for what, names, patterns in (
            ("missing", self.missing, (*allowed, *optional)),
            ("unexpected", self.unexpected, allowed),
            ("of another shape", self.mismatched, allowed),
        ):
            left = _unmatched(names, patterns)
            if left:
                but = f"{left[0]}{_more(left)} of {self.source} would be {what}"
                allow = f"allow it with --transfer-allow='{left[0]}'"
                remedy = f"give a snapshot of the same model, or {allow}"
                raise refusal("--transfer", but=but, remedy=remedy)
        if self.share < _MIN_SHARE:
            gives = f"{self.source} gives only {self.share:.0%} of the parameters of this model"
            needs = f"at least {_MIN_SHARE:.0%} are needed for a warm start"
            raise ValueError(f"--transfer: {gives}; {needs}.")

    def refuse_any_difference(self) -> None:
        """Raise ValueError if the teacher's network is not exactly that of its student."""
        left = (*self.missing, *self.mismatched, *self.unexpected)
        if left:
            first = f"{left[0]}{_more(left)}"
            but = f"{self.source} has a different network than these data need: {first}"
            remedy = "give data of the same classes and size as the teacher's"
            raise refusal("--distill", but=but, remedy=remedy)

    def refuse_poor_match(self, allowed: Sequence[str]) -> None:
        """Raise ValueError for less than 90% of the parameters, unless all others are ``allowed``.

        ``allowed`` has patterns of names.
        """
        left = _unmatched((*self.missing, *self.mismatched), allowed)
        if self.share >= _MIN_SHARE or (allowed and not left):
            return
        but = f"{self.source} gives {self.share:.0%} of the parameters of this model"
        lacks = f" and lacks {left[0]}{_more(left)}" if left else ""
        remedy = "leave out the options that change the model, choose the preset of the snapshot, "
        allow = "or allow the rest to start from scratch with --transfer-allow='*'"
        raise refusal("--transfer", but=but + lacks, remedy=remedy + allow)


def transfer_weights(
    network: Network,
    snapshot: Snapshot,
    *,
    check: Callable[[Transfer], None] = lambda found: None,
    notes: Sequence[str] = (),
) -> Transfer:
    """Copy every tensor whose name and shape agree, and return a report on all tensors.

    ``check`` gets the report before anything is copied, and may raise. Raises ValueError if no
    tensor agrees. The report has ``notes``, and a note for each encoder that differs.
    """
    own = network.state_dict()
    given = {_stripped(name): tensor for name, tensor in snapshot.state_dict.items()}
    loaded = tuple(name for name in own if name in given and given[name].shape == own[name].shape)
    total = sum(tensor.numel() for tensor in own.values())
    found = Transfer(
        loaded=loaded,
        missing=tuple(name for name in own if name not in given),
        unexpected=tuple(name for name in given if name not in own),
        mismatched=tuple(name for name in own if name in given and name not in loaded),
        share=sum(own[name].numel() for name in loaded) / max(total, 1),
        source=str(snapshot.path),
        source_hash=snapshot.sha256,
        notes=(*_other_encoders(network, snapshot), *notes),
    )
    check(found)
    if not loaded:
        raise ValueError(f"--transfer: {snapshot.path} shares no weights with this model.")
    network.load_state_dict({name: given[name] for name in loaded}, strict=False)
    return found


def _unmatched(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    return [n for n in names if not any(fnmatch.fnmatchcase(n, p) for p in patterns)]


def _more(names: Sequence[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def _stripped(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.removeprefix(wrapper).replace(f".{wrapper}", ".")
    return name


def _other_encoders(network: Network, snapshot: Snapshot) -> list[str]:
    here, there = network.config.encoder_hashes, snapshot.config.model.encoder_hashes
    return [
        f"The {what} of the snapshot are those of another encoder."
        for name, what in (("vae", "latents"), ("visual", "visual features"), ("text", "texts"))
        if None not in (here.get(name), there.get(name)) and here[name] != there[name]
    ]


def _by_module(names: Sequence[str]) -> list[str]:
    """Return names, with those of one block (three levels deep) joined, as ``a.b.0.* (12)``."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(".".join(name.split(".")[:3]), []).append(name)
    return [
        found[0] if len(found) == 1 else f"{group}.* ({len(found)})"
        for group, found in groups.items()
    ]
