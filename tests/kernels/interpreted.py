"""Running the tests of a file under Triton's interpreter, which must be chosen before triton is imported."""

import os
import subprocess
import sys


def run_under_interpreter(path, names="interpreter"):
    """Runs the tests of the file at `path` that have `names` in their names, in another process."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", names, path]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:]
