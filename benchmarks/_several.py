"""The page of `bench_tree_prefill.py`: a prompt and tokens over several GPUs, ours and the ring's."""

from collections.abc import Iterable

from _figures import OURS, THEIRS, has_line, legend_below, set_lengths
from _tables import Result, failure, length_name, table, values

FORMS = {
    "tree": "`prepare_generation`",
    "tree-eager": "`prepare_generation(cuda_graph=False)`",
    "ring": "ring attention",
}
COLOURS = {"tree": OURS, "tree-eager": "#7fb0d8", "ring": THEIRS}
TIMES = {"first_token_s": "first token, s", "token_ms": "a token, ms", "total_s": "all, s"}
COSTS = {
    "peak_gib": "peak, GiB",
    "extra_gib": "beyond weights and cache, GiB",
    "prompt_received_mib": "received for the prompt, MiB",
    "token_received_kib": "for a token, KiB",
    "tflop_a_rank": "work of the prompt, TFLOP a GPU",
    "message_gb_per_s": "messages alone, GB/s",
}
WORDS = (
    "The ring passes keys and values on in every layer, for the prompt and for every token: its own key "
    "heads, K and V in one message that travels beside attention, a zigzag share of the tokens, the same "
    "kernels. Its step is not captured in a CUDA graph, so `cuda_graph=False` is what to hold its time a "
    "token against where messages are short."
)
RECEIVED = (
    "What is received is what one GPU gets from the others: from the ring keys and values, always; here, "
    "for a chunk of the prompt, those or queries and partial results, whichever is fewer bytes, and partial "
    "results for a token."
)


def ring_of(result: Result, row: dict) -> dict:
    """The ring's row of the same prompt on as many GPUs, empty where there is none."""
    rings = result.where(peer="ring", prompt=row["prompt"], ranks=row["ranks"]).rows
    return next((ring for ring in rings if "error" not in ring), {})


def prefill_text(result: Result) -> str:
    """Seconds for the prompt and the tokens, how many times those the ring takes, memory and bytes."""
    layers = ", ".join(values(result.rows, "layers"))
    tokens = ", ".join(values(result.rows, "new_tokens"))
    intro = (
        f"A prompt and {tokens} tokens, greedy, batch 1, the shape of Llama-3.1-8B with {layers} layers, "
        "random weights, bf16. K is 1024 tokens."
    )
    head = ["prompt", "GPUs", "form"]
    times = [[*name_cells(row), *field_cells(row, TIMES), ring_ratio(result, row)] for row in result.rows]
    costs = [[*name_cells(row), *field_cells(row, COSTS)] for row in result.rows if "error" not in row]
    parts = [
        "## Times", f"{intro} {WORDS}", table([*head, *TIMES.values(), "ring ÷ this"], times),
        "## Memory and messages", RECEIVED, table([*head, *COSTS.values()], costs),
    ]  # fmt: skip
    return "\n\n".join(parts)


def name_cells(row: dict) -> list:
    """What a row is."""
    return [length_name(row["prompt"]), row["ranks"], FORMS.get(row["peer"], row["peer"])]


def field_cells(row: dict, fields: Iterable[str]) -> list:
    """Its numbers; what went wrong stands in the place of the first."""
    found = [row.get(field) for field in fields]
    return [failure(row), *found[1:]] if "error" in row else found


def ring_ratio(result: Result, row: dict) -> float | None:
    """How many times as long the ring takes in all."""
    ring = ring_of(result, row).get("total_s")
    return ring / row["total_s"] if ring is not None and "total_s" in row else None


def has_prefill(result: Result) -> bool:
    """Whether a form read two lengths."""
    return has_line([row for row in result.rows if "total_s" in row], "prompt", "peer", "ranks")


def draw_prefill(result: Result, axes: list) -> None:
    """Seconds in all, and time a token, against the prompt."""
    for axis, field, title in zip(
        axes, ("total_s", "token_ms"), ("prompt and all tokens, s", "time a token, ms"), strict=True
    ):
        for peer in values(result.rows, "peer"):
            points = sorted((r["prompt"], r[field]) for r in result.where(peer=peer).rows if field in r)
            if points:
                label = FORMS.get(peer, peer).replace("`", "")
                axis.plot(*zip(*points, strict=True), marker="o", label=label, color=COLOURS.get(peer))
        set_lengths(axis, [row["prompt"] for row in result.rows])
        axis.set(xlabel="prompt, tokens", title=title, ylim=(0, None))
    legend_below(axes[0])
