"""Print, as JSON, what a run of ``train.py`` enters up to the end of its first optimizer step.

``python -P tests/trace_run.py ROOT ARGUMENTS...`` runs ROOT/train.py. The result lists the files of
the project in which a function is called, in the order of the first call, each with that
function's name, and the modules of the project that are loaded. Modules and classes that are
merely defined are not entered, nor is what their definition calls. A run that makes no step, such
as one with ``--dry-run``, is followed to its end.
"""

import contextlib
import inspect
import json
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any


class StepDone(BaseException):  # Nothing on the way may take it for an error.
    pass


class Entered:
    """Record of the files under ``root`` in which functions are called, while it is a context."""

    def __init__(self, root: Path) -> None:
        self.files: dict[str, str] = {}
        self._root = f"{root}/"
        self._importing = threading.local()

    def __enter__(self) -> "Entered":
        threading.setprofile(self._called)
        sys.setprofile(self._called)
        return self

    def __exit__(self, *_: Any) -> None:
        sys.setprofile(None)
        threading.setprofile(None)

    def _called(self, frame: FrameType, event: str, _: Any) -> None:
        if event not in ("call", "return"):
            return
        code = frame.f_code
        if code.co_name == "<module>":
            depth = getattr(self._importing, "depth", 0)
            self._importing.depth = depth + (1 if event == "call" else -1)
        is_function = code.co_flags & inspect.CO_OPTIMIZED
        if event == "return" or not is_function or getattr(self._importing, "depth", 0):
            return
        if code.co_filename.startswith(self._root):
            path = code.co_filename.removeprefix(self._root)
            if not path.startswith((".", "tests/")) and path not in self.files:
                self.files[path] = code.co_qualname.partition(".<")[0]


def modules_of(root: Path) -> list[str]:
    """Return the names of the loaded modules whose files are under ``root``."""
    found = []
    for name, module in sys.modules.items():
        path = getattr(module, "__file__", None)
        if path is not None and Path(path).is_relative_to(root):
            inner = Path(path).relative_to(root).as_posix()
            if not inner.startswith((".", "tests/")):
                found.append(name)
    return sorted(found)


def main(root: Path, arguments: list[str]) -> None:
    sys.path.insert(0, str(root))
    sys.argv = [str(root / "train.py"), *arguments]
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook

    import dnnlib.program
    import train

    def stop(*_: Any) -> None:
        raise StepDone

    register_optimizer_step_post_hook(stop)
    torch.cuda.is_available = lambda: False
    with (
        contextlib.redirect_stdout(sys.stderr),
        contextlib.suppress(StepDone, SystemExit),
        Entered(root) as entered,
    ):
        dnnlib.program.run(train.main)
    print(json.dumps(dict(files=entered.files, modules=modules_of(root))))


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), sys.argv[2:])
