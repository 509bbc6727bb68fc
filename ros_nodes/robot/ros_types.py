"""Message classes by name, imported when they are needed: robot files are read without ROS, too."""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any


@cache
def message_class(name: Any) -> Any:
    """The class of a message type, such as "std_msgs/msg/String"; a class is returned as it is.

    Raises:
        ImportError: ROS 2, or the package of the message, is not installed.
    """
    if not isinstance(name, str):
        return name
    package, kind, message = name.split("/")
    module = importlib.import_module(f"{package}.{kind}")
    if not hasattr(module, message):  # a folder of this name that is no built package
        raise ImportError(f"{module.__name__} has no {message}")
    return getattr(module, message)
