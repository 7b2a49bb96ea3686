#!/bin/sh
# Installs hpsched: the steps of the Dockerfile, which need only a Python with its venv module.
#
#     install.sh SOURCE PREFIX       hpsched of the folder SOURCE, in an environment at PREFIX
#     install.sh user NAME ID HOME   the user that runs it, and the folder that it works in
#
# TORCH_INDEX names a further package index, for PyTorch; EXTRAS the optional parts to install.
set -eu

install_hpsched() {
    source=$1 prefix=$2
    "${PYTHON:-python3}" -m venv "$prefix"
    set -- --constraint "$source/constraints.txt" "${source}[${EXTRAS:-postgres,mysql,dashboard}]"
    if [ -n "${TORCH_INDEX:-}" ]; then
        # First PyTorch, from its index alone: pip would take a newer build from any other.
        torch=$(grep '^torch==' "$source/constraints.txt")
        PIP_INDEX_URL=$TORCH_INDEX "$prefix/bin/python" -m pip install --no-cache-dir "$torch"
    fi
    "$prefix/bin/python" -m pip install --no-cache-dir "$@"
    "$prefix/bin/hpsched" --version
}

add_user() {
    groupadd --gid "$2" "$1"
    useradd --uid "$2" --gid "$2" --home-dir "$3" --create-home --shell /usr/sbin/nologin "$1"
}

case $# in
    2) install_hpsched "$1" "$2" ;;
    4) shift && add_user "$@" ;;
    *)
        echo "install.sh SOURCE PREFIX | install.sh user NAME ID HOME" >&2
        exit 2
        ;;
esac
