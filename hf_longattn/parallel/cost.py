"""What the reduction of a decoding step costs on paper: latency and volume by the number of ranks.

A step joins (output, log-sum-exp) of every rank by one packed all-gather a level of the group. A level of p
ranks takes

    seconds = start + (p - 2) * hop + (p - 1) * bytes / rate                      p >= 2

`start` is what the gather and the merge add to a captured step of two GPUs; the hops of larger groups follow
NCCL's ring. Nodes are joined after the GPUs inside them, so that 16 nodes of 8 receive 7 + 15 messages.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Links:
    """What connects the ranks.

    Args:
        start: seconds that a gather of two GPUs and its merge add to a captured step; measured with two H100.
        hop: seconds that each further GPU of a node adds; an assumption.
        node_hop: seconds of a step from node to node; an assumption.
        rate: bytes a second that a GPU receives from another of its node; measured with two H100.
        node_rate: bytes a second that a GPU receives from another node; an assumption.
        node_size: GPUs a node.
    """

    start: float = 13.7e-6
    hop: float = 2e-6
    node_hop: float = 6e-6
    rate: float = 350e9
    node_rate: float = 40e9
    node_size: int = 8

    def levels(self, ranks: int) -> list[tuple[int, float, float, float]]:
        """(ranks, start, hop, rate) of each level, innermost first.

        Args:
            ranks: of the whole group; whole nodes where there are several.
        """
        inside = min(ranks, self.node_size)
        levels = [(inside, self.start, self.hop, self.rate)]
        if ranks > inside:
            levels.append((-(-ranks // inside), self.start, self.node_hop, self.node_rate))
        return [level for level in levels if level[0] > 1]


def message_bytes(batch_size: int, heads: int, width: int, itemsize: int = 2) -> int:
    """Bytes of one rank's packed partial result for one token and layer: (B, H, V) and an fp32 lse a head.

    Args:
        batch_size: sequences.
        heads: query heads.
        width: V.
        itemsize: bytes of one value.
    """
    return batch_size * heads * (width * itemsize + 4)


def received_bytes(message: int, ranks: int, links: Links) -> int:
    """Bytes that a rank receives in one reduction.

    Args:
        message: bytes of one rank's partial result.
        ranks: that join.
        links: between them.
    """
    return sum((level[0] - 1) * message for level in links.levels(ranks))


def reduction_seconds(message: int, ranks: int, links: Links) -> float:
    """Seconds that one reduction adds to a captured step.

    Args:
        message: bytes of one rank's partial result.
        ranks: that join; 0.0 for one.
        links: between them.
    """
    return sum(
        start + (count - 2) * hop + (count - 1) * message / rate
        for count, start, hop, rate in links.levels(ranks)
    )
