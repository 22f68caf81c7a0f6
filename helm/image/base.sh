#!/usr/bin/env bash
# Makes a base image NAME without a registry: Debian with its Python, by debootstrap (needs root).
# SUITE and DEBIAN_MIRROR choose another release or mirror; security updates come from beside it.
set -euo pipefail
name=$1
suite=${SUITE:-bookworm}
mirror=${DEBIAN_MIRROR:-http://deb.debian.org/debian}

root=$(mktemp -d)
trap 'rm -rf --one-file-system "$root"' EXIT
echo "debootstrap $suite (a minute or two)"
debootstrap --variant=minbase --include=python3 "$suite" "$root" "$mirror" >"$root.log" 2>&1 || {
  tail -n 20 "$root.log" >&2
  rm -f "$root.log"
  exit 1
}
rm -f "$root.log"
printf 'deb %s %s main\n' "$mirror" "$suite" "$mirror" "$suite-updates" "${mirror%/}-security" "$suite-security" \
  >"$root/etc/apt/sources.list"
cp /etc/resolv.conf "$root/etc/resolv.conf"
export DEBIAN_FRONTEND=noninteractive
if ! { chroot "$root" apt-get update -qq && chroot "$root" apt-get upgrade -qq -y; } >/dev/null 2>&1; then
  echo "no security updates from ${mirror%/}-security: the base image has the release's packages" >&2
fi
chroot "$root" apt-get clean
rm -rf "${root:?}"/var/lib/apt/lists/*
tar -C "$root" --numeric-owner -c . | docker import --change 'CMD ["python3"]' - "$name" >/dev/null
echo "base image $name: $(docker run --rm --network none "$name" python3 --version)"
