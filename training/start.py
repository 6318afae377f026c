"""Where a run goes and what it starts from, checked before anything is loaded."""

import dataclasses
import re
import sys
from collections.abc import Collection
from pathlib import Path

from dnnlib import launcher
from dnnlib.addresses import AddressError, is_address, scheme_of
from dnnlib.config import to_dict
from dnnlib.errors import refusal
from dnnlib.files import check_source, check_target
from training import runs
from training.config import RunConfig
from training.division import check_division, group_size
from training.family import of as family_of
from training.portable import open_header


@dataclasses.dataclass(frozen=True, kw_only=True)
class Start:
    """Where a run goes, and what it starts from or continues."""

    outdir: Path | None = None  # Where run folders are made; needed for a new run.
    resume: str | None = None  # Run folder or state file to continue, or ``auto``.
    transfer: str | None = None  # Snapshot whose weights the run starts from.
    distill: str | None = None  # Snapshot of the teacher, whose weights the first student has.
    desc: str | None = None  # Text to add to the name of the run folder.
    verify_resume: bool = False  # Only test whether a run resumes exactly.

    @property
    def source(self) -> str | None:
        """Snapshot whose weights the run starts from, for transfer or distillation."""
        return self.distill if self.transfer is None else self.transfer

    @property
    def continues(self) -> bool:
        """Whether a particular run is continued."""
        return self.resume not in (None, "auto")

    def check(self, given: Collection[str]) -> None:
        """Raise ValueError for options that exclude each other, do nothing or name missing files.

        ``given`` names the fields of the configuration that were typed.
        """
        if self.transfer is None and "transfer_allow" in given:
            raise ValueError("--transfer-allow has no effect without --transfer; leave it out.")
        if self.distill is None and not self.continues:
            for name in sorted(given):
                if name.startswith("distill_"):
                    option = name.replace("_", "-")
                    raise ValueError(f"--{option} has no effect without --distill; leave it out.")
        if self.distill is not None and self.transfer is not None:
            raise ValueError("Give --transfer or --distill, not both.")
        for option, location in (("--transfer", self.transfer), ("--distill", self.distill)):
            if location is None:
                continue
            if self.continues:
                raise ValueError(f"Give --resume or {option}, not both.")
            if not is_address(location):
                check_source(location, where=option)
        if self.desc is not None and not re.fullmatch(r"[\w.,=+-]+", self.desc):
            raise refusal("--desc", repr(self.desc), accepted="letters, digits and . , = + - _")
        if self.outdir is not None:
            check_target("--outdir", self.outdir, is_folder=True)

    def check_run(self, config: RunConfig) -> None:
        """Raise ValueError if there is nothing to train on, or no folder for the run."""
        if not config.data.data:
            raise ValueError("Give the training data with --data (see dataset_tool.py).")
        if self.verify_resume:
            if self.resume is not None:
                raise ValueError("--verify-resume stops and resumes by itself; leave --resume out.")
            return
        if not self.continues:
            return
        run_dir, _ = runs.resume_paths(self.resume)
        if self.desc is not None:
            raise ValueError("--desc names a new run folder; --resume continues one.")
        if self.outdir is not None and self.outdir.resolve() != run_dir.resolve().parent:
            but = f"--resume continues in {run_dir}"
            raise refusal("--outdir", self.outdir, but=but, remedy="leave --outdir out")

    def settle_in(self, config: RunConfig, given: Collection[str]) -> RunConfig:
        """Return ``config`` with settings that suit the weights it starts from, unless typed."""
        if self.source is None:
            return config
        source, progress = open_header(self.source)
        if self.distill is not None:
            return family_of(config).distil(config, source, given)
        trained_nimg = progress.get("cur_nimg", 0)
        settled = family_of(config).settle_in(config, source, trained_nimg, given)
        before, after = to_dict(config.model), to_dict(settled.model)
        taken = [f"{name}={after[name]}" for name in after if after[name] != before[name]]
        if taken and launcher.number("RANK") == 0:
            print(f"Model as in {self.transfer}: {', '.join(taken)}.", file=sys.stderr, flush=True)
        return settled


def check_here(config: RunConfig) -> None:
    """Raise ValueError if the data do not exist; on every rank alike, before they communicate."""
    location = config.data.data
    if is_address(location):
        try:
            scheme_of(location)
        except AddressError as error:
            raise ValueError(f"--data: {error}") from None
    elif not Path(location).exists():
        raise refusal("--data", but=f"{location} does not exist", remedy="say where the data are")


def check_ranks(config: RunConfig, start: Start) -> None:
    """Raise ValueError if the ranks cannot share a batch or weights; before they communicate."""
    world_size = launcher.number("WORLD_SIZE", 1)
    check_division(config.training, world_size, continues=start.resume is not None)
    group_size(config.training, world_size)
