"""What the process of training.resources.memory_process runs: python -m families.foresee RUN."""

import os
import sys
import threading
from pathlib import Path


def _end_with_parent() -> None:
    """End this process when its input ends, as it does with the one that started it."""
    sys.stdin.buffer.read()
    os._exit(1)


def main() -> None:
    """Print the bytes that each rank of a run will hold, by what its folder says of it."""
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
    os._exit(0)  # The thread still reads.


if __name__ == "__main__":
    main()
