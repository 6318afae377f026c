"""How much main memory processes can still take, as limited by the system and control groups."""

import re
from collections.abc import Iterator
from pathlib import Path

_GROUPS = Path("/sys/fs/cgroup")
_OWN_GROUPS = Path("/proc/self/cgroup")
# Files of a control group: its limit, what it uses, and of that, the files that the system can
# drop. Of version 2, and of version 1.
_FILES = {
    2: ("memory.max", "memory.current", r"^inactive_file (\d+)$"),
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", r"^total_inactive_file (\d+)$"),
}


def available_memory() -> int:
    """Return the bytes of main memory that processes here can take beyond what they have.

    That is what the system has left, or less, if a control group (of a container, or of a job of a
    scheduler) sets a limit.
    """
    import psutil

    rooms = [psutil.virtual_memory().available, *group_rooms(_GROUPS, _OWN_GROUPS)]
    return max(min(rooms), 0)


def group_rooms(groups: Path, own_groups: Path) -> Iterator[int]:
    """Yield what each control group that holds this process has left below its limit, in bytes.

    ``groups`` is where control groups are mounted, ``own_groups`` the file with those of the
    process. Those above count, too. A container sees its own group as the uppermost one.
    """
    try:
        lines = own_groups.read_text(encoding="utf-8").splitlines()
    except OSError:  # Not on Linux.
        return
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number != "0" and "memory" not in controllers.split(","):
            continue
        version, mount = (2, groups) if number == "0" else (1, groups / "memory")
        inner = Path(path.lstrip("/"))
        for folder in (mount / inner, *(mount / parent for parent in inner.parents)):
            room = _room(folder, *_FILES[version])
            if room is not None:
                yield room


def _room(folder: Path, limit_file: str, use_file: str, droppable: str) -> int | None:
    """Return what is left of a group's limit; None if it has none."""
    try:
        limit = (folder / limit_file).read_text(encoding="utf-8").strip()
        if limit == "max":
            return None
        used = int((folder / use_file).read_text(encoding="utf-8"))
        found = re.search(droppable, (folder / "memory.stat").read_text("utf-8"), re.MULTILINE)
    except OSError:  # A group that only others can see.
        return None
    return int(limit) - used + (int(found[1]) if found else 0)
