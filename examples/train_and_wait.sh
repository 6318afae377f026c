#!/bin/bash
# Run a command that trains, and then wait until its last state is written, for up to half an hour:
#   examples/train_and_wait.sh OUTDIR torchrun ... train.py --outdir=OUTDIR ...
# torchrun kills its processes 30 seconds after a signal. What they have copied for a state is
# written after that, unless the machine or the container ends with the command.
set -uo pipefail
outdir=$1
shift
# A container's first process alone hears of a stop; SLURM tells every process by itself.
stop() { [ -n "${SLURM_JOB_ID:-}" ] || kill -s "$1" "$child" 2> /dev/null; }
trap 'stop TERM' TERM
trap 'stop USR1' USR1
"$@" &
child=$!
wait "$child"
code=$?
while kill -0 "$child" 2> /dev/null; do # A signal ends a wait.
    wait "$child"
    code=$?
done
python -m training.saving.wait "$outdir"
exit "$code"
