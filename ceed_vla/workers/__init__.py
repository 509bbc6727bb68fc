"""Work that is shared: by this process alone, by processes of this machine, or by a Ray cluster.

    interface.py   `Workers`, which every command uses, and the work in this process
    schedule.py    who works on what, and what happens if a worker is lost
    local.py       processes of this machine
    cluster.py     Ray actors; nodes.py finds the nodes, shipped.py sends checkpoints to them
    opening.py     the choice, by the options of a command

No command knows which of them runs its work.
"""

from ceed_vla.workers.interface import Workers
from ceed_vla.workers.local import close_input, prepare
from ceed_vla.workers.opening import MOST, ClusterConfig, open_workers

__all__ = ["MOST", "ClusterConfig", "Workers", "close_input", "open_workers", "prepare"]
