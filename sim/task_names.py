"""Names of tasks in flags; importing this imports no simulator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ceed_vla.errors import ConfigError
from ceed_vla.fields import short


def parse_tasks(names: str, sets: Mapping[str, Sequence[str]], choose: str) -> list[str]:
    """Return the tasks that the flag ``--env.task`` names, each once and in its order.

    Args:
        names: Tasks or names of sets, separated by commas.
        sets: Name of a set -> its tasks; every task is in one.
        choose: What an error tells the user to choose.

    Raises:
        ConfigError: A name is unknown, or there is none.
    """
    given = [name.strip() for name in names.split(",") if name.strip()]
    found = list(dict.fromkeys(task for name in given for task in sets.get(name, [name])))
    every = {task for tasks in sets.values() for task in tasks}
    unknown = [task for task in found if task not in every]
    if unknown or not found:
        raise ConfigError(
            f"--env.task is unknown: {short(', '.join(unknown) or 'nothing')}; choose {choose}."
        )
    return found
