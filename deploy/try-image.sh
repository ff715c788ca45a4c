#!/usr/bin/env bash
# Start an image of the service as nobody in particular, on a read-only file system; it must answer, and end when it is told to.
set -euo pipefail
image="$1"
name="try-$$"
trap 'docker rm --force "$name" >/dev/null' EXIT

docker run --detach --name "$name" --read-only --cap-drop ALL --security-opt no-new-privileges --tmpfs /tmp \
    --publish 127.0.0.1::8000 "$image"
address="$(docker port "$name" 8000/tcp)"
if ! timeout 60 sh -c "until curl --fail --silent 'http://$address/health/live'; do sleep 1; done"; then
    docker logs "$name"
    exit 1
fi
docker stop --time 30 "$name"
status="$(docker inspect --format '{{.State.ExitCode}}' "$name")"
[ "$status" = 0 ] || { echo "it ended with $status" >&2; exit 1; }
