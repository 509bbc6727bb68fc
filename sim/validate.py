"""Success of one checkpoint on a range of seeds, as one JSON line.

python -m sim.validate POLICY FIRST_SEED EPISODES [DECODER]
"""

from __future__ import annotations

import json
import sys
from collections import Counter

import ceed_vla
from ceed_vla.errors import CeedVLAError
from sim.rollout import rollout


def main(arguments: list[str]) -> int:
    """Run the episodes and print ``{"successes": ..., "episodes": ..., "per_task": ...}``."""
    if len(arguments) not in (3, 4) or not all(number.isdecimal() for number in arguments[1:3]):
        print(f"usage: {(__doc__ or '').strip().splitlines()[-1]}", file=sys.stderr)
        return 2
    policy, first, count, *decoder = arguments
    try:
        results = rollout(
            ceed_vla.load(policy),
            range(int(first), int(first) + int(count)),
            decoding=decoder[0] if decoder else "ceed",
            split="train",
        )
    except (CeedVLAError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    tries, wins = Counter(r.task for r in results), Counter(r.task for r in results if r.success)
    per_task = {task: [wins[task], tries[task]] for task in sorted(tries)}
    summary = {"successes": sum(r.success for r in results), "episodes": len(results), "per_task": per_task}
    print(json.dumps(summary))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
