"""The script that starts the Triton server on a workspace, ``service_docker_up.sh``."""

from __future__ import annotations

SERVICE_SCRIPT = "service_docker_up.sh"

_TEXT = """\
#!/bin/sh
# Serves this folder with LMDeploy's Triton server: gRPC on port 33337, no HTTP.
# The image must be one of LMDeploy 0.1 to 0.5; newer ones do not read this layout.
set -eu

TP=@TP@
IMAGE="${LMDEPLOY_IMAGE:-openmmlab/lmdeploy:v0.2.3}"
HERE="$(cd "$(dirname "$0")" && pwd)"

usage() {
    echo "usage: $0 [--lib-dir DIR]"
    echo "  --lib-dir DIR  a turbomind backend of one's own in the place of the image's"
    echo "  LMDEPLOY_IMAGE in the environment names another image than $IMAGE"
}

case "${1:-}" in
    "") set -- ;;
    --lib-dir)
        [ $# -eq 2 ] || { usage >&2; exit 2; }
        LIBRARIES="$(cd "$2" && pwd)"
        set -- -v "$LIBRARIES:/opt/tritonserver/backends/turbomind" ;;
    -h|--help) usage; exit 0 ;;
    *) usage >&2; exit 2 ;;
esac

DEVICES=0
i=1
while [ "$i" -lt "$TP" ]; do
    DEVICES="$DEVICES,$i"
    i=$((i + 1))
done

exec docker run --rm --name lmdeploy \\
    --gpus "\\"device=$DEVICES\\"" \\
    -v "$HERE:/workspace/models" "$@" \\
    --shm-size 16g \\
    -p 33337-33400:33337-33400 \\
    --env NCCL_LAUNCH_MODE=GROUP \\
    "$IMAGE" \\
    tritonserver --model-repository=/workspace/models/model_repository \\
    --allow-http=0 --allow-grpc=1 --grpc-port=33337 --log-verbose=0 --allow-metrics=1
"""


def service_script(tp: int) -> str:
    """Return the script for a number of GPUs."""
    return _TEXT.replace("@TP@", str(tp))
