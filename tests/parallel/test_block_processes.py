"""The blocks of one prompt over several processes: the tokens of one."""

from pathlib import Path

import preloaded
import pytest
import torch

from hf_longattn.cache.placement import Placement
from hf_longattn.modeling.block_transformer.cache_block_transformer import BlockLayer, BlockWrite
from hf_longattn.modeling.block_transformer.shared import SharedBlockLayer

CASES = Path(__file__).parent / "block_cases.py"
RUNS = [("2", ("few", "shares", "refusals")), ("3", ("more", "shares"))]


@pytest.mark.slow
@pytest.mark.parametrize(("sizes", "topics"), RUNS)
def test_equals_one_process(sizes, topics):
    preloaded.run(CASES, sizes, *topics)


def test_every_key_lies_on_one_rank():
    """Even blocks, rows at places of their own, and places that are taken back and filled again."""
    whole = BlockLayer()
    parts = [SharedBlockLayer(None, Placement(rank, 3)) for rank in range(3)]
    every, some = torch.tensor([0, 0, 0]), torch.tensor([0, 2])
    writes = [BlockWrite(every, 70), BlockWrite(torch.tensor([70, 65, 31]), 1)]
    writes += [BlockWrite(torch.tensor([71, 32]), 40, some), None, BlockWrite(torch.tensor([60, 60, 60]), 50)]
    for write in writes:
        if write is None:
            for layer in (whole, *parts):
                layer.truncate(60)
            continue
        rows = 3 if write.rows is None else len(write.rows)
        states = torch.randn(2, rows, 2, write.count, 4).unbind()
        expected = whole.update(*states, write=write, batch_size=3)
        found = [torch.full_like(each, torch.nan) for each in expected]
        for layer in parts:
            key, value = layer.update(*states, write=write, batch_size=3)
            for each, share in zip(found, (key.held, value), strict=True):
                each[:, :, layer.positions(share.device)] = share
        for ours, theirs in zip(found, expected, strict=True):
            assert torch.equal(ours, theirs)
    assert sum(layer.used for layer in parts) == whole.length == 110
