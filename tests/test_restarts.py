"""A run that torchrun starts again by itself after one of its agents was killed."""

import socket

from training_runs import FULL, assert_same_run, num_rows, only_run


def test_a_killed_agent_joins_again_with_the_same_command(
    train, uninterrupted, tmp_path, monkeypatch
):
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")  # See docs/reliability.md.
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torchrun = (
        *("--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}"),
        *("--rdzv-id=test", "--local-addr=127.0.0.1", "--max-restarts=3"),
        # A lost agent is missed after 8 seconds here, 15 by default.
        "--rdzv-conf=keep_alive_interval=1,keep_alive_max_attempt=8",
    )
    command = (f"--outdir={tmp_path}", *FULL, "--workers=0", "--resume=auto")

    def start():
        return train(*command, ranks=1, torchrun=torchrun)

    def listens():
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    # The first holds the rendezvous, as the one on HOST does: it is the first at the port.
    first = start()
    first.wait_until(listens)
    second = start()
    first.wait_until(lambda: num_rows(tmp_path) >= 3)
    second.kill()
    outputs = [process.finish() for process in (start(), first)]
    assert "".join(outputs).count("Resuming from") == 1
    assert_same_run(only_run(tmp_path), uninterrupted(ranks=2))
