# /// script
# requires-python = ">=3.10"
# dependencies = []
# ///
"""Starts ``ceed-vla serve`` where vla-eval expects a script of a model server.

`vla-eval serve` and `vla-eval test` run `uv run SCRIPT --port=N --args.KEY=VALUE ...` with the
`args` of their configuration; all but `python`, the interpreter, are flags of ``ceed-vla serve``.
Without the lines above, uv would take this repository for the script's project.
"""

import os
import sys

flags = dict(flag.removeprefix("--").split("=", 1) for flag in sys.argv[1:])
python = flags.pop("args.python")
command = [python, "-m", "ceed_vla.cli", "serve", "--protocol=vla_eval"]
command += [f"--{name.removeprefix('args.')}={value}" for name, value in flags.items()]
os.execv(python, command)
