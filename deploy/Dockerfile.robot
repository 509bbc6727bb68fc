# Not built here: no container runtime was available. Please report what fails.
# The policy node and the simulated robot, with ROS 2 Jazzy of the distribution:
#   docker build -f deploy/Dockerfile.robot -t ceed_vla_robot . && docker run --rm -it ceed_vla_robot
# Making an export needs torch; the image that runs it does not have it.
FROM python:3.12-slim AS build
WORKDIR /src
COPY . .
RUN pip install --no-cache-dir build && python -m build --wheel --outdir /wheels \
    && pip install --no-cache-dir -c constraints.txt "$(ls /wheels/*.whl)[export]" \
    && cd / && ceed-vla export --policy.path student --output_dir /policies/student

FROM ros:jazzy-ros-base
RUN apt-get update && apt-get install -y --no-install-recommends \
    python3-venv libegl1 libegl-mesa0 libgl1-mesa-dri libgl1 ros-jazzy-control-msgs ros-jazzy-trajectory-msgs \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /wheels /wheels
COPY --from=build /policies /opt/policies
COPY constraints.txt /wheels/
# An environment that sees the distribution's rclpy; everything else is pip's.
RUN python3 -m venv --system-site-packages /opt/ceed_vla \
    && /opt/ceed_vla/bin/pip install --no-cache-dir -c /wheels/constraints.txt \
    "$(ls /wheels/*.whl)[edge,sim]" mcap-ros2-support
# Shared memory is not shared with nodes outside of the container.
ENV MUJOCO_GL=egl PATH=/opt/ceed_vla/bin:$PATH ROS_AUTOMATIC_DISCOVERY_RANGE=LOCALHOST \
    FASTDDS_BUILTIN_TRANSPORTS=UDPv4
RUN useradd --create-home robot
USER robot
WORKDIR /tmp
CMD ["bash", "-c", "source /opt/ros/jazzy/setup.bash && exec ceed-vla ros-demo --checkpoint /opt/policies/student"]
