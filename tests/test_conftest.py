"""What every test gets."""

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table

MAKERS = {
    "empty": lambda x: torch.empty(x.shape),
    "empty-like": lambda x: torch.empty_like(x, memory_format=torch.contiguous_format),
    "new-empty": lambda x: x.new_empty(x.shape),
    "new-empty-of-another-kind": lambda x: x.double().new_empty(2, 3, dtype=torch.float32),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_memory_that_nothing_wrote_is_nan_compiled_too(make):
    assert make(torch.ones(2, 3)).isnan().all()
    targets = []

    def compiled(graph, inputs):
        targets.extend(node.target for node in graph.graph.nodes)
        return graph

    backend = aot_autograd(fw_compiler=compiled, decompositions=select_decomp_table())
    torch._dynamo.reset()
    with torch.no_grad():
        result = torch.compile(make, fullgraph=True, backend=backend)(torch.ones(2, 3))
    torch._dynamo.reset()
    assert targets.count(torch.ops.aten.full.default) == 1
    assert result.isnan().all() and result.dtype == torch.float32
