"""The join through memory that GPUs read from each other, without a GPU: its protocol and its instructions.

`tests/gpu/test_peers_gpu.py` has the same on the device.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import test_aot
from aot import compile_sm90

from hf_longattn.kernels.merge_partials import triton_peers

CASES = Path(__file__).with_name("peer_cases.py")


@pytest.mark.parametrize("sizes", ["3", pytest.param("2,8", marks=pytest.mark.slow)], ids="P{}".format)
def test_every_rank_has_the_bits_of_the_merge(sizes):
    result = subprocess.run([sys.executable, str(CASES), sizes], capture_output=True, text=True, timeout=250)
    assert result.returncode == 0, result.stdout + result.stderr[-4000:]


@pytest.mark.parametrize("ranks", [2, 4])
def test_flags_order_what_is_read(ranks):
    case = test_aot._pull_merge(ranks, 128, "bf16")
    ptx = compile_sm90(triton_peers._pull_merge_kernel, case.signature, case.constexprs).ptx
    steps = re.findall(r"(atom\.\S+|ld\.volatile\.global\.v2\S*|st\.global\.v2\S*|bar\.sync)", ptx)
    steps = [step.rstrip(";") for step in steps]
    releases = [i for i, step in enumerate(steps) if step.startswith("atom.") and ".release" in step]
    acquires = [i for i, step in enumerate(steps) if step.startswith("atom.") and ".acquire" in step]
    reads = [i for i, step in enumerate(steps) if step.startswith("ld.volatile")]
    stores = [i for i, step in enumerate(steps) if step.startswith("st.global")]
    assert all(".sys" in steps[i] for i in (*releases, *acquires)), steps
    # Own rows in whole vectors, all threads, the flags; then the flags of the others, and all rows.
    assert len(reads) == ranks, "a row is read once a rank, in whole vectors"
    ready = [i for i in releases if stores[0] < i < reads[0]]
    assert ready and "bar.sync" in steps[stores[0] : ready[0]]
    taken = [i for i in acquires if ready[-1] < i < reads[0]]
    assert taken and "bar.sync" in steps[taken[-1] : reads[0]]
    between = steps[reads[0] : reads[-1]]
    assert not any(step.startswith(("atom", "bar")) for step in between), "one way to the peers and back"
