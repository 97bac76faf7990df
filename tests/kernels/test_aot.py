"""Every kernel compiles for an H100 without spilling and within its shared memory, found out without a GPU.

To add a kernel, append a `Case` to `CASES`.
"""

import importlib
import re
from typing import NamedTuple

import pytest
import torch

from hf_longattn.kernels.dispatch import interpreting, triton_version
from hf_longattn.kernels.lightning_attention.tiling import (
    GLUON_TILINGS,
    GLUON_VERSIONS,
    choose_step_tiling,
    exact_columns,
)

pytest.importorskip("triton")
if interpreting():
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from aot import MAX_SHARED_BYTES, compile_sm90  # noqa: E402

BUDGETS_OF = "3.7."


class Case(NamedTuple):
    """One kernel with one set of constants. `kernel` reads "module:name", the rest as in `compile_sm90`."""

    id: str
    kernel: str
    signature: dict
    constexprs: dict
    num_warps: int = 4
    num_stages: int = 3
    max_spills: int = 0
    max_shared: int = MAX_SHARED_BYTES
    slow: bool = False
    max_registers: int | None = None

    def compiled(self):
        """What the kernel takes."""
        module, _, name = self.kernel.partition(":")
        options = self.num_warps, self.num_stages, self.max_registers
        kernel = getattr(importlib.import_module(module), name)
        return compile_sm90(kernel, self.signature, self.constexprs, *options)


def _merge_partials(num_parts, num_rows, width, dtype="fp32"):
    """`merge_partials` as decoding (few rows, many parts) and prefill (many rows, few parts) launch it."""
    signature = {
        "outputs_ptr": f"*{dtype}:16", "lse_ptr": "*fp32:16", "output_ptr": "*bf16:16",
        "merged_lse_ptr": "*fp32:16", "outputs_strides": ("i64:16",) * 4 + (1,),
        "lse_strides": ("i64", "i64", "i64", 1), "output_strides": ("i64:16",) * 3 + (1,),
        "merged_lse_strides": ("i64", "i64", 1), "num_parts": "i32", "num_heads": "i32",
        "num_queries": "i32", "num_rows": "i32",
    }  # fmt: skip
    constexprs = {
        "sinks_ptr": None, "V": width, "BLOCK_N": num_parts, "BLOCK_R": num_rows, "BLOCK_V": width,
    }  # fmt: skip
    kernel = "hf_longattn.kernels.merge_partials.triton:_merge_kernel"
    return Case(f"merge_partials-N{num_parts}-R{num_rows}-V{width}", kernel, signature, constexprs)


def _merge_over_first(num_parts, width, dtype):
    """`merge_over_first` as a chunk of a prompt launches it, heads next to each other."""
    signature = {
        "outputs_ptrs": (f"*{dtype}:16",) * num_parts, "lse_ptrs": ("*fp32:16",) * num_parts,
        "outputs_strides": ("i64:16",) * 3 + (1,), "lse_strides": ("i64", 1, "i64"),
        "num_middle": "i32", "num_inner": "i32", "num_rows": "i32",
    }  # fmt: skip
    constexprs = {"V": width, "BLOCK_R": 2048 // width, "BLOCK_V": width}
    kernel = "hf_longattn.kernels.merge_partials.triton:_join_kernel"
    return Case(f"merge_over_first-N{num_parts}-V{width}-{dtype}", kernel, signature, constexprs)


def _norm(kind, width, rows, gated=False):
    """`row_norm` of one row of a model's width a program, or of many heads; or `gated_row_norm`."""
    signature = {
        "x_ptr": "*bf16:16", "weight_ptr": "*bf16:16", "y_ptr": "*bf16:16", "x_strides": ("i64:16", 1),
        "gate_strides": ("i64:16", 1), "num_rows": "i32", "eps": "fp32",
    }  # fmt: skip
    signature |= {"gate_ptr": "*bf16:16"} if gated else {}
    signature |= {"bias_ptr": "*bf16:16"} if kind == "layer" else {}
    constexprs = {"D": width, "KIND": kind, "BLOCK_R": rows, "BLOCK_D": triton.next_power_of_2(width)}
    constexprs |= {"OVERLAP": True, "SIGMOID": gated}
    constexprs |= {name: None for name in ("bias_ptr", "gate_ptr") if name not in signature}
    warps = min(max(rows * constexprs["BLOCK_D"] // 512, 1), 16)
    kernel = "hf_longattn.kernels.row_norm.triton:_norm_kernel"
    name = "gated_row_norm" if gated else "row_norm"
    return Case(f"{name}-{kind}-D{width}-R{rows}", kernel, signature, constexprs, warps)


def _norm_backward(kind, width, rows, dtype="bf16", slow=False):
    """The gradients of `row_norm`, of states, weight and bias."""
    names = ("x", "weight", "dy", "dx")
    signature = {f"{name}_ptr": f"*{dtype}:16" for name in names} | {"dweight_ptr": "*fp32:16"}
    signature |= {"dbias_ptr": "*fp32:16"} if kind == "layer" else {}
    signature |= {"x_strides": ("i64:16", 1), "dy_strides": ("i64:16", 1)}
    signature |= {"num_rows": "i32", "rows_each": "i32", "eps": "fp32"}
    block = triton.next_power_of_2(width)
    constexprs = {"D": width, "KIND": kind, "BLOCK_R": rows, "BLOCK_D": block}
    constexprs |= {} if kind == "layer" else {"dbias_ptr": None}
    warps = min(max(rows * block // 256, 1), 16)
    kernel = "hf_longattn.kernels.row_norm.triton:_backward_kernel"
    id = f"row_norm_backward-{kind}-D{width}-R{rows}-{dtype}"
    return Case(id, kernel, signature, constexprs, warps, slow=slow)


def _gated_activation(activation):
    """`gated_activation` of a chunk."""
    signature = dict.fromkeys(("gate_ptr", "up_ptr", "out_ptr"), "*bf16:16")
    signature |= dict.fromkeys(("gate_strides", "up_strides"), ("i64:16", 1))
    kernel = "hf_longattn.kernels.gated_activation.triton:_gate_kernel"
    constexprs = {"D": 14336, "KIND": activation, "OVERLAP": True, "BLOCK": 2048}
    return Case(f"gated_activation-{activation}", kernel, signature, constexprs)


def _gated_activation_backward(activation):
    """The gradients of `gated_activation` of a block."""
    names, inputs = ("dy", "gate", "up", "dgate", "dup"), ("dy", "gate", "up")
    signature = {f"{name}_ptr": "*bf16:16" for name in names}
    signature |= {f"{name}_strides": ("i64:16", 1) for name in inputs}
    kernel = "hf_longattn.kernels.gated_activation.triton:_backward_kernel"
    constexprs = {"D": 14336, "KIND": activation, "BLOCK": 2048}
    return Case(f"gated_activation_backward-{activation}", kernel, signature, constexprs)


def _cross_entropy(dtype, gradient=True, smoothed=False, slow=False):
    """`cross_entropy` of a chunk, written over the logits or without gradient."""
    from hf_longattn.kernels.cross_entropy.triton import choose_block

    block, warps = choose_block(32000, 4 if dtype == "fp32" else 2)
    signature = {"logits_ptr": f"*{dtype}:16", "targets_ptr": "*i64:16", "losses_ptr": "*fp32:16"}
    signature |= {"logits_strides": ("i64:16", 1), "grad_strides": ("i64:16", 1), "V": "i32:16"}
    signature |= {"smoothing": "fp32"} | ({"grad_ptr": f"*{dtype}:16"} if gradient else {})
    constexprs = {"SMOOTHED": smoothed, "PTX": True, "BLOCK": block} | (
        {} if gradient else {"grad_ptr": None}
    )
    kernel = "hf_longattn.kernels.cross_entropy.triton:_cross_entropy_kernel"
    id = f"cross_entropy-{dtype}" + "-gradient" * gradient + "-smoothed" * smoothed
    return Case(id, kernel, signature, constexprs, warps, slow=slow)


def _rotary(head_dim, width, inverse=False):
    """`rotary_embedding` of the first `width` of heads next to each other."""
    signature = {f"{name}_ptr": "*bf16:16" for name in ("q", "k", "cos", "sin", "q_out", "k_out")}
    strides = ("i64:16",) * 3 + (1,)
    signature |= {f"{name}_strides": strides for name in ("q", "k", "q_out", "k_out")}
    signature |= {f"{name}_strides": ("i64:16", "i64:16", 1) for name in ("cos", "sin")}
    signature |= dict.fromkeys(("T", "H", "G"), "i32")
    constexprs = {"R": width, "K": head_dim, "BLOCK_H": 8, "BLOCK_R": triton.next_power_of_2(width // 2)}
    constexprs |= {"INVERSE": inverse, "OVERLAP": True}
    kernel = "hf_longattn.kernels.rotary_embedding.triton:_rotary_kernel"
    id = f"rotary_embedding-K{head_dim}-R{width}" + "-inverse" * inverse
    return Case(id, kernel, signature, constexprs, num_warps=2)


def _rotary_write(dtype, head_dim, width):
    """`rotary_cache_write` of slices of one projection, with the first `width` of a head turning."""
    pointers = ("q", "k", "v", "cos", "sin", "q_out", "keys", "values")
    signature = {f"{name}_ptr": f"*{dtype}:16" for name in pointers} | {"index_ptr": "*i64:16"}
    heads = ("q", "k", "v", "q_out", "keys", "values")
    signature |= {f"{name}_strides": ("i64:16",) * 3 + (1,) for name in heads}
    signature |= {f"{name}_strides": ("i64:16", "i64:16", 1) for name in ("cos", "sin")}
    signature |= {"index_strides": ("i64", 1)} | dict.fromkeys(("T", "S", "H", "G"), "i32")
    constexprs = {"R": width, "K": head_dim, "V": head_dim, "OVERLAP": True, "BLOCK_H": 8}
    constexprs["BLOCK_R"] = triton.next_power_of_2(width // 2)
    kernel = "hf_longattn.kernels.rotary_cache_write.triton:_rotary_write_kernel"
    id = f"rotary_cache_write-K{head_dim}-R{width}-{dtype}"
    return Case(id, kernel, signature, constexprs, num_warps=2)


def _pull_merge(ranks, width, dtype):
    """The join through peers' memory: 32 heads of one row."""
    signature = {
        "boards_ptr": "*i64:16", "output_ptr": f"*{dtype}:16", "lse_ptr": "*fp32:16",
        "merged_ptr": f"*{dtype}:16", "merged_lse_ptr": "*fp32:16",
        "output_strides": ("i64:16",) * 3 + (1,), "lse_strides": ("i64", "i64", 1),
        "rank": "i32", "num_heads": "i32", "num_queries": "i32", "num_rows": "i32",
    }  # fmt: skip
    constexprs = {
        "RANKS": ranks, "V": width, "BLOCK_V": triton.next_power_of_2(width), "ROWS": 4, "ROW_BYTES": 1024,
        "PROGRAMS": 64, "STOP": 128,
    }  # fmt: skip
    kernel = "hf_longattn.kernels.merge_partials.triton_peers:_pull_merge_kernel"
    return Case(f"pull_merge-P{ranks}-V{width}-{dtype}", kernel, signature, constexprs)


def _decode_attention(dtype, head_dim, num_rows, masked, slow=False, keys=None, out="fp32"):
    """`decode_attention` with its own configuration, bare or with every option at once; `keys` in 8 bits.

    `out` is the dtype of what is stored: fp32 for a merge.
    """
    from hf_longattn.kernels.decode_attention.triton import pick_config, pick_rows

    itemsize = 4 if dtype == "fp32" else 2
    rows = pick_rows(num_rows, itemsize)
    config = pick_config(head_dim, head_dim, itemsize, rows, 1 if keys else itemsize)
    block = max(32 if keys else 16, triton.next_power_of_2(head_dim))
    read = "i16" if keys else dtype
    signature = {
        "q_ptr": f"*{dtype}:16", "k_ptr": f"*{read}:16", "v_ptr": f"*{read}:16", "o_ptr": f"*{out}:16",
        "lse_ptr": "*fp32:16", "q_strides": ("i32:16",) * 3 + (1,), "k_strides": ("i64:16",) * 3 + (1,),
        "v_strides": ("i64:16",) * 3 + (1,), "lower_strides": ("i32", 1), "upper_strides": ("i32", 1),
        "key_mask_strides": ("i32", 1), "o_strides": ("i32:16",) * 4 + (1,),
        "lse_strides": ("i32", "i32", "i32", 1), "scale": "fp32", "T": "i32", "S": "i32",
    }  # fmt: skip
    constexprs = {
        "GROUP": 4, "K": head_dim, "V": head_dim, "CAUSAL": masked, "GAPS": masked and num_rows > 16,
        "ONE_QUERY": num_rows == 4, "BLOCK_R": rows, "BLOCK_K": block,
        "BLOCK_V": block, "BLOCK_N": config.block_n,
    }  # fmt: skip
    options = {"lower_ptr": "*i32:16", "upper_ptr": "*i32:16", "key_mask_ptr": "*u8:16", "cap": "fp32"}
    signature |= options if masked else {}
    constexprs |= {} if masked else dict.fromkeys(options)
    if keys:
        signature |= {"scales_ptr": "*fp32:16", "scales_strides": ("i64:16",) * 2 + (2, 1)}
        constexprs |= {"NUMBERS": f"{keys} by ptx"}
    kind = f"{dtype}-{keys}" if keys else dtype
    variant = ("masked" if masked else "bare") + ("" if out == "fp32" else "-whole")
    id = f"decode_attention-K{head_dim}-R{rows}-{kind}-{variant}"
    kernel = "triton_eight:split_eight_kernel" if keys else "triton:_split_kernel"
    kernel = f"hf_longattn.kernels.decode_attention.{kernel}"
    # All options at once cost a few bytes of registers at the size that streams fastest without them.
    spills = 16 if masked and block == 128 and rows == 16 and itemsize == 2 else 0
    # Exact fp32 takes no tensor core: products hold both operands in registers.
    spills = (400 if keys else 32) if masked and block == 256 and itemsize == 4 else spills
    # Many rows fill the registers, which the choice of bytes that may be NaN then passes.
    spills = (320 if keys == "fp8" else 8) if masked and keys and rows > 16 else spills
    return Case(
        id, kernel, signature, constexprs, config.num_warps, config.num_stages, max_spills=spills, slow=slow
    )


def _quantized_states(eight, num_rows):
    """`quantized_states` as decoding (a row a program) and prefill launch it."""
    signature = {"k_ptr": "*bf16:16", "v_ptr": "*bf16:16", "scales_ptr": "*fp32:16"}
    signature |= dict.fromkeys(("k_out_ptr", "v_out_ptr"), f"*{eight}:16")
    signature |= dict.fromkeys(("k_strides", "v_strides"), ("i64:16",) * 3 + (1,))
    signature |= dict.fromkeys(("G", "T", "num_rows"), "i32")
    constexprs = {
        "K": 128, "V": 128, "LARGEST_NUMBER": 127.0 if eight == "i8" else 448.0, "BLOCK_R": num_rows,
        "BLOCK_K": 128, "BLOCK_V": 128,
    }  # fmt: skip
    kernel = "hf_longattn.kernels.quantized_states.triton:_quantize_kernel"
    warps = 1 if num_rows == 1 else 4
    return Case(f"quantized_states-R{num_rows}-{eight}", kernel, signature, constexprs, warps)


def _cache_write(dtype, width):
    """`cache_write` of a decoding step: one program a head, key and value."""
    signature = dict.fromkeys(("key_ptr", "value_ptr", "keys_ptr", "values_ptr"), f"*{dtype}:16")
    signature |= {"index_ptr": "*i64:16", "index_stride": "i32", "T": "i32", "S": "i32"}
    signature |= dict.fromkeys(("key_strides", "value_strides"), ("i32:16",) * 3 + (1,))
    signature |= dict.fromkeys(("keys_strides", "values_strides"), ("i64:16",) * 3 + (1,))
    constexprs = {"K": width, "V": width, "OVERLAP": True, "BLOCK_K": width, "BLOCK_V": width}
    kernel = "hf_longattn.kernels.cache_write.triton:_write_kernel"
    return Case(f"cache_write-K{width}-{dtype}", kernel, signature, constexprs, 1)


def _lightning_scan(dtype, head_dim, options=(), max_spills=0, slow=False):
    """The scan of `lightning_attention`, its own tiling; `options` of state, blocks, packed, reverse."""
    from hf_longattn.kernels.lightning_attention.triton import choose_tiling

    types = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
    tiling = choose_tiling(head_dim, head_dim, getattr(torch, types[dtype]), 1 << 20, 1024)
    strides = ("i64:16",) * 3 + (1,)
    signature = {f"{name}_ptr": f"*{dtype}:16" for name in "xyzo"} | {"slope_ptr": "*fp32:16"}
    signature |= {f"{name}_strides": strides for name in (*"xyzo", "state", "block", "left")}
    sizes = ("length", "num_heads", "num_segments", "segment_length", "block_length")
    signature |= dict.fromkeys(sizes, "i32") | {"shares": (1, 1, 1), "scale": "fp32"}
    pointers = {
        "state": {"state_ptr": "*fp32:16", "left_ptr": "*fp32:16"},
        "blocks": {"block_ptr": "*fp32:16"},
        "packed": {"bounds_ptr": "*i64:16", "ranges_ptr": "*i64:16"},
    }
    constexprs = {
        "DIMS": (head_dim, head_dim), "REVERSE": "reverse" in options, "STRICT": False,
        "CHUNK": tiling.chunk, "BLOCK_K": max(16, triton.next_power_of_2(head_dim)),
        "BLOCK_V": tiling.block_v, "SPLIT": tiling.split,
        "PRECISION": "tf32x3" if dtype == "fp32" else "ieee",
    }  # fmt: skip
    for name, kinds in pointers.items():
        signature |= kinds if name in options else {}
        constexprs |= {} if name in options else dict.fromkeys(kinds)
    return Case(
        "-".join(("lightning_scan", f"K{head_dim}", dtype, *options)),
        "hf_longattn.kernels.lightning_attention.triton:_scan_kernel",
        signature, constexprs, tiling.num_warps, tiling.num_stages, max_spills=max_spills, slow=slow,
    )  # fmt: skip


def _lightning_blocks(head_dim):
    """The states of blocks, with packed documents; its parameters are among those of the scan."""
    case = _lightning_scan("bf16", head_dim, ("packed",))
    signature = case.signature | {"block_ptr": "*fp32:16", "documents_ptr": "*i64:16", "num_blocks": "i32"}
    kernel = "hf_longattn.kernels.lightning_attention.triton:_block_state_kernel"
    names = ("DIMS", "REVERSE", "CHUNK", "BLOCK_K", "BLOCK_V", "SPLIT", "PRECISION")
    constexprs = {name: case.constexprs[name] for name in names}
    id = f"lightning_blocks-K{head_dim}"
    return Case(id, kernel, signature, constexprs, num_stages=case.num_stages, max_spills=16)


def _lightning_gluon(reverse=False, states=False, wide=False, max_spills=0, slow=False):
    """The Gluon scan with its own tiling; `states` with all that enters and leaves, `wide` writes fp32."""
    from triton.experimental.gluon.language import NVMMASharedLayout

    tiling = GLUON_TILINGS[128]
    layouts = {
        bits: NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=bits, rank=4) for bits in (16, 32)
    }
    tile = f"[1, 1, {tiling.chunk}, 128]"
    signature = {f"{x}_desc": f"tensordesc<bf16{tile},{layouts[16]!r}>" for x in "xyzo"}
    if wide:
        signature["o_desc"] = f"tensordesc<fp32{tile},{layouts[32]!r}>"
    signature |= {f"{x}_ptr": "*fp32:16" for x in ("slope", "state", "block", "left")}
    signature |= {f"{x}_strides": ("i64:16",) * 3 + (1,) for x in ("state", "block", "left")}
    signature |= {"shares": (1, 1, 1), "scale": "fp32"}
    sizes = ("length", "num_heads", "num_segments", "segment_length", "block_length")
    signature |= dict.fromkeys(sizes, "i32")
    constexprs = {
        "REVERSE": bool(reverse), "STRICT": bool(wide), "SPLIT": tiling.split,
        "EXACT_K": exact_columns(tiling.split, 128), "STAGES": tiling.num_stages,
        "num_warps": tiling.num_warps,
    }  # fmt: skip
    constexprs |= {} if states else dict.fromkeys(("state_ptr", "block_ptr", "left_ptr"))
    signature = {name: kind for name, kind in signature.items() if name not in constexprs}
    return Case(
        "lightning_gluon-K128" + "-reverse" * reverse + "-states" * states + "-wide" * wide,
        "hf_longattn.kernels.lightning_attention.triton_gluon:_scan_kernel",
        signature, constexprs, tiling.num_warps, max_spills=max_spills, slow=slow,
    )  # fmt: skip


def _lightning_step(head_dim, single=True):
    strides = ("i64:16",) * 3 + (1,)
    signature = {f"{name}_ptr": "*bf16:16" for name in "qkvo"} | {"slope_ptr": "*fp32:16"}
    signature |= {"state_ptr": "*fp32:16"} | {f"{name}_strides": strides for name in (*"qkvo", "state")}
    signature |= {"share": "i32", "length": "i32", "num_heads": "i32", "scale": "fp32"}
    block_v, warps = choose_step_tiling(head_dim, head_dim)
    constexprs = {
        "DIMS": (head_dim, head_dim), "SINGLE": single, "OVERLAP": True,
        "BLOCK_K": triton.next_power_of_2(head_dim), "BLOCK_V": block_v,
    }  # fmt: skip
    kernel = "hf_longattn.kernels.lightning_attention.triton_step:_step_kernel"
    id = f"lightning_step-K{head_dim}" + "-tokens" * (not single)
    return Case(id, kernel, signature, constexprs, warps)


def _blockwise(
    name, head_dim, dtype="bf16", ranged=False, softcap=False, bias=None, max_spills=0, slow=False
):
    """A kernel of `blockwise_attention` with its own configuration.

    `ranged` has an interval a query; `bias` is the element type of a dense mask or bias.
    """
    from hf_longattn.kernels.blockwise_attention import triton_backward, triton_forward

    configs = {
        "forward": triton_forward.CONFIGS, "dkdv": triton_backward.DKDV_CONFIGS,
        "dq": triton_backward.DQ_CONFIGS, "dbias": triton_backward.DQ_CONFIGS[:1] * 5,
    }[name]  # fmt: skip
    config = configs[0 if dtype == "fp32" else 1 + sum(head_dim > most for most in (64, 128, 256))]
    block = max(16, triton.next_power_of_2(head_dim))
    interval = ("*i32:16", "*i32:16") if ranged or name == "dbias" else (None, None)
    signature = {f"{x}_ptr": f"*{dtype}:16" for x in ("q", "k", "v", "o", "do", "dq", "dk", "dv", "dbias")}
    signature |= {
        f"{x}_strides": ("i64:16",) * 3 + (1,) for x in ("q", "k", "v", "o", "do", "dq", "dk", "dv")
    }
    signature |= {"lse_ptr": "*fp32:16", "rows_ptr": "*i32:16", "spans_ptr": "*i32:16"}
    signature |= {"masks": (*interval, None, "*bf16:16" if name == "dbias" else bias and f"*{bias}:16")}
    signature |= {"mask_strides": ("i32:16", "i32:16", 0, 0, "i32:16", "i32:16", 1), "T": "i32", "S": "i32"}
    signature |= {
        "dbias_strides": ("i64:16",) * 3 + (1,),
        "bias_sizes": ("i32",) * 3,
        "repeats": ("i32",) * 3,
    }
    signature |= {"scale": "fp32", "softcap": "fp32"}
    constexprs = {
        "sinks_ptr": None, "dropout": None, "H": 32, "GROUP": 4, "K": head_dim, "V": head_dim, "CAUSAL": True,
        "PRECISION": "ieee" if dtype == "fp32" else "tf32", "BLOCK_K": block, "BLOCK_V": block,
        "TANH": {"fp32": "series", "bf16": "instruction"}.get(dtype, "quotient"), "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n, "ONE_ROW": False,
    }  # fmt: skip
    constexprs |= {} if ranged else {"spans_ptr": None}
    constexprs |= {} if softcap else {"softcap": None}
    kernel = getattr(triton_forward if name == "forward" else triton_backward, f"_{name}_kernel")
    signature = {key: kind for key, kind in signature.items() if key not in constexprs}
    constexprs = {key: value for key, value in constexprs.items() if key in kernel.arg_names}
    module = "triton_forward" if name == "forward" else "triton_backward"
    return Case(
        "-".join(("blockwise", name, f"K{head_dim}", dtype, *["ranged"] * ranged, *["softcap"] * softcap,
                  *[f"bias_{bias}"] * bool(bias))),
        f"hf_longattn.kernels.blockwise_attention.{module}:_{name}_kernel",
        signature, constexprs, config.num_warps, config.num_stages, max_spills=max_spills, slow=slow,
    )  # fmt: skip


def _few_row_linear(rows, columns, gated, dtype="bf16", settled=False, activation=None):
    """`few_row_linear` on the widths of an 8B model."""
    from hf_longattn.kernels.few_row_linear.triton import choose, tiles_ahead

    full = dtype == "fp32"
    config = choose(rows, columns, torch.float32 if full else torch.bfloat16)
    pointers = {name: f"*{dtype}:16" for name in ("x_ptr", "w_ptr", "up_ptr", "y_ptr")}
    signature = pointers | {
        "x_stride": "i32:16", "w_stride": "i32:16", "up_stride": "i32:16", "M": "i32", "N": "i32:16",
    }  # fmt: skip
    constexprs = {
        "K": 4096, "ROWS": 1 if rows == 1 else 16, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k,
        "PRECISION": "ieee" if full else "tf32", "bias_ptr": None, "OVERLAP": True,
        "AHEAD": tiles_ahead(config, rows, columns, 4096) if settled else 0, "ACTIVATION": activation,
    }  # fmt: skip
    if not gated:
        constexprs |= {"up_ptr": None, "up_stride": None}
    signature = {name: kind for name, kind in signature.items() if name not in constexprs}
    return Case(
        f"few_row_linear-M{rows}-N{columns}-{dtype}" + "-gated" * gated + "-settled" * settled
        + f"-{activation}" * (activation is not None),
        "hf_longattn.kernels.few_row_linear.triton:_few_rows_kernel",
        signature, constexprs, config.num_warps, config.num_stages,
    )  # fmt: skip


def _normed_linears(rows, width=2048):
    """`normed_linears` of a GPT-NeoX layer."""
    from hf_longattn.kernels.normed_linears import triton as kernels

    config, block = kernels.FRONTS[rows], triton.next_power_of_2(width)
    names = ("x", "scale1", "shift1", "w1", "bias1", "scale2", "shift2", "w2", "bias2", "y1", "y2")
    signature = {f"{name}_ptr": "*bf16:16" for name in names} | {"eps": "fp32"}
    signature |= dict.fromkeys(("x_stride", "w1_stride", "w2_stride", "N1", "N2"), "i32:16")
    constexprs = {
        "K": width, "ROWS": rows, "ACTIVATION": "gelu", "OVERLAP": True, "AHEAD": config.ahead,
        "TILES": config.tiles, "BLOCK_N": config.block_n, "BLOCK_K": block,
    }  # fmt: skip
    return Case(
        f"normed_linears-M{rows}-D{width}", "hf_longattn.kernels.normed_linears.triton:_normed_kernel",
        signature, constexprs, kernels.warps_of(config, block), 1, max_registers=config.registers,
    )  # fmt: skip


def _residual_linears(rows, width=2048):
    """`residual_linears` of a GPT-NeoX layer."""
    from hf_longattn.kernels.normed_linears.triton import BACKS

    config, names = BACKS[rows], ("x", "h", "wh", "bias_h", "o", "wo", "bias_o", "y")
    signature = {f"{name}_ptr": "*bf16:16" for name in names}
    signature |= dict.fromkeys(("x_stride", "wh_stride", "wo_stride", "N"), "i32:16")
    constexprs = {
        "H": 4 * width, "D": width, "ROWS": rows, "OVERLAP": True, "AHEAD": config.ahead,
        "BLOCK_N": config.block_n, "BLOCK_K": config.block_k,
    }  # fmt: skip
    return Case(
        f"residual_linears-M{rows}-D{width}", "hf_longattn.kernels.normed_linears.triton:_joined_kernel",
        # So few registers that all programs run at once cost two numbers.
        signature, constexprs, config.num_warps, 1, max_spills=8 * (rows == 1),
        max_registers=config.registers,
    )  # fmt: skip


def _few_key_attention(slots, head_dim, dtype="bf16", masked=False):
    """`few_key_attention` on a fused projection, a quarter of each head turned, or all options at once."""
    strides = ("i32:16",) * 3 + (1,)
    signature = {
        f"{name}_ptr": f"*{dtype}:16" for name in ("q", "k", "v", "cos", "sin", "held_k", "held_v", "o")
    }
    signature |= {f"{name}_strides": strides for name in ("q", "k", "v", "held_k", "held_v", "o")}
    signature |= {"cos_strides": ("i32", "i32:16", 1), "sin_strides": ("i32", "i32:16", 1)}
    signature |= {"start": "i32", "T": "i32", "scale": "fp32", "key_mask_strides": ("i32", 1)}
    constexprs = {
        "GROUP": 4 if masked else 1, "K": head_dim, "V": head_dim, "R": head_dim // 4, "OVERLAP": True,
        "SLOTS": slots, "BLOCK_K": head_dim, "BLOCK_V": head_dim,
    }  # fmt: skip
    signature |= {"key_mask_ptr": "*i1:16"} if masked else {}
    constexprs |= {} if masked else {"key_mask_ptr": None}
    warps = min(max(slots * head_dim * (4 if dtype == "fp32" else 2) // 4096, 1), 8)
    kernel = "hf_longattn.kernels.few_key_attention.triton:_few_key_kernel"
    id = f"few_key_attention-S{slots}-K{head_dim}-{dtype}" + "-masked" * masked
    return Case(id, kernel, signature, constexprs, warps, 1)


def _residual_norms(width, norms):
    """`residual_norms` between two layers (two norms) and behind the last one."""
    names = ("x", "b1", "b2", "w1", "c1", "w2", "c2", "total", "y1", "y2")
    signature = {f"{name}_ptr": "*bf16:16" for name in names} | {"eps": "fp32"}
    block = triton.next_power_of_2(width)
    constexprs = {"D": width, "OVERLAP": True, "BLOCK_D": block}
    constexprs |= {} if norms == 2 else dict.fromkeys(("w2_ptr", "c2_ptr", "y2_ptr"))
    signature = {name: kind for name, kind in signature.items() if name not in constexprs}
    kernel = "hf_longattn.kernels.residual_norms.triton:_norms_kernel"
    return Case(
        f"residual_norms-D{width}-N{norms}", kernel, signature, constexprs, min(max(block // 512, 1), 8)
    )


# Whose programs take one of two ways, each with a wait of its own.
FORKED = [_normed_linears(1), _normed_linears(2), _normed_linears(2, 4096)]
CASES: list[Case] = [
    *FORKED,
    _residual_linears(1),
    _residual_linears(2),
    _residual_linears(1, 4096),
    _residual_norms(2048, 2),
    _residual_norms(8192, 1),
    _few_key_attention(5, 128),
    _few_key_attention(16, 128),
    _few_key_attention(32, 256, "fp32", masked=True),
    _few_row_linear(1, 4096, gated=False),
    _few_row_linear(1, 4096, gated=False, settled=True),
    _few_row_linear(1, 8192, gated=False, settled=True, activation="gelu"),
    _few_row_linear(1, 14336, gated=True, settled=True),
    *(_few_row_linear(rows, 14336, gated=True) for rows in (1, 8)),
    _few_row_linear(8, 14336, gated=True, dtype="fp32"),
    _merge_partials(16, 1, 128),
    _merge_partials(64, 1, 256),
    _merge_partials(2, 16, 128, "bf16"),
    _merge_over_first(2, 128, "bf16"),
    _merge_over_first(8, 128, "bf16"),
    _norm("rms", 4096, 1),
    _norm("layer", 2048, 1),
    _norm("rms_plus_one", 128, 16),
    _norm("rms_wide", 16384, 1),
    _norm("rms", 8192, 1, gated=True),
    _norm_backward("rms", 2048, 1),
    _norm_backward("layer", 4096, 1),
    _norm_backward("rms_plus_one", 128, 16),
    _norm_backward("rms_wide", 8192, 1, slow=True),
    _norm_backward("layer", 4096, 1, "fp32", slow=True),
    _gated_activation("silu"),
    _gated_activation("gelu"),
    *(_gated_activation_backward(activation) for activation in ("silu", "gelu", "gelu_tanh")),
    _cross_entropy("bf16"),
    *(_cross_entropy("bf16", gradient=False, smoothed=smoothed, slow=True) for smoothed in (False, True)),
    *(_cross_entropy(dtype, smoothed=True, slow=True) for dtype in ("bf16", "fp16", "fp32")),
    _cross_entropy("fp32", slow=True),
    _rotary(128, 128),
    _rotary(96, 96),
    _rotary(128, 32),
    _rotary(64, 64, inverse=True),
    _rotary_write("bf16", 64, 16),
    _rotary_write("bf16", 128, 128),
    _rotary_write("fp32", 80, 20),
    _pull_merge(2, 128, "bf16"),
    _pull_merge(8, 96, "fp32"),
    _decode_attention("bf16", 128, 4, masked=False),
    _decode_attention("bf16", 128, 4, masked=True),
    _decode_attention("bf16", 128, 4, masked=False, out="bf16"),
    *(_decode_attention("bf16", dim, 4, masked=True, slow=True) for dim in (16, 48, 64, 80, 192, 256)),
    *(_decode_attention("bf16", dim, 64, masked=True, slow=True) for dim in (64, 128, 256)),
    *(_decode_attention("fp32", dim, 4, masked=True, slow=True) for dim in (64, 128, 256)),
    _decode_attention("bf16", 128, 4, masked=True, keys="int8"),
    _decode_attention("bf16", 128, 4, masked=True, keys="fp8"),
    *(_decode_attention("bf16", 128, 4, masked=False, keys=keys) for keys in ("int8", "fp8")),
    *(_decode_attention("bf16", dim, 4, masked=True, keys="int8", slow=True) for dim in (16, 48, 64, 256)),
    *(_decode_attention("fp16", 128, rows, masked=True, keys="fp8", slow=True) for rows in (4, 20, 64)),
    *(_decode_attention("bf16", dim, 64, masked=True, keys="int8", slow=True) for dim in (64, 128, 256)),
    *(_decode_attention("fp32", dim, 4, masked=True, keys="int8", slow=True) for dim in (64, 128, 256)),
    _quantized_states("i8", 1),
    _quantized_states("fp8e4nv", 16),
    _cache_write("bf16", 128),
    _cache_write("i8", 64),
    _lightning_scan("bf16", 64, max_spills=16),
    # A few registers too many at the size that counts most; narrower tiles would read more.
    _lightning_scan("bf16", 128, max_spills=64),
    _lightning_scan("bf16", 128, ("reverse", "state", "blocks"), max_spills=256, slow=True),
    _lightning_scan("bf16", 128, ("state", "blocks", "packed"), max_spills=640, slow=True),
    *(_lightning_scan("bf16", dim, max_spills=16, slow=True) for dim in (16, 48, 192, 256)),
    _lightning_scan("fp16", 128, max_spills=160, slow=True),
    _lightning_scan("fp32", 64, max_spills=32, slow=True),
    _lightning_scan("fp32", 128, max_spills=64, slow=True),
    _lightning_blocks(128),
    *(
        _lightning_gluon(*flags, max_spills=spills, slow=any(flags[1:]))
        # A few scalars beside states, and a few registers where fp32 is written.
        for *flags, spills in ((0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 32), (1, 1, 0, 32), (1, 0, 1, 64))
        if triton_version() >= GLUON_VERSIONS[0]
    ),
    *(_lightning_step(dim) for dim in (128, 256)),
    _lightning_step(128, single=False),
    *(_blockwise(name, 128, ranged=True) for name in ("forward", "dq")),
    # Two accumulators of 128 x 128 fill the registers; a narrower tile would read the queries more often.
    # Three stages spill twice what two do and were 12 % faster on an H100 (6.87 against 7.77 ms).
    _blockwise("dkdv", 128, ranged=True, max_spills=240),
    _blockwise("forward", 64, ranged=True, slow=True),
    # Four warps spill a little at D 64 and were faster than eight warps that do not: 4.04 against 4.79 ms for
    # dK/dV, 2.41 against 2.78 ms for dQ.
    _blockwise("dkdv", 64, ranged=True, max_spills=72, slow=True),
    _blockwise("dq", 64, ranged=True, max_spills=144, slow=True),
    *(_blockwise(name, 256, slow=True) for name in ("forward", "dq")),
    _blockwise("dkdv", 256, max_spills=232, slow=True),
    *(_blockwise(name, 512, slow=True) for name in ("forward", "dq")),
    _blockwise("dkdv", 512, max_spills=16, slow=True),
    _blockwise("forward", 128, softcap=True, max_spills=48, slow=True),
    _blockwise("dkdv", 128, softcap=True, max_spills=312, slow=True),
    _blockwise("dq", 128, softcap=True, slow=True),
    # A dense bool mask (i1) and an additive one: another path through the mask for every kernel.
    _blockwise("forward", 64, ranged=True, bias="i1", max_spills=48),
    *(_blockwise(name, 64, ranged=True, bias="i1", max_spills=512, slow=True) for name in ("dkdv", "dq")),
    *(
        _blockwise(n, 64, ranged=True, bias="bf16", max_spills=512, slow=True)
        for n in ("forward", "dkdv", "dq")
    ),
    _blockwise("dbias", 64, max_spills=0, slow=True),
    _blockwise("forward", 64, "fp32", ranged=True, slow=True),
]


def _parameters():
    return [pytest.param(c, id=c.id, marks=[pytest.mark.slow] if c.slow else []) for c in CASES]


@pytest.mark.parametrize("case", _parameters())
def test_kernel_fits_hopper(case):
    used = case.compiled()
    # What is spilled is the compiler's choice: the budgets are those of the version in constraints.txt.
    assert used.spills <= case.max_spills or not triton.__version__.startswith(BUDGETS_OF), used
    assert used.shared <= case.max_shared, used
    if case.constexprs.get("OVERLAP") and case not in FORKED:
        before, *behind = used.ptx.split("griddepcontrol.wait")
        assert len(behind) == 1, "every program waits once"
        assert not re.search(r"\b(st\.global|cp\.async|atom|red\.|bra|ret;|exit;)", before)
        assert _bytes_read(before) * 32 * case.num_warps == _bytes_ahead(case)


@pytest.mark.parametrize("case", FORKED, ids=lambda case: case.id)
def test_each_of_two_products_waits_before_it_reads_or_writes_anything_but_weights(case):
    used, one = case.compiled(), case.constexprs
    before, first, second = used.ptx.split("griddepcontrol.wait")
    assert used.ptx.count("griddepcontrol.wait") == 2 and "st.global" not in before
    # Weights of the tiles, and of the norm.
    ahead = 2 * one["BLOCK_K"] * (one["AHEAD"] * one["BLOCK_N"] + 2)
    assert _bytes_read(before) * 32 * case.num_warps == ahead
    # A program that is done with the one does not go on with the other.
    own, _, other = first.rpartition("ret;")
    assert "st.global" in own and "st.global" not in other and "st.global" in second
    assert _bytes_read(other) * 32 * case.num_warps == ahead


@pytest.mark.parametrize(("case", "programs"), [(_normed_linears(1), 513), (_residual_linears(1), 1024)])
def test_programs_of_one_row_run_at_the_same_time(case, programs):
    used = case.compiled()
    registers = -(-used.registers // 8) * 8
    at_once = 132 * min(65536 // (registers * 32 * case.num_warps), 64 // case.num_warps)
    assert at_once >= programs or not triton.__version__.startswith(BUDGETS_OF)


def test_rows_of_a_cross_entropy_are_loaded_16_bytes_at_a_time_two_on_a_multiprocessor():
    case = _cross_entropy("bf16")
    used = case.compiled()
    # The first step and the one ahead, of both walks; and the target and its logit.
    assert len(re.findall(r"ld\.global\S*\.v4\.b32", used.ptx)) == 8 and used.ptx.count("ld.global") == 10
    # The gradient, and the loss and the target's gradient.
    assert len(re.findall(r"st\.global\S*\.v4\.b32", used.ptx)) == 2 and used.ptx.count("st.global") == 4
    registers = -(-used.registers // 8) * 8
    assert 2 * 32 * case.num_warps * registers <= 65536 or not triton.__version__.startswith(BUDGETS_OF)


def test_heads_of_few_keys_share_a_multiprocessor():
    """Blocks of four tokens behind two vectors: as many programs of a warp at a time as there can be, 32."""
    case = _few_key_attention(5, 128)
    used = case.compiled()
    assert case.num_warps == 1 and used.shared == 0 and "bar.sync" not in used.ptx
    assert 32 * 32 * used.registers <= 65536 or not triton.__version__.startswith(BUDGETS_OF)


def test_lightning_step_shares_a_multiprocessor():
    """Four programs of a step with one token fit its 65536 registers: while some round, others load."""
    case = _lightning_step(128)
    used = case.compiled()
    assert 4 * 32 * case.num_warps * used.registers <= 65536 or not triton.__version__.startswith(BUDGETS_OF)


@pytest.mark.parametrize("keys", ["int8", "fp8"])
def test_keys_in_8_bits_are_read_and_converted_two_at_a_time(keys):
    from hf_longattn.kernels.decode_attention.triton import pick_config

    case = _decode_attention("bf16", 128, 4, masked=False, keys=keys)
    kernel = importlib.import_module("hf_longattn.kernels.decode_attention.triton_eight").split_eight_kernel
    used = compile_sm90(kernel, case.signature, case.constexprs, case.num_warps, case.num_stages)
    assert "cp.async.cg.shared.global" in used.ptx
    assert re.search(r"ldmatrix\S*\.x4\.shared", used.ptx) and re.search(r"ldmatrix\S*\.trans", used.ptx)
    assert not re.search(r"ld\.shared\S*\.[bsu]8\b|cvt\.bf16\.f16|cvt\.rn\.b?f16\.[su]", used.ptx)
    # As many programs share a multiprocessor as the number of splits counts on; 1 KiB each is the system's.
    programs = pick_config(128, 128, 2, 16, 1).programs_per_sm
    assert programs * (used.shared + 1024) <= MAX_SHARED_BYTES + 1024
    registers = -(-used.registers // 8) * 8
    assert programs * 32 * case.num_warps * registers <= 65536 or not triton.__version__.startswith(
        BUDGETS_OF
    )


def _bytes_read(ptx):
    """Bytes that the loads in `ptx` read for each thread."""
    loads = re.findall(r"\bld\.global\S*?(?:\.v(\d))?\.b(\d+)\s", ptx)
    assert len(loads) == ptx.count("ld.global")
    return sum(int(count or 1) * int(bits) // 8 for count, bits in loads)


def _bytes_ahead(case):
    """Bytes of the weights in bf16 that a program reads before it waits."""
    tiles = case.constexprs.get("AHEAD", 0) * (2 if "up_ptr" in case.signature else 1)
    return 2 * tiles * case.constexprs.get("BLOCK_N", 0) * case.constexprs.get("BLOCK_K", 0)


@triton.jit
def _spilling_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    rows = tl.arange(0, BLOCK)
    tile = tl.load(x_ptr + rows[:, None] * BLOCK + rows[None, :])
    total = tl.dot(tile, tile)
    total = tl.dot(tl.exp(total).to(tile.dtype), tile, total)
    tl.store(y_ptr + rows[:, None] * BLOCK + rows[None, :], total)


def test_spills_and_shared_memory_are_seen():
    signature = {"x_ptr": "*fp16:16", "y_ptr": "*fp32:16"}
    small = compile_sm90(_spilling_kernel, signature, {"BLOCK": 32}, num_warps=1)
    large = compile_sm90(_spilling_kernel, signature, {"BLOCK": 64}, num_warps=1)
    assert small.spills == 0 and small.shared >= 32 * 32 * 2
    assert large.spills > 0
