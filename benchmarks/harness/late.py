"""Make vla-eval run live episodes again in which the clock was late.

    python -m benchmarks.harness.late FOLDER_OF_A_RUN

A step of the environment that takes longer than its period, because the machine does something
else, stretches the time that a policy has. `recipes/libero_harness.sh` calls this before it resumes
a live run.
"""

from __future__ import annotations

import json
import sqlite3
import sys
from contextlib import closing
from pathlib import Path

from benchmarks.harness.results import LATE, read_options, result_file

_WAITS = "UPDATE work_queue SET done = 0, shard_id = NULL WHERE eval_id = ? AND item = ?"


def forget_late(folder: Path) -> int:
    """Remove late episodes from a run that is not in progress; returns how many there were."""
    options = read_options(folder)
    limit = LATE * 1000 / 20 * float(options["slower"])
    forgotten = 0
    for file in folder.glob("recording-*.sqlite"):
        with closing(sqlite3.connect(file)) as database, database:
            tables = "SELECT name FROM sqlite_master WHERE type = 'table'"
            if ("episode_results",) not in database.execute(tables).fetchall():
                continue
            rows = database.execute(
                "SELECT sid, eid, eval_id, metrics, context FROM episode_results"
            )
            for sid, eid, run, metrics, context in rows.fetchall():
                if json.loads(metrics or "{}").get("longest_tick_ms", 0) <= limit:
                    continue
                place = json.loads(context)
                item = place["task_idx"] * int(options["episodes"]) + place["episode_idx"]
                for table in ("step_rows", "episode_results"):
                    database.execute(f"DELETE FROM {table} WHERE sid = ? AND eid = ?", (sid, eid))
                database.execute(_WAITS, (run, item))
                database.execute("UPDATE eval_shards SET complete = 0 WHERE eval_id = ?", (run,))
                forgotten += 1
    exported = result_file(folder)
    if forgotten and exported is not None:  # it has the late episodes
        exported.unlink()
    return forgotten


if __name__ == "__main__":
    print(f"{forget_late(Path(sys.argv[1]))} late episodes run again")
