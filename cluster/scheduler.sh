#!/usr/bin/env bash
# The scheduler of a cluster, on this machine only unless --host says otherwise.
# What is given goes on to `dask scheduler`, where the last of two equal options counts:
#
#   cluster/scheduler.sh --protocol tls --host 10.0.0.5 --scheduler-file /shared/scheduler.json
#
# PYTHON  the interpreter [python]
set -euo pipefail

# Without workers for this long, Dask ends the waiting tasks with an error; its own default is never.
export DASK_DISTRIBUTED__SCHEDULER__NO_WORKERS_TIMEOUT="${DASK_DISTRIBUTED__SCHEDULER__NO_WORKERS_TIMEOUT:-60s}"

# Beyond this machine only encrypted, unless the variable says false.
host="$(printf '%s\n' "$@" | sed -n -e '/^--\(host\|interface\)$/{n;p}' -e 's/^--\(host\|interface\)=//p' | tail -n 1)"
case "${host:-127.0.0.1}" in
    127.* | ::1 | localhost) ;;
    *) export DASK_DISTRIBUTED__COMM__REQUIRE_ENCRYPTION="${DASK_DISTRIBUTED__COMM__REQUIRE_ENCRYPTION:-true}" ;;
esac

# Without a dashboard it would still listen, and on every interface.
exec "${PYTHON:-python}" -m dask scheduler \
    --host 127.0.0.1 --port 8786 --no-dashboard --dashboard-address 127.0.0.1:0 "$@"
