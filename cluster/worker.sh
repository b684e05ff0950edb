#!/usr/bin/env bash
# A worker: one process with a thread per core, reached on this machine only unless --host says
# otherwise. What is given goes on to `dask worker`:
#
#   cluster/worker.sh tcp://10.0.0.5:8786 --host 10.0.0.6
#   cluster/worker.sh --scheduler-file /shared/scheduler.json --host 10.0.0.6 --nthreads 8
#
# PYTHON           the interpreter [python]
# NUMBA_CACHE_DIR  where compiled kernels are kept [beside the package]
set -euo pipefail

# Compile before joining: a worker that compiles its first tasks looks dead to the scheduler.
"${PYTHON:-python}" -c 'import parallel_dicomseg; parallel_dicomseg.warm_up()'

# It ends when it has not seen a scheduler for a minute.
exec "${PYTHON:-python}" -m dask worker \
    --host 127.0.0.1 --nworkers 1 --no-dashboard --dashboard-address 127.0.0.1:0 --death-timeout 60 \
    --local-directory "${TMPDIR:-/tmp}" "$@"
