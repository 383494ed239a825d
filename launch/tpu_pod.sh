#!/bin/bash
# One stage on a TPU pod (Cloud TPU VMs): copy, set the first lines, run it from anywhere with gcloud.
#
#   launch/tpu_pod.sh create     asks for the pod
#   launch/tpu_pod.sh install    jaxalign on every host, and the shared directory
#   launch/tpu_pod.sh train      starts training on every host, or goes on with it
#   launch/tpu_pod.sh stop       SIGTERM: every host saves and exits with 143
#   launch/tpu_pod.sh delete
set -euo pipefail

NAME=${NAME:-jaxalign}
ZONE=${ZONE:-us-east5-a}
TYPE=${TYPE:-v5p-64}
VERSION=${VERSION:-v2-alpha-tpuv5}
# A directory that all hosts mount: Filestore over NFS. Checkpoints need renames that are whole or not at all.
NFS=${NFS:-10.0.0.2:/share}
SHARED=/mnt/shared

everywhere() {
  gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all --command="$1"
}

case "${1:-}" in
  create) gcloud compute tpus tpu-vm create "$NAME" --zone="$ZONE" --accelerator-type="$TYPE" --version="$VERSION" ;;
  delete) gcloud compute tpus tpu-vm delete "$NAME" --zone="$ZONE" ;;
  install)
    everywhere "sudo mkdir -p $SHARED && (mountpoint -q $SHARED || sudo mount $NFS $SHARED)"
    everywhere "python3 -m venv ~/jaxalign-env && ~/jaxalign-env/bin/pip install -q -U 'jax[tpu]' $SHARED/jaxalign"
    ;;
  train)
    # The same command on every host; they find one another. In the background, so that a lost connection ends nothing.
    everywhere "cd $SHARED/jaxalign || exit 1; JAX_COMPILATION_CACHE_DIR=$SHARED/cache nohup ~/jaxalign-env/bin/jaxalign train --config=configs/sft.py --workdir=$SHARED/runs/sft --distributed --config.stage.data.path=$SHARED/train.jsonl --config.mesh.data=1 --config.mesh.fsdp=-1 --config.model.dtype=bfloat16 --config.model.remat=qkv+attn > /tmp/jaxalign.log 2>&1 & echo \$! > /tmp/jaxalign.pid"
    ;;
  stop) everywhere "kill -TERM \$(cat /tmp/jaxalign.pid)" ;;
  *) sed -n '2,9p' "$0"; exit 2 ;;
esac
