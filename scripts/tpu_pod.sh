#!/usr/bin/env bash
# One training run on every machine of a TPU slice that exists already:
#
#   TPU=my-slice ZONE=us-central2-b scripts/tpu_pod.sh \
#       --config=configs/geodit_sft.py:size=8b,data=mmrs --workdir=/mnt/shared/runs/stage2 ...
#
# Every machine needs this checkout at the same path (CHECKOUT), its environment (.venv, with the
# jax[tpu] of that TPU), and the workdir on a file system that all of them mount. The machines find
# each other by themselves. A run that was stopped (75), lost a machine (69) or its coordinator
# (134) starts again, up to RESTARTS times; so do machines that wait ten minutes in vain for one
# that failed by itself. Training does not need this connection: its lines go to tpu_pod.log in the
# checkout, and the same command, given again, follows a run that goes on.
set -euo pipefail
: "${TPU:?name of the TPU}" "${ZONE:?its zone}"
CHECKOUT=${CHECKOUT:-'~/eo-diffusion-jax'}

loop="left=${RESTARTS:-100}
while :; do
  .venv/bin/python launch.py train $(printf ' %q' "$@")
  status=\$?
  case \$status in 69 | 75 | 134) ;; *) break ;; esac
  [ \$((left--)) -gt 0 ] || break
  sleep 10
done
echo \$status > tpu_pod.status"
command="cd $CHECKOUT || exit 1
pid=\$(cat tpu_pod.pid 2>/dev/null)
if ! kill -0 \"\$pid\" 2>/dev/null; then
  rm -f tpu_pod.status
  : > tpu_pod.log
  nohup setsid bash -c $(printf %q "$loop") >> tpu_pod.log 2>&1 < /dev/null &
  pid=\$!
  echo \$pid > tpu_pod.pid
fi
tail -n +1 -f --pid=\$pid tpu_pod.log
exit \$(cat tpu_pod.status)"
gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="$command"
