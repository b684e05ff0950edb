#!/usr/bin/env bash
# A cluster over ssh: the scheduler on the first host of a file, a worker on every one.
#
#   cluster/ssh.sh hosts.txt /shared/scheduler.json [options of dask worker]
#
# hosts.txt       one host per line, as ssh knows it; empty lines and lines with # are left out
# scheduler file  written by the scheduler, read by the workers and by `convert --scheduler`;
#                 in a folder that all machines share
#
# This checkout must have the same path on every machine. Each process listens on the address
# through which ssh reached its machine. The end of this script (Ctrl-C) ends the cluster.
#
# DASK_CONFIG  what cluster/certificate.sh has written, in a folder that all machines share;
#              without it the cluster is not encrypted, which `convert` refuses beyond one machine
# PYTHON       the interpreter on every machine [python]
set -euo pipefail

usage="usage: cluster/ssh.sh HOSTS_FILE SCHEDULER_FILE [options of dask worker]"
hosts_file="${1:?$usage}"
scheduler_file="${2:?$usage}"
shift 2
mapfile -t hosts < <(grep -v -e '^[[:space:]]*$' -e '#' "$hosts_file")
encryption=() settings=("PYTHON=${PYTHON:-python}")
if [[ -n "${DASK_CONFIG:-}" ]]; then
    encryption=(--protocol tls) settings+=("DASK_CONFIG=$DASK_CONFIG")
fi
folder="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

# Runs "$2" with further options on host "$1". A terminal at the other end (-tt), so that what
# runs there ends with the connection.
start() {
    local host="$1" command
    command="$(printf '%q ' env "${settings[@]}" "${@:2}")"
    # shellcheck disable=SC2016  # the address is found out at the other end
    ssh -tt -o BatchMode=yes "$host" \
        'set -- $SSH_CONNECTION; exec '"$command"' --host "$3"' </dev/null &
}

end() {
    trap - EXIT INT TERM
    jobs -p | xargs -r kill
    wait
}

trap end EXIT
trap 'exit 130' INT TERM
rm -f "$scheduler_file"
start "${hosts[0]:?no host in $hosts_file}" \
    "$folder/scheduler.sh" "${encryption[@]}" --port 0 --scheduler-file "$scheduler_file"
for host in "${hosts[@]}"; do
    start "$host" "$folder/worker.sh" --scheduler-file "$scheduler_file" "$@"
done
wait -n # the first that ends, ends all
