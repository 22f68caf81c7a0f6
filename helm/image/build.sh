#!/usr/bin/env bash
# Builds the image IMAGE (default keymesh): a folder of wheels fitting the base image's Python, each
# checked against its hash, then a build without network. See docs/containers.md.
#
#   BASE_IMAGE  any glibc image with Python 3.11 or newer; default: one made by debootstrap where
#               that is installed, else the Dockerfile's
#   PLATFORM    linux/amd64 or linux/arm64; default: the engine's own
set -euo pipefail
cd "$(dirname "$0")/../.."
image=${IMAGE:-keymesh}
python=${PYTHON:-.venv/bin/python}
pip=("$python" -m pip --disable-pip-version-check --quiet)
platform=(${PLATFORM:+--platform "$PLATFORM"})

base=${BASE_IMAGE:-}
if [ -z "$base" ] && command -v debootstrap >/dev/null && [ "$(id -u)" = 0 ]; then
  base=keymesh-base:${SUITE:-bookworm}
  docker image inspect "$base" >/dev/null 2>&1 || helm/image/base.sh "$base"
fi
base=${base:-$(sed -n 's/^ARG BASE_IMAGE=//p' Dockerfile)}

version=$("$python" -c 'import mesh; print(mesh.__version__)')
revision=$(git rev-parse HEAD 2>/dev/null || echo unknown)
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || echo 315532800)}
export SOURCE_DATE_EPOCH

# Which wheels fit: those for this Python, this machine, and no newer a C library than the base image's.
read -r tag machine glibc < <(docker run --rm --network none "${platform[@]}" --entrypoint python3 "$base" -c \
  'import platform, sys; print("%d%d" % sys.version_info[:2], platform.machine(), platform.libc_ver()[1][2:])')
tags=(--platform "manylinux2014_$machine")
for minor in $(seq "$glibc" -1 5); do
  tags+=(--platform "manylinux_2_${minor}_$machine")
done

wheels=build/image/wheels
rm -rf build/image build/lib build/bdist.*
mkdir -p "$wheels"
for lock in requirements/image.txt requirements/otel.txt; do
  "${pip[@]}" download --require-hashes --no-deps --only-binary=:all: --dest "$wheels" -r "$lock" \
    --implementation cp --python-version "$tag" --abi "cp$tag" --abi abi3 --abi none "${tags[@]}"
done
"${pip[@]}" wheel --no-deps --no-build-isolation --wheel-dir "$wheels" .
printf 'keymesh==%s --hash=sha256:%s\n' "$version" \
  "$(sha256sum "$wheels"/keymesh-*.whl | cut -d' ' -f1)" >build/image/keymesh.txt
find build/image -exec touch -d "@$SOURCE_DATE_EPOCH" {} +

docker build --quiet --force-rm --network none "${platform[@]}" --tag "$image:$version" --tag "$image:latest" \
  --build-arg BASE_IMAGE="$base" --build-arg SOURCE_DATE_EPOCH="$SOURCE_DATE_EPOCH" \
  --build-arg VERSION="$version" --build-arg REVISION="$revision" \
  --build-arg CREATED="$(date -u -d "@$SOURCE_DATE_EPOCH" +%Y-%m-%dT%H:%M:%SZ)" . 2>build/image/build.log |
  tee build/image/id || { cat build/image/build.log >&2; exit 1; }

container=$(docker create "${platform[@]}" "$image:$version")
trap 'docker rm "$container" >/dev/null' EXIT
docker cp --quiet "$container:/usr/share/keymesh/sbom.cdx.json" build/image/sbom.cdx.json 2>/dev/null ||
  docker cp "$container:/usr/share/keymesh/sbom.cdx.json" build/image/sbom.cdx.json
docker image inspect --format \
  "$image:$version from $base: {{.Size}} bytes, {{len .RootFS.Layers}} layer, {{.Architecture}}" "$image:$version"
