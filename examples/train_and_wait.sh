#!/bin/bash
# Run a training command, and then wait for up to half an hour until its last state is written:
#   examples/train_and_wait.sh OUTDIR torchrun ... train.py --outdir=OUTDIR ...
# torchrun kills its processes 30 seconds after a signal. A state that they have copied is still
# written after that, unless the machine or container stops when the command ends.
set -uo pipefail
outdir=$1
shift
# In a container only the first process receives the signal; SLURM signals every process itself.
stop() { [ -n "${SLURM_JOB_ID:-}" ] || kill -s "$1" "$child" 2> /dev/null; }
trap 'stop TERM' TERM
trap 'stop USR1' USR1
"$@" &
child=$!
wait "$child"
code=$?
while kill -0 "$child" 2> /dev/null; do # A signal interrupts wait.
    wait "$child"
    code=$?
done
python -m training.saving.wait "$outdir"
exit "$code"
