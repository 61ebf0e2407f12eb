#!/usr/bin/env bash
# One training run as an XPK workload on a GKE cluster, started again after preemption:
#
#   CLUSTER=my-cluster TPU_TYPE=v5litepod-64 IMAGE=REGISTRY/IMAGE:TAG scripts/xpk.sh my-run \
#       --config=configs/geodit_sft.py:size=8b,data=mmrs --workdir=/mnt/shared/runs/stage2 ...
#
# The image holds this checkout as its working directory and an environment with jax[tpu]. The
# workdir lies on a volume that all pods mount. SLICES > 1 runs on several slices: set
# --config.mesh.dcn to the same number. A node that is taken away sends SIGTERM first: the run saves
# and ends with 75 within GRACE seconds; one that lost a machine ends with 69.
set -euo pipefail
: "${CLUSTER:?name of the cluster}" "${TPU_TYPE:?as v5litepod-64}" "${IMAGE:?container image}"
NAME=${1:?name of the workload}
shift

xpk workload create --cluster="$CLUSTER" --workload="$NAME" --tpu-type="$TPU_TYPE" \
    --num-slices="${SLICES:-1}" --docker-image="$IMAGE" \
    --max-restarts="${RESTARTS:-100}" --restart-on-exit-codes=69,75 \
    --termination-grace-period-seconds="${GRACE:-300}" \
    --command="python launch.py train$(printf ' %q' "$@")"
