"""`ceed-vla <command> [--flag value ...]`: one entry for the whole pipeline.

A command's module, and with it torch or MuJoCo, is imported when that command runs. Exit codes: 0
done, 1 an error that the message explains, 2 wrong usage, 130 interrupted. Every error is one line.
"""

from __future__ import annotations

import errno
import importlib
import logging
import os
import re
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path

from ceed_vla import __version__
from ceed_vla.build_info import commit
from ceed_vla.cli.commands import COMMANDS, Command, config_of
from ceed_vla.cli.flags import parse_flags, take_packages
from ceed_vla.cli.help import Page, format_help, installed_environments
from ceed_vla.cli.values import UsageError
from ceed_vla.discovery import discover
from ceed_vla.errors import CeedVLAError, is_failure
from ceed_vla.extras import MissingExtraError, explained, require
from ceed_vla.invocation import invoked
from ceed_vla.workers import prepare

PROGRAM = "ceed-vla"
TRACEBACK = "CEED_VLA_TRACEBACK"
_ON, _OFF = ("1", "true", "yes", "on"), ("", "0", "false", "no", "off")
LONGEST_MESSAGE = 1500


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command, of `sys.argv` if `arguments` is None, and return the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help", "help"):
        print(overview())
        return 0 if words else 2
    if words[0] in ("-V", "--version"):
        built = commit()
        print(f"{PROGRAM} {__version__}{f' (commit {built})' if built else ''}")
        return 0
    if len(words) > 1 and f"{words[0]}-{words[1]}" in COMMANDS:
        words[:2] = [f"{words[0]}-{words[1]}"]
    name = words[0]
    flags = words[1:]
    if name not in COMMANDS:
        close = get_close_matches(name, COMMANDS, n=1)
        guess = f" (did you mean {close[0]}?)" if close else ""
        return _complain(
            PROGRAM, f"unknown command {name!r}{guess}; choose one of {', '.join(COMMANDS)}", 2
        )
    if sys.platform == "linux":
        os.environ.setdefault("MUJOCO_GL", "egl")  # renders without a screen
    # set before the hub's library is imported: commands never use the hub
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    _configure_logging()
    if os.environ.get(TRACEBACK, "").lower() not in (*_ON, *_OFF):
        print(
            f"{PROGRAM}: {TRACEBACK} is {os.environ[TRACEBACK][:20]!r}; 1 shows tracebacks, 0 "
            "does not",
            file=sys.stderr,
        )
    if arguments is None and not tracebacks():
        # errors in destructors have no effect on the result
        sys.unraisablehook = lambda _: None
    several_workers = re.search(r"--workers[= ](?!1( |$))", " ".join(flags))
    if several_workers and not _help(flags):  # the workers' imports run in parallel with these
        prepare(COMMANDS[name].where.split()[0])
    return run(name, COMMANDS[name], flags)


def tracebacks() -> bool:
    """Whether the environment requests tracebacks."""
    return os.environ.get(TRACEBACK, "").lower() in _ON


def _configure_logging() -> None:
    """Show progress of this package and warnings of others, one line each.

    LeRobot's remarks on missing accelerators are filtered out.
    """
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("ceed_vla").setLevel(logging.INFO)
    for handler in logging.getLogger().handlers:
        handler.addFilter(_is_for_the_user)


def _is_for_the_user(record: logging.LogRecord) -> bool:
    if not tracebacks():
        record.exc_info = record.exc_text = record.stack_info = None
    return record.levelno >= logging.ERROR or "lerobot" not in Path(record.pathname).parts


def overview() -> str:
    """The text of `ceed-vla --help`."""
    rows = "\n".join(f"  {name:<16}{command.summary}" for name, command in COMMANDS.items())
    return (
        f"usage: {PROGRAM} <command> [--flag value ...]\n\nVision-language-action policies that "
        f"decode their action tokens in parallel.\n\ncommands:\n{rows}\n\n{PROGRAM} <command> "
        f"--help explains the most important flags, --help=all every flag; {PROGRAM} --version "
        f"prints the version.\n{TRACEBACK}=1 in the environment shows the traceback of an error."
    )


def run(name: str, command: Command, flags: Sequence[str]) -> int:
    """Run a command with its flags, report errors on stderr, and return the exit code.

    A `name` that is no command of ceed-vla is a module, which `python -m` runs.
    """
    program = f"{PROGRAM} {name}" if name in COMMANDS else f"python -m {name}"
    typed = [*program.split(), *flags]
    config = None
    try:
        packages, flags = take_packages(flags)
        discover(packages)
        wanted = _help(flags)
        if wanted:
            # Packages may add choices of flags, which the stored page lacks.
            stored = None if packages else Page.stored(name)
            page = stored or Page.of(config_of(command), command.renamed)
            groups = (command.positional, command.must.split(), command.may.split())
            print(format_help(program, page, *groups, everything=wanted == "all"))
            installed = ", ".join(installed_environments())
            if installed and any(flag[0] == "env.type" for flag in page.flags):
                print(f"\nInstalled here, with further environments for --env.type: {installed}")
            return 0
        require(program, *command.extras.split())
        config = parse_flags(config_of(command), flags, command.positional, command.renamed)
        module, _, function = command.where.split()
        more = config.arguments() if command.simulator else {}
        with invoked(typed):
            result = getattr(importlib.import_module(module), function)(config, **more)
        if not isinstance(result, dict | None):  # a dict is a report that is already printed
            print(result)
    except UsageError as error:
        return _complain(program, f"{error} ({program} --help lists the flags)", 2)
    except KeyboardInterrupt:
        kept = (
            command.kept.format_map(vars(config)) if config is not None else "nothing was started"
        )
        print(f"\n{program}: interrupted; {kept}", file=sys.stderr)
        return 130
    except BaseException as error:
        if tracebacks() or not is_failure(error):
            raise
        return _complain(program, explain(error), 1)
    return 0


def _help(flags: Sequence[str]) -> str:
    """Which help the flags request: "some" or "all"; empty for none."""
    for word, following in pairwise([*flags, ""]):
        if word in ("-h", "--help", "--help=all"):
            return "all" if "all" in (following, word.partition("=")[2]) else "some"
    return ""


def explain(error: BaseException) -> str:
    """One line about an exception for the user, with a remedy if there is one."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename is not None else ""
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "; free space there, complete files stay" if full else ""
        return f"{where}{error.strerror}{remedy}"
    if isinstance(error, CeedVLAError | OSError):
        return text
    if type(error).__name__ == "SafetensorError":
        return (
            f"weights cannot be read or written ({text}); check that the file is complete and that "
            "the disk has room"
        )
    if isinstance(error, MemoryError) or "out of memory" in text or "allocate memory" in text:
        return f"not enough memory ({text or 'MemoryError'}); use a smaller batch, model or image"
    if isinstance(error, RecursionError):
        return "an input is nested too deep"
    if isinstance(error, ImportError):
        known = isinstance(error, ModuleNotFoundError) and explained("this", error)
        if isinstance(known, MissingExtraError):
            return str(known)
        return f"{text}; `{PROGRAM} doctor` lists what this installation lacks"
    return (
        f"unexpected {type(error).__name__}: {text} (this is a defect or damaged input; "
        f"{TRACEBACK}=1 shows where)"
    )


def _complain(program: str, message: str, code: int) -> int:
    """Print one line on stderr, without control characters; return `code`."""
    line = "".join(c if c.isprintable() else "?" for c in " ".join(message.split()))
    line = line if len(line) <= LONGEST_MESSAGE else f"{line[:LONGEST_MESSAGE]} ..."
    print(f"{program}: error: {line}", file=sys.stderr)
    return code
