"""Console commands that fork from a process which has imported torch, LeRobot and this package.

A page of shell commands starts a dozen of them, and ten of the twelve seconds that a small one
takes are imports. In a shell whose PATH is `path()`, the console scripts `ceed-vla` and LeRobot's
run in a fork of that process, with the shell's words, environment, working directory and streams.
Run as a program, this file is that process.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import importlib.metadata
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

SCRIPTS = ("ceed-vla", "lerobot-train", "lerobot-eval")
_servers: list[subprocess.Popen[str]] = []  # each ends when its standard input closes
# Installed under the name of every script: it sends arguments, directory, environment and streams
# to the server, and returns the exit code.
CLIENT = """#!{python} -IS
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    made_of = [os.path.basename(sys.argv[0]), sys.argv[1:], os.getcwd(), dict(os.environ)]
    socket.send_fds(server, [b"."], [0, 1, 2])
    server.sendall(json.dumps(made_of).encode())
    server.shutdown(socket.SHUT_WR)
    sys.exit(int(server.recv(16) or 1))
"""


def path() -> str:
    """The environment's PATH behind the warm scripts and this Python's own."""
    return os.pathsep.join(
        [str(_folder()), str(Path(sys.executable).parent), os.environ.get("PATH", "")]
    )


@functools.cache
def _folder() -> Path:
    """Start the process and return the folder of its scripts; both last as long as this process."""
    made = Path(tempfile.mkdtemp(prefix="warm-"))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    address = str(made / "socket")
    for name in SCRIPTS:
        (made / name).write_text(CLIENT.format(python=sys.executable, address=address))
        (made / name).chmod(0o755)
    command = [sys.executable, "-W", "ignore::DeprecationWarning", __file__, address]
    server = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # a process with threads should not fork
    )
    _servers.append(server)
    assert server.stdout is not None
    assert server.stdout.readline() == "ready\n"
    return made


def serve(address: str) -> None:
    """Run commands until standard input ends, that is until the process that started this ends."""
    entries = {name: _entry(name) for name in SCRIPTS}
    gc.collect()
    gc.freeze()  # a fork's collections need not visit, and copy, what is imported
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address)
        server.listen()
        print("ready", flush=True)
        if not os.fork():
            sys.stdin.read()
            os.kill(os.getppid(), signal.SIGTERM)
            os._exit(0)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for what the loop forks
        while True:
            connection = server.accept()[0]
            with connection:
                if not os.fork():
                    server.close()
                    _run(connection, entries)


def _entry(name: str) -> importlib.metadata.EntryPoint:
    """Return the entry point of a console script; its modules are imported then."""
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name=name)
    entry.load()
    if name == "ceed-vla":
        from ceed_vla.cli.commands import COMMANDS

        for command in COMMANDS.values():
            with contextlib.suppress(ImportError):  # of an extra that is not installed
                importlib.import_module(command.where.split()[0])
    return entry


def _run(connection: socket.socket, entries: dict[str, importlib.metadata.EntryPoint]) -> None:
    """Run one command in a child, send its exit code and end."""
    _, streams, _, _ = socket.recv_fds(connection, 1, 3)
    with connection.makefile("rb") as sent:
        name, words, directory, environment = json.loads(sent.read())
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if child := os.fork():
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        connection.sendall(str(code if code >= 0 else 128 - code).encode())
        os._exit(0)
    connection.close()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(environment)
    import torch

    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    sys.argv = [name, *words]
    sys.path[0] = str(Path(sys.executable).parent)
    sys.path[1:1] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    try:
        code = entries[name].load()()
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        traceback.print_exc()
        code = 1
    if isinstance(code, str):
        print(code, file=sys.stderr)
    # Freeing what was imported before the fork takes two seconds, and libraries crash at it.
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


if __name__ == "__main__":
    serve(sys.argv[1])
