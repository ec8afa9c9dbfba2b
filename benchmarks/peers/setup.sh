#!/usr/bin/env bash
# Builds one virtual environment per peer library: TARGET/rectools, TARGET/replay.
#
#   benchmarks/peers/setup.sh [TARGET] [PEER...]     (TARGET: .peers in the checkout; PEER: all)
#
# The peers need versions of numpy, pandas and Lightning that exclude one another, and none of them
# is a dependency of this project, so each gets an environment of its own. Environment variables:
#   PYTHON      the interpreter (python3.11)
#   TORCH_ARGS  extra words for the pip command that installs torch, for example
#               "--index-url https://download.pytorch.org/whl/cpu" for a CPU build
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
target="${1:-$here/../../.peers}"
shift || true
peers=("$@")
[ ${#peers[@]} -gt 0 ] || peers=(rectools replay)
python="${PYTHON:-python3.11}"

requirements() {
    case "$1" in
        # rectools[torch] asks for Lightning <= 2.5.2 and numpy < 2 by itself.
        rectools) echo "rectools[torch]==0.19.0 pytorch-lightning==2.5.2 numpy==1.26.4 pandas==2.3.3" ;;
        replay) echo "replay-rec[torch]==0.22.0 lightning==2.6.6 numpy==2.4.6 pandas==2.3.3" ;;
        *) echo "unknown peer: $1" >&2; exit 2 ;;
    esac
}

mkdir -p "$target"
echo "torch==2.13.0" > "$target/constraints.txt"
for peer in "${peers[@]}"; do
    words="$(requirements "$peer")"
    env="$target/$peer"
    [ -x "$env/bin/python" ] || "$python" -m venv "$env"
    # torch first and alone, so that its build is the one asked for; the constraint then keeps
    # the peer's requirements from replacing it.
    # shellcheck disable=SC2086
    "$env/bin/pip" install --quiet ${TORCH_ARGS:-} torch==2.13.0
    before="$("$env/bin/python" -c 'import torch; print(torch.__version__)')"
    # shellcheck disable=SC2086
    "$env/bin/pip" install --quiet -c "$target/constraints.txt" $words
    after="$("$env/bin/python" -c 'import torch; print(torch.__version__)')"
    if [ "$before" != "$after" ]; then
        echo "$peer: its requirements replaced torch $before by $after" >&2
        exit 1
    fi
    "$env/bin/pip" check
    echo "$peer: ready in $env (torch $after)"
done
