#!/bin/bash
# Train on one to four nodes, which may join and leave at any time. Start it on every node:
#   examples/elastic.sh /shared/job-17
# The path must be visible to all nodes, and new for each job. docs/reliability.md describes what
# happens when a node is lost.
set -uo pipefail
meeting=$1
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 TORCH_ELASTIC_WORKER_IDENTICAL=1
log=$(mktemp)
trap 'rm -f "$log"' EXIT
trap 'kill -s TERM "$child" 2> /dev/null; stopping=1' TERM INT
child= code=1 stopping=
while [ -z "$stopping" ]; do
    number=$(cat "$meeting.number" 2> /dev/null || echo 0)
    torchrun --nnodes=1:4 --nproc_per_node=8 --max-restarts=1000 --rdzv_backend=c10d \
        --rdzv_id="$number" --rdzv_endpoint="$meeting.$number" --rdzv-conf=store_type=file \
        train.py --outdir=runs/ffhq64 --data=datasets/ffhq64.zip --preset=ffhq64 \
        --precision=bf16 --compile --resume=auto 2> >(tee "$log" >&2) &
    child=$!
    wait "$child"
    code=$?
    while kill -0 "$child" 2> /dev/null; do # A signal interrupts wait.
        wait "$child"
        code=$?
    done
    [ "$code" -eq 0 ] || [ -n "$stopping" ] && break
    sleep "${PAUSE:-5}"
    # When torchrun gives up, it closes the nodes' rendezvous for good, so move on to a new one.
    grep -q RendezvousClosedError "$log" && echo $((number + 1)) > "$meeting.number"
done
python -m training.saving.wait runs/ffhq64
exit "$code"
