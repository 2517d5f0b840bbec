#!/usr/bin/env bash
# The module for 64-bit ARM, cross-compiled and run under qemu's user-mode emulation: what `make arm` runs, from the
# root of the repository. Needs Debian's packages debootstrap, g++-12-aarch64-linux-gnu and qemu-user-static, and an
# environment with pip, cmake and ninja, whose interpreter is the first argument. Further arguments are the tests to
# run. TORCH names the torch, of which PyPI has a build for the CPU alone up to 2.10.
set -euo pipefail

python=$(realpath --no-symlinks "$1")
shift
torch=${TORCH:-torch==2.10.0}
arm=$PWD/build/arm
root=$arm/root           # an arm64 Debian with Python, unpacked and not installed: nothing in it runs but Python
packages=$arm/$torch     # torch and pytest
package=$arm/package     # topgather

missing=""
for program in debootstrap aarch64-linux-gnu-g++-12 qemu-aarch64-static; do
  command -v $program > /dev/null || missing+=" $program"
done
if [ -n "$missing" ]; then
  echo "arm: missing:$missing; apt-get install debootstrap g++-12-aarch64-linux-gnu qemu-user-static" >&2
  exit 1
fi

if [ ! -e "$root/usr/bin/python3.11" ]; then
  rm -rf "$root"
  debootstrap --foreign --arch=arm64 --variant=minbase --include=python3.11,libpython3.11-dev bookworm "$root"
  for archive in "$root"/var/cache/apt/archives/*.deb; do
    dpkg-deb --extract "$archive" "$root"
  done
fi

# pip asks the markers of dependencies of this machine and not of that one, so all are named here.
if [ ! -d "$packages" ]; then
  "$python" -m pip install --quiet --no-deps --only-binary=:all: --target "$packages.part" \
    --implementation cp --python-version 3.11 --platform manylinux_2_28_aarch64 --platform manylinux_2_17_aarch64 \
    "$torch" filelock fsspec jinja2 markupsafe mpmath networkx sympy typing-extensions numpy \
    "pytest>=8" iniconfig packaging pluggy pygments "hypothesis>=6.100" sortedcontainers
  mv "$packages.part" "$packages"
fi

"$(dirname "$python")/cmake" -G Ninja -DCMAKE_MAKE_PROGRAM="$(dirname "$python")/ninja" -S . -B "$arm/build" \
  -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++-12 \
  -DCMAKE_CXX_FLAGS="-Werror -idirafter $root/usr/include" -DPython_EXECUTABLE="$python" \
  -DPython_INCLUDE_DIR="$root/usr/include/python3.11" -DTOPGATHER_CUDA=OFF
SECONDS=0
"$(dirname "$python")/cmake" --build "$arm/build"
echo "arm: built in $SECONDS s"
rm -rf "$package" && mkdir -p "$package"
cp -r python/topgather "$package/" && rm -f "$package"/topgather/_native*
"$(dirname "$python")/cmake" --install "$arm/build" --prefix "$package"

export PYTHONPATH=$package:$packages PYTHONPYCACHEPREFIX=$arm/bytecode
emulated=(qemu-aarch64-static -L "$root" "$root/usr/bin/python3.11")
SECONDS=0
"${emulated[@]}" -m topgather
echo "arm: self-check in $SECONDS s"
SECONDS=0
"${emulated[@]}" -m pytest -q -p no:cacheprovider "$@"
echo "arm: tests in $SECONDS s"
