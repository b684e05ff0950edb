#!/usr/bin/env bash
# Certificates for one cluster, and the Dask configuration that makes every process show its own
# and ask for the others':
#
#   cluster/certificate.sh /shared/tls [days, 365 by default]
#   export DASK_CONFIG=/shared/tls/dask.yaml      # for scheduler, workers and convert alike
#
# An authority signs one certificate each for the scheduler, the workers and the client; its own
# key is thrown away, so that nothing else can be signed. Whoever can read one of the other keys can
# run programs on the cluster: keep the folder to yourself.
set -euo pipefail

umask 077
mkdir -p "${1:?usage: cluster/certificate.sh DIRECTORY [DAYS]}"
folder="$(cd "$1" && pwd)"
days="${2:-365}"
elliptic=(-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes)
trap 'rm -f "$folder"/ca.key "$folder"/ca.srl "$folder"/*.request' EXIT

openssl req -x509 "${elliptic[@]}" -days "$days" -subj "/CN=parallel_dicomseg authority" \
    -addext "basicConstraints=critical,CA:TRUE,pathlen:0" \
    -addext "keyUsage=critical,digitalSignature,keyCertSign" \
    -keyout "$folder/ca.key" -out "$folder/ca.pem"
for role in scheduler worker client; do
    openssl req -new "${elliptic[@]}" -subj "/CN=parallel_dicomseg $role" \
        -keyout "$folder/$role.key" -out "$folder/$role.request"
    openssl x509 -req -days "$days" -in "$folder/$role.request" -out "$folder/$role.pem" \
        -CA "$folder/ca.pem" -CAkey "$folder/ca.key" -CAcreateserial -extfile <(
        printf '%s\n' "basicConstraints=critical,CA:FALSE" "keyUsage=critical,digitalSignature" \
            "subjectKeyIdentifier=hash" "authorityKeyIdentifier=keyid"
    )
done
cat >"$folder/dask.yaml" <<END
distributed:
  comm:
    require-encryption: true
    tls:
      min-version: 1.3
      ca-file: '$folder/ca.pem'
      scheduler: {cert: '$folder/scheduler.pem', key: '$folder/scheduler.key'}
      worker: {cert: '$folder/worker.pem', key: '$folder/worker.key'}
      client: {cert: '$folder/client.pem', key: '$folder/client.key'}
END
