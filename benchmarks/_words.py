"""The words of the pages: titles, column names, sentences; and the order of their rows and columns.

A page is looked up by the beginning of its name, a sentence by its section; what is not listed is shown
under the names of its fields.
"""

from typing import Any

# Every page under its heading of the index, in this order: its title, and what a reader finds there.
ABOUT = {
    "Whole models": {
        "demo": ("Demo", "trained weights and a real text: the hidden number, the tokens beside `sdpa`"),
        "generation": ("Generation", "one long prompt in the shape of Llama-3.1-8B, beside transformers"),
        "questions": ("Questions about one document", "many at once on a cache that holds it once"),
        "two_gpus": ("Generation on two GPUs", "one prompt that two GPUs share"),
        "tree_prefill": ("Beside ring attention", "a prompt and its answer on two GPUs, ours and the ring's"),
        "training": ("Training", "speed and memory of a step, beside Liger"),
        "training_memory": (
            "Training memory",
            "the longest sequence that one GPU trains on, and why",
        ),
        "training_two_gpus": ("Training on two GPUs", "one sequence on two GPUs beside one"),
        "finetune_long": ("Fine-tuning on long documents", "a recipe: loss by position, before and after"),
        "lightning_models": ("Lightning models", "training and generation with linear attention"),
        "block_transformer": ("Block Transformer", "tokens a second, a block of tokens at a time"),
    },
    "Operators": {
        "decode_attention": ("Decoding attention", "one query over a long cache: share of the bandwidth"),
        "tree_decode": ("Tree decoding", "one step of attention on two GPUs, and what joining results costs"),
        "blockwise_attention": ("Blockwise attention", "attention forward and backward, by kernel and mask"),
        "lightning_attention": ("Lightning attention", "errors and times of the linear attention operator"),
        "cross_entropy": ("Cross-entropy", "the loss over large vocabularies, beside torch and Liger"),
        "blockwise_attention_tune": ("Tiles of blockwise attention", "what tile sizes were chosen by"),
    },
}
TITLES = {name: title for pages in ABOUT.values() for name, (title, _) in pages.items()}

# What stands in the result files and says nothing to a reader of the page.
HIDDEN = {
    "block_transformer": (
        "copy_rate", "matmul_rate", "floor_s", "floor_prompt_s", "share_of_floor", "capture_s",
    ),
    "lightning_attention": ("role", "tiling", "cut"),
    "demo": ("agree",),
    "questions": ("copy_rate", "layers"),
}  # fmt: skip

# What the letters of a case stand for.
CASES = {"B": "batch", "H": "heads", "T": "tokens", "S": "keys", "D": "head dim"}

# Columns stand in this order, and those without words behind them.
COLUMNS = {
    "block_transformer": {
        "peer": "set up by", "shape": "model", "prompt": "prompt", "new": "new tokens", "batch": "batch",
        "prompt_s": "prompt, s", "step_ms": "a token, ms", "total_s": "all, s", "tokens_per_s": "tokens/s",
        "floor_tokens_per_s": "floor, tokens/s", "peak_gib": "peak, GiB", "first_call_s": "first call, s",
        "second_call_s": "second call, prompt, s",
    },
    "tree_decode": {
        "keys": "keys", "batch": "batch", "form": "form", "ranks": "GPUs", "eager_us": "eager, µs",
        "graph_us": "graph, µs", "extra_mib": "beyond the shard, MiB", "gb_per_s": "GB/s",
    },
    "lightning_attention": {
        "batch": "batch", "heads": "heads", "tokens": "tokens", "head dim": "head dim", "dtype": "dtype",
        "kv": "key/value heads", "options": "set to False", "segments": "segment, block", "split": "split",
        "peer": "system", "backward": "with backward", "o": "output", "dq": "dq", "dk": "dk", "dv": "dv",
        "state": "state", "error": "error", "ratio": "over the standard", "good": "passes", "ms": "ms",
        "floor": "floor, ms", "over_floor": "time ÷ floor", "gib": "peak, GiB",
    },
    "cross_entropy": {
        "case": "rows and vocabulary", "smoothing": "label smoothing", "standard_loss": "loss, standard",
        "gradient_error": "gradient", "standard_gradient": "gradient, standard", "gradient": "gradient is",
        "floor": "floor, ms", "over_floor": "time ÷ floor", "extra_mib": "beyond the logits, MiB",
        "good": "passes",
    },
    "demo": {
        "peer": "set up by", "prompt": "prompt, tokens", "first_token_s": "first token, s",
        "token_ms": "a token, ms", "peak_gib": "peak, GiB", "needle_found": "number found",
        "verdict": "compared",
    },
    "questions": {
        "peer": "asked", "prompt": "document", "questions": "questions", "question_tokens": "tokens of each",
        "first_token_s": "first token, s", "new_shape_first_token_s": "first token of a new shape, s",
        "token_ms": "a token, ms", "floor_ms": "floor, ms", "peak_gib": "peak, GiB",
        "same_tokens_as_alone": "first answer as alone",
    },
    "blockwise_attention_tune": {
        "case": "head dim, kernel", "config": "queries, keys, warps, stages", "ms": "ms",
    },
}  # fmt: skip

# Sections that stand before the others.
SECTIONS = {
    "lightning_attention": ("forward", "backward", "decode", "peers"),
    "blockwise_attention_tune": ("best", "tune"),
}

# Fields that rows are sorted by; others stand as they were measured.
ORDER = {
    "block_transformer": ("prompt", "new", "batch"),
    "lightning_attention": ("head dim", "tokens", "batch"),
}

# Names in the result files that a reader does not know.
VALUES = {
    "block_transformer": {
        "block": "`prepare_generation`",
        "block-eager": "`prepare_generation(cuda_graph=False)`",
        "block-plain": "transformers",
        "block-1.2b": "blocks, 1.2B",
    },
    "demo": {"tree_attention": "`tree_attention`, `prepare_generation`", "sdpa": "transformers, `sdpa`"},
    "lightning_attention": {"fla chunk_simple_gla": "flash-linear-attention"},
}

SENTENCES = {
    "block_transformer": {
        None: (
            "`generate()` of a Block Transformer with random weights: 12 layers of width 2048 in each of its "
            "two decoders, blocks of 4 tokens, bf16, greedy, prompts of equal length. K is 1024 tokens; "
            "tokens a second count the new ones of all rows over the whole call, the prompt included.\n\n"
            "- `first call` is the first of this shape: it also captures the steps and, where no other "
            "shape was there before it, compiles kernels. `second call` asks for one token: it also captures "
            "the reading of the prompt, and is blank where it was not recorded. The other times are those of "
            "later calls, `prompt, s` that of one token.\n"
            "- The floor is the larger of bytes over the copy rate and operations over the rate of a large "
            "matrix product, for the prompt and for each step, with the rates of the same run."
        ),
    },
    "questions": {
        None: (
            "Questions about one document that a cache holds, the shape of Llama-3.1-8B, random weights, "
            "bf16, greedy. K is 1024 tokens.\n\n"
            "- `alone`: one question, on a copy of the cache, which counts in its peak.\n"
            "- `shared`: all of them at once on `cache.fork(rows=n)`, which reads the document's keys and "
            "values once for all.\n"
            "- `repeated`: all of them at once on a cache that repeats the document for each.\n\n"
            "The floor is the time to move weights and cache once at the copy rate of the same run. "
            "`first answer as alone` compares the tokens of one and the same question. A batch is multiplied "
            "in another order than one row, and the best two logits of random weights lie within one "
            "rounding of bf16 every few steps: an answer may part there from the one given alone. In fp32 "
            "the tests hold both to equal tokens, and [the demo](demo.md) compares those of trained weights."
        ),
    },
    "tree_decode": {
        None: (
            "One decoding step of one attention layer over a cache that is cut along the sequence: 32 query "
            "heads, 8 key/value heads, head dim 128, bf16. Keys are those on all GPUs together, K is 1024 of "
            "them. Times are the median over rounds of the slowest GPU, launched eagerly and from a CUDA "
            "graph.\n\n"
            "- `local`: `decode_attention` on a GPU's own keys, which joins nothing; `flash`: torch's flash "
            "kernel in its place.\n"
            "- `ours`: `decode_attention`, and one kernel that reads the other GPU's part and merges.\n"
            "- `all-gather`: the same with one packed all-gather of NCCL.\n"
            "- `paper`: the three all-reduces of arXiv 2408.04093.\n"
            "- `ring`: keys and values go round; `rate` is its messages alone."
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
            "Time of the forward in bf16, slopes of TransNormerLLM's first layer; K is 1024 tokens, `error` "
            "that of the output, `split` explained below. The floor is the time to move the inputs and "
            "outputs once at the rate of a copy of the same size."
        ),
        "backward": (
            "Forward and backward together; their floor moves fourteen such tensors, that of a forward four."
        ),
        "decode": (
            "`lightning_attention_step`: one token a row, the state in place. The floor has the rate of a "
            "copy into other memory, which is no bound for a step that writes where it read."
        ),
        "peers": (
            "The same inputs in flash-linear-attention's `chunk_simple_gla`, and in causal softmax attention "
            "by cuDNN, which is another function of them and costs the square of the length."
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
            "What `make demo` does, on a GPU: SmolLM2-135M-Instruct with its trained weights, in bf16, reads "
            "the beginning of the King James Bible, in which a number is hidden at 40 %, is asked for it, "
            "and answers greedily with 16 tokens. Each set-up answers twice and the second answer is timed; "
            "the time a token is the median.\n\n"
            "A model this small takes longer to launch than to compute. A captured step leaves the launches "
            "out; what a prepared call takes to begin makes its first token the later one. The "
            "[generation page](generation.md) has a model of 8B."
        ),
    },
    "blockwise_attention_tune": {
        "tune": (
            "Time of each Triton kernel of `blockwise_attention` by its tiles, 16K tokens under a window of "
            "half of them."
        ),
        "best": "The fastest of each kernel.",
    },
}


def of_page(words: dict, name: str) -> Any:
    """The entry of the longest key that a page's name begins with, or an empty one."""
    keys = [key for key in words if name.startswith(key)]
    return words[max(keys, key=len)] if keys else {}
