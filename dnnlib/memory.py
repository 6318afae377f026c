"""How much main memory processes can still allocate, given the system and control groups."""

import re
from collections.abc import Iterator
from pathlib import Path

_GROUPS = Path("/sys/fs/cgroup")
_OWN_GROUPS = Path("/proc/self/cgroup")
# By version of control groups: the file with the limit, the file with the use, and the line of
# memory.stat with the part of that use which is file cache that the system can drop.
_FILES = {
    2: ("memory.max", "memory.current", r"^inactive_file (\d+)$"),
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", r"^total_inactive_file (\d+)$"),
}


def available_memory() -> int:
    """Return how many bytes of main memory processes here can still allocate.

    That is what the system has available, or less if a control group (of a container or of a
    scheduler's job) sets a limit.
    """
    import psutil

    rooms = [psutil.virtual_memory().available, *group_rooms(_GROUPS, _OWN_GROUPS)]
    return max(min(rooms), 0)


def group_rooms(groups: Path, own_groups: Path) -> Iterator[int]:
    """Yield how many bytes each control group of this process has left below its limit.

    Parent groups count as well; a container sees its own group as the root.

    Args:
        groups: Folder where the control groups are mounted.
        own_groups: File that lists the groups of the process.
    """
    try:
        lines = own_groups.read_text(encoding="utf-8").splitlines()
    except OSError:  # This is not Linux.
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
    """Return how many bytes a group has left; None if it has no limit or cannot be read."""
    try:
        limit = (folder / limit_file).read_text(encoding="utf-8").strip()
        if limit == "max":
            return None
        used = int((folder / use_file).read_text(encoding="utf-8"))
        found = re.search(droppable, (folder / "memory.stat").read_text("utf-8"), re.MULTILINE)
    except OSError:  # The root group, or one hidden from this container.
        return None
    return int(limit) - used + (int(found[1]) if found else 0)
