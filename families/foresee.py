"""Predicts the memory of a run in a process of its own: python -m families.foresee RUN_DIR.

Started by :mod:`training.resources.memory_process`.
"""

import os
import sys
import threading
from pathlib import Path


def _end_with_parent() -> None:
    """End this process when its standard input closes, as it does when the parent process ends."""
    sys.stdin.buffer.read()
    os._exit(1)


def main() -> None:
    """Print how many bytes each rank will hold, predicted from the options in the run folder."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.nice(19)
    import families  # noqa: F401 (registers them)
    from training.family import restore_run
    from training.resources.memory import predict_memory
    from training.run_report.files import OPTIONS_FILE
    from training.run_report.rows import read_object

    options = read_object(Path(sys.argv[1]) / OPTIONS_FILE)
    device_type = str(options["device"]).partition(":")[0]
    config = restore_run(options["config"])
    print(predict_memory(config, options["world_size"], device_type).total, flush=True)
    os._exit(0)  # The other thread is still reading.


if __name__ == "__main__":
    main()
