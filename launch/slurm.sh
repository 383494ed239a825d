#!/bin/bash
# One stage on SLURM: copy this file, set the first lines to your cluster, sbatch it.
#
# One process per node, which owns all of its GPUs: the rows are tokenised once per node. Left to itself JAX would take one
# GPU per process under SLURM; JAX_LOCAL_DEVICE_IDS below says otherwise.

#SBATCH --job-name=jaxalign
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
# A minute and a half before the end every process is told, saves and exits with 143.
#SBATCH --signal=TERM@90

set -euo pipefail

# Shared by all nodes: every process reads the data and writes its part of a checkpoint.
SHARED=${SHARED:-$HOME/jaxalign}
CONFIG=${CONFIG:-configs/sft.py}
WORKDIR=${WORKDIR:-$SHARED/runs/sft}
DATA=${DATA:-$SHARED/train.jsonl}

# Run on the node, where the GPUs are.
gpus='$(seq --separator=, 0 $((${SLURM_GPUS_ON_NODE:?is not set: ask for GPUs} - 1)))'

# The same seed gives the same bits on GPUs only with deterministic kernels; leave the flags out where speed is worth more.
export XLA_FLAGS="--xla_gpu_deterministic_ops=true --xla_gpu_autotune_level=0 ${XLA_FLAGS:-}"

# The same command goes on where a killed one stopped. SIGTERM goes through srun to all processes.
srun --kill-on-bad-exit=1 bash -c "export JAX_LOCAL_DEVICE_IDS=$gpus; exec \"\$@\"" -- \
  jaxalign train --config="$CONFIG" --workdir="$WORKDIR" --distributed \
  --config.stage.data.path="$DATA" --config.mesh.data=-1 --config.mesh.fsdp=8 --config.model.dtype=bfloat16 \
  "$@"
