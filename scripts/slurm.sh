#!/usr/bin/env bash
# One training run under SLURM, one process per GPU:
#
#   sbatch --nodes=4 --gpus-per-node=8 --ntasks-per-node=8 scripts/slurm.sh \
#       --config=configs/geodit_sft.py:size=8b,data=mmrs --workdir=/shared/runs/stage2 ...
#
# Three minutes before the time limit, and at preemption, the processes get SIGTERM: they save and
# end with 75. One that lost a machine ends with 69, or with 134 where that was the first one. Then
# the job queues itself again, up to RESTARTS times; the same command continues. Where one process
# failed by itself, it does not: srun gives the highest status, so 1 and 2 travel as 201 and 202.
#SBATCH --job-name=eo-diffusion
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
set -uo pipefail

# SIGTERM is for Python: the shell around it stays to pass its status on.
srun bash -c 'trap : TERM
.venv/bin/python launch.py train "$@"
status=$?
case $status in 1 | 2) status=$((status + 200)) ;; esac
exit $status' train "$@"
status=$?
case $status in
201 | 202) status=$((status - 200)) ;;
69 | 75 | 134)
    if [ "${SLURM_RESTART_COUNT:-0}" -lt "${RESTARTS:-100}" ]; then
        scontrol requeue "$SLURM_JOB_ID"
    fi
    ;;
esac
exit "$status"
