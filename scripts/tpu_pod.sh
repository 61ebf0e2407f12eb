#!/usr/bin/env bash
# One training run on every machine of a TPU slice that exists already:
#
#   TPU=my-slice ZONE=us-central2-b scripts/tpu_pod.sh \
#       --config=configs/geodit_sft.py:size=8b,data=mmrs --workdir=/mnt/shared/runs/stage2 ...
#
# Every machine needs this checkout at the same path (CHECKOUT), its environment (.venv, with the
# jax[tpu] of that TPU), and the workdir on a file system that all of them mount. The machines find
# each other by themselves. A run that was stopped (75), lost a machine (69) or its coordinator
# (134) starts again; where one fails by itself, the others stop waiting for it after ten minutes.
set -euo pipefail
: "${TPU:?name of the TPU}" "${ZONE:?its zone}"
CHECKOUT=${CHECKOUT:-'~/eo-diffusion-jax'}

command="cd $CHECKOUT && while :; do
  .venv/bin/python launch.py train $(printf ' %q' "$@")
  status=\$?
  case \$status in 69 | 75 | 134) sleep 10 ;; *) exit \$status ;; esac
done"
gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="$command"
