#!/usr/bin/env bash
# Runs the install steps of the Dockerfile in an empty Debian root, where no image can be built:
#
#     docker/try_install.sh FOLDER [SUITE]        as root, with debootstrap; SUITE: bookworm, trixie
#
# then creates a study in it and works on it, as the image's user. FOLDER is made, and left there.
# SHARE names further paths of this machine that the root sees, such as pip's settings and wheels.
set -euo pipefail

root=${1:?"name a folder: $0 FOLDER [SUITE]"}
suite=${2:-bookworm}
source=$(dirname "$(dirname "$(realpath "${BASH_SOURCE[0]}")")")
mounted=()

leave() {
    local path
    for path in "${mounted[@]}"; do umount "$path"; done
}
trap leave EXIT

inside() {
    env -i HOME=/ LANG=C.UTF-8 PATH=/opt/hpsched/bin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
        EXTRAS="${EXTRAS:-postgres,mysql,dashboard}" TORCH_INDEX="${TORCH_INDEX:-}" \
        chroot "${@:2}" "$root" sh -euc "$1"
}

if [[ ! -d $root/usr ]]; then
    # What the Dockerfile's base image has, as far as the steps need it.
    debootstrap --variant=minbase --include=ca-certificates,python3,python3-venv "$suite" "$root"
fi
for path in /etc/resolv.conf ${SHARE:-}; do
    if [[ -d $path ]]; then
        mkdir -p "$root/$path"
        mount --bind -o ro "$path" "$root/$path"
        mounted+=("$root/$path")
    else
        install -D -m 644 "$path" "$root/$path"
    fi
done

while read -r word rest; do
    case $word in
        COPY)
            read -ra paths <<<"$rest"
            target=$root${paths[-1]}
            if [[ $target == */ ]]; then mkdir -p "$target"; else mkdir -p "${target%/*}"; fi
            for path in "${paths[@]:0:${#paths[@]}-1}"; do
                cp -r --no-target-directory "$source/$path" \
                    "$(if [[ $target == */ ]]; then echo "$target${path##*/}"; else echo "$target"; fi)"
            done
            ;;
        RUN)
            echo "RUN $rest"
            inside "$rest"
            ;;
    esac
done <"$source/docker/Dockerfile"

inside '
    export HOME=/app
    cd /app
    echo "def objective(trial): return 1.0" > train.py
    hpsched study create tried --objective train:objective --trials 1
    hpsched worker attach tried
    hpsched study status tried' --userspec=10001:10001
