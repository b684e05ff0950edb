#!/usr/bin/env bash
# A worker: one process with a thread per core, reached on this machine only unless --host says
# otherwise. What is given goes on to `dask worker`:
#
#   cluster/worker.sh tls://10.0.0.5:8786 --host 10.0.0.6
#   cluster/worker.sh --scheduler-file /shared/scheduler.json --host 10.0.0.6 --nthreads 8
#
# PYTHON           the interpreter [python]
# NUMBA_CACHE_DIR  where compiled kernels are kept [beside the package]
set -euo pipefail

# Compile before joining: a worker that compiles its first tasks looks dead to the scheduler.
"${PYTHON:-python}" -c 'import parallel_dicomseg; parallel_dicomseg.warm_up()'

# Beyond this machine only encrypted, unless the variable says false.
host="$(printf '%s\n' "$@" | sed -n -e '/^--\(host\|interface\)$/{n;p}' -e 's/^--\(host\|interface\)=//p' | tail -n 1)"
case "${host:-127.0.0.1}" in
    127.* | ::1 | localhost) ;;
    *) export DASK_DISTRIBUTED__COMM__REQUIRE_ENCRYPTION="${DASK_DISTRIBUTED__COMM__REQUIRE_ENCRYPTION:-true}" ;;
esac

# It ends when it has not seen a scheduler for a minute.
exec "${PYTHON:-python}" -m dask worker \
    --host 127.0.0.1 --nworkers 1 --no-dashboard --dashboard-address 127.0.0.1:0 --death-timeout 60 \
    --local-directory "${TMPDIR:-/tmp}" "$@"
