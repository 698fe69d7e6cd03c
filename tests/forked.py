"""`python -m pruneflow` in processes of their own, without the seconds that imports take.

One process imports everything and forks for each run. What a run does until it exits is its own.
"""

import atexit
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_SERVER = """
import gc, json, os, runpy, sys
import pruneflow.run.cli

gc.freeze()  # what is imported is not collected anew in each process
for line in sys.stdin:
    arguments, cwd, folder = json.loads(line)
    child = os.fork()
    if child == 0:
        for number, name in enumerate(("stdin", "stdout", "stderr")):
            path = os.devnull if number == 0 else f"{folder}/{name}"
            os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
        os.chdir(cwd)
        sys.argv[1:] = arguments
        runpy.run_module("pruneflow", run_name="__main__", alter_sys=True)
        sys.exit()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@dataclass
class Run:
    """What became of a run."""

    returncode: int
    stdout: str
    stderr: str


def run(*arguments, cwd):
    """Run `python -m pruneflow` with these arguments in a folder."""
    server = _server()
    with tempfile.TemporaryDirectory() as folder:
        server.stdin.write(json.dumps([arguments, str(cwd), folder]) + "\n")
        server.stdin.flush()
        returncode = int(server.stdout.readline())
        said = ((Path(folder) / name).read_text() for name in ("stdout", "stderr"))
        return Run(returncode, *said)


@cache
def _server():
    server = subprocess.Popen(
        [sys.executable, "-c", _SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    atexit.register(server.communicate)
    return server
