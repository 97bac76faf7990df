"""Scripts of cases, forked from one process that has done their imports, which take seconds each time."""

import atexit
import json
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

FORK = multiprocessing.get_context("fork")
_servers = []


def run(script, *arguments, timeout=280):
    """Runs `python SCRIPT ARGUMENTS...`, asserts that it succeeds, and returns what it printed."""
    with tempfile.TemporaryDirectory() as folder:
        out, error = Path(folder, "out"), Path(folder, "error")
        out.touch(), error.touch()
        code = _ask([str(script), *map(str, arguments)], str(out), str(error), timeout)
        printed = out.read_text()
        assert code == "0", f"exit code {code}\n{printed}{error.read_text()[-6000:]}"
    return printed


def _ask(*request):
    server = _server()
    try:
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        return server.stdout.readline().strip()
    except BaseException:
        # A test that is interrupted leaves no answer behind that the next one would read.
        server.kill()
        _servers.clear()
        raise


def _server():
    """The process of this one that forks scripts."""
    if not _servers:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        # It ends where its input does.
        _servers.append(subprocess.Popen([sys.executable, __file__], **pipes))
        atexit.register(_servers[0].stdin.close)
    return _servers[0]


def _play(arguments, out, error):
    for stream, path in ((1, out), (2, error)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream)
    sys.argv, sys.path[0] = arguments, str(Path(arguments[0]).parent)
    runpy.run_path(arguments[0], run_name="__main__")


def _serve(answers):
    for line in sys.stdin:
        *job, timeout = json.loads(line)
        process = FORK.Process(target=_play, args=job)
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
        print(process.exitcode, file=answers, flush=True)


if __name__ == "__main__":
    import tiny  # noqa: F401

    import hf_longattn  # noqa: F401

    _serve(sys.stdout)
