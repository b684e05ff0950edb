#!/usr/bin/env bash
# A key and a certificate for one cluster, and the Dask configuration that makes every process
# show the certificate and ask for it:
#
#   cluster/certificate.sh /shared/tls
#   export DASK_CONFIG=/shared/tls/dask.yaml      # for scheduler, workers and convert alike
#
# Whoever can read the key can run programs on the cluster: keep the folder to yourself.
set -euo pipefail

umask 077
mkdir -p "${1:?usage: cluster/certificate.sh DIRECTORY}"
folder="$(cd "$1" && pwd)"
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 365 \
    -subj "/CN=parallel_dicomseg cluster" -addext "keyUsage=critical,digitalSignature,keyCertSign" \
    -keyout "$folder/cluster.key" -out "$folder/cluster.pem"
pair="{cert: '$folder/cluster.pem', key: '$folder/cluster.key'}"
cat >"$folder/dask.yaml" <<END
distributed:
  comm:
    require-encryption: true
    tls:
      ca-file: '$folder/cluster.pem'
      scheduler: $pair
      worker: $pair
      client: $pair
END
