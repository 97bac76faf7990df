"""Sentences and column names for pages that show their rows as they are.

A page is looked up by the beginning of its name, a sentence by its section; what is not listed is shown
under the names of its fields.
"""

from typing import Any

# What stands in the result files and says nothing to a reader of the page.
HIDDEN = {
    "block_transformer": ("copy_rate", "matmul_rate", "floor_s", "floor_prompt_s", "share_of_floor"),
    "lightning_attention": ("role", "tiling", "cut"),
    "demo": ("agree",),
    "questions": ("copy_rate", "layers"),
}

COLUMNS = {
    "block_transformer": {
        "peer": "set up by", "shape": "model", "new": "new tokens", "floor_tokens_per_s": "floor, tokens/s",
        "prompt_s": "prompt, s", "total_s": "all, s", "tokens_per_s": "tokens/s",
        "first_call_s": "first call, s", "second_call_s": "second call, one token, s",
        "capture_s": "of it once only, s", "step_ms": "a token, ms", "peak_gib": "peak, GiB",
    },
    "tree_decode": {
        "eager_us": "eager, µs", "graph_us": "graph, µs", "extra_mib": "beyond the shard, MiB",
        "gb_per_s": "GB/s",
    },
    "lightning_attention": {
        "kv": "key/value heads", "options": "set to False", "ratio": "over the standard", "o": "output",
        "peer": "system", "ms": "ms", "floor": "floor, ms", "over_floor": "time ÷ floor", "gib": "peak, GiB",
        "backward": "with backward",
    },
    "cross_entropy": {
        "case": "rows and vocabulary", "smoothing": "label smoothing", "standard_loss": "loss, standard",
        "gradient_error": "gradient", "standard_gradient": "gradient, standard", "gradient": "gradient is",
        "floor": "floor, ms", "over_floor": "time ÷ floor", "extra_mib": "beyond the logits, MiB",
    },
    "demo": {
        "peer": "implementation", "prompt": "prompt, tokens", "first_token_s": "first token, s",
        "token_ms": "a token, ms", "peak_gib": "peak, GiB", "needle_found": "number found",
        "verdict": "compared",
    },
    "questions": {
        "peer": "questions are", "question_tokens": "tokens of each", "first_token_s": "first token, s",
        "new_shape_first_token_s": "first token of a new shape, s",
        "token_ms": "a token, ms", "floor_ms": "floor, ms", "peak_gib": "peak, GiB",
        "same_tokens_as_alone": "tokens as alone",
    },
    "blockwise_attention_tune": {"config": "queries, keys, warps, stages"},
}  # fmt: skip

SENTENCES = {
    "block_transformer": {
        None: (
            "`generate()` of a Block Transformer with random weights; `block` is after `prepare_generation`."
            " 12 layers of width 2048 in each decoder, blocks of 4 tokens, bf16, greedy, prompts of equal "
            "length. Times are those of the third call of a shape, the prompt included; the first call also "
            "compiles and captures. The floor is the larger of bytes over the copy rate and operations over "
            "the rate of a large matrix product, for the prompt and for each step, with the rates of the "
            "same run."
        ),
    },
    "questions": {
        None: (
            "Questions about one document that a cache holds, the shape of Llama-3.1-8B, random weights, "
            "bf16, greedy: `alone` asks one, `shared` asks all of them at once on `cache.fork(rows=n)`, "
            "which reads the document's keys and values once for all, `repeated` on a cache that repeats "
            "the document for each. The floor is the time to move weights and cache once at the copy rate "
            "of the same run. A batch multiplies in another order than one row: in bf16 a tie between two "
            "logits of random weights may fall either way."
        ),
    },
    "tree_decode": {
        None: (
            "One decoding step of one attention layer over a cache that is cut along the sequence: 32 query "
            "heads, 8 key/value heads, head dim 128, bf16; a case is the keys on all GPUs together (S) and "
            "the batch (B). `ours` is `decode_attention` and one kernel that reads the other GPU's part and "
            "merges; `all-gather` joins by one packed all-gather of NCCL; `paper` by the three all-reduces "
            "of arXiv 2408.04093; `ring` sends keys and values round; `local` attends the rank's own keys "
            "and joins nothing, `flash` does so by torch's flash kernel; `rate` is the ring's messages "
            "alone. Times are the median over rounds of the slowest rank, launched eagerly and from a CUDA "
            "graph."
        ),
    },
    "lightning_attention": {
        "check": (
            "Relative errors of the output and the three gradients against fp64. The standard is plain torch"
            " in fp32 on the same inputs, rounded to the dtype at the end; at most 1.5 times its error "
            "passes."
        ),
        "split": (
            "Error of the output in bf16 by what is multiplied as a sum of two bf16 numbers, to be rounded "
            "less. `split` adds up 1 (scores), 2 (state), 4 (decayed values) and 8 (a quarter of the state)."
        ),
        "segments": (
            "Errors in fp32 of a row of 65,613 tokens that is cut in segments, and those in blocks, of so "
            "many tokens."
        ),
        "packed": ("Error in fp32 of packed documents, an empty one and one of a single token among them."),
        "million steps": (
            "Relative error of the state after 2^20 single steps, for slopes of 0.84, 3.9e-3, 3.9e-5 and "
            "3.9e-8."
        ),
        "forward": (
            "Time of the forward in bf16, slopes of TransNormerLLM's first layer. The floor is the time to "
            "move the inputs and outputs once at the rate of a copy of the same size."
        ),
        "backward": (
            "Forward and backward together; their floor moves fourteen such tensors, that of a forward four."
        ),
        "decode": "`lightning_attention_step`: one token a row, the state in place.",
        "peers": (
            "The same inputs in flash-linear-attention's kernel, and in causal softmax attention by cuDNN, "
            "which is another function of them and costs the square of the length."
        ),
    },
    "cross_entropy": {
        "check": (
            "Relative errors of losses and gradient against fp64, the largest of all ways to take them. The "
            "standard is torch in fp32 on the same logits, its gradient rounded to their dtype; at most 1.5 "
            "times its error and one rounding passes. Without label smoothing, half of one row is -inf."
        ),
        "time": (
            "The summed loss of random logits in bf16. `cross_entropy` takes it with the gradient over the "
            "logits, apart (in memory of its own), or not at all; torch takes `F.cross_entropy` of an fp32 "
            "copy, and goes backward for the gradient, as models of transformers do; Liger is "
            "`liger_cross_entropy` forward and backward, and the waits for the device in it count. The floor "
            "reads each logit once and writes each gradient once, at the rate of a copy of the same logits "
            "in the same run. The last column is what a call takes at its peak."
        ),
    },
    "demo": {
        None: (
            "What `make demo` does, with pretrained weights and a real text: SmolLM2-135M-Instruct in bf16 "
            "reads the begin of the King James Bible, in which a number is hidden at 40 %, is asked for it, "
            "and answers greedily with 16 tokens; with `tree_attention` and `prepare_generation`, and with "
            "`sdpa` as transformers has it. Each answers twice, and the second answer is timed; the time a "
            "token is the median. A model this small takes longer to launch than to compute: that is what "
            "a captured step leaves out, and what a prepared call takes to begin makes its first token the "
            "later one. The [generation page](generation.md) has a model of 8B."
        ),
    },
    "blockwise_attention_tune": {
        "tune": (
            "Time of each Triton kernel of `blockwise_attention` by its tiles, 16K tokens under a window of "
            "half of them."
        ),
        "best": "The fastest of each.",
    },
}


def of_page(words: dict, name: str) -> Any:
    """The entry of the longest key that a page's name begins with, or an empty one."""
    keys = [key for key in words if name.startswith(key)]
    return words[max(keys, key=len)] if keys else {}
