"""What waits on the host, where no memory is pinned."""

from torch.utils._python_dispatch import _disable_current_modes

from hf_longattn.training.offload import Offloader


class Host:
    """Stands in for pinned memory, which is none of the GPU's."""

    def __init__(self, layout):
        self.parts = [None] * len(layout.rows)

    def write(self, index, block):
        with _disable_current_modes():
            self.parts[index] = block.clone()

    def settle(self):
        pass

    def read(self, order):
        return (self.parts[index] * 1 for index in order)

    def release(self):
        self.parts = []


def keep_on_host(monkeypatch):
    """Has every tensor that a layer keeps wait there, on a CPU too."""
    monkeypatch.setattr(Offloader, "keep", lambda self, layout, *rest, **options: Host(layout))
