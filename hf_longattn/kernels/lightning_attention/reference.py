"""Lightning attention in plain torch: the definition, the recurrence, and the chunked form that CPU and MPS
run.

With a slope s > 0 a head and lambda = exp(-s),

    S_t = lambda S_{t-1} + k_t v_t^T          o_t = scale * q_t^T S_t

`scan` also runs against time (`reverse`), where o_j sums over i >= j. The gradients of a scan are scans with
the roles exchanged, so nothing else is needed for the backward pass.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from hf_longattn.kernels.dispatch import in_its_own_dtypes
from hf_longattn.kernels.lightning_attention import rounding
from hf_longattn.kernels.lightning_attention.inputs import ScanInputs

CHUNK = 64
# Chunks whose states are joined by one product with a decay matrix: enough to amortise the call, few enough
# that the product stays small beside the rest.
CHUNKS_PER_PIECE = 16


def combine_states(
    left_state: Tensor, right_state: Tensor, right_length: int | Tensor, slopes: Tensor
) -> Tensor:
    """Joins the states of two neighbouring pieces of a sequence; the operation is associative.

    S = exp(-slope * right_length) * left + right, where each piece's state started from zero (or, for the
    left one, from whatever came before it). Written with `expm1`, since exp(-3.9e-8) rounds to a decay that
    is wrong by half.

    Args:
        left_state: (B, H, K, V) fp32 or fp64, the state after the earlier piece.
        right_state: (B, H, K, V), the state of the later piece alone.
        right_length: tokens in the later piece; an int, or a (B,) tensor.
        slopes: (H,) decay slopes, not decays.

    Returns:
        (B, H, K, V), the state after both pieces. Source: arXiv 2401.04658, equation 11.
    """
    steps = right_length if isinstance(right_length, int) else right_length.unsqueeze(-1)
    exponent = slopes.to(left_state.dtype) * steps
    return left_state + (right_state + left_state * torch.expm1(-exponent)[..., None, None])


def expand_heads(tensor: Tensor, num_heads: int) -> Tensor:
    """Repeats each of the G heads of a (B, G, T, K) tensor for the queries that share it, giving (B, H, T,
    K)."""
    return (
        tensor
        if tensor.shape[1] == num_heads
        else tensor.repeat_interleave(num_heads // tensor.shape[1], dim=1)
    )


def quadratic(
    query: Tensor, key: Tensor, value: Tensor, slopes: Tensor, scale: float, causal: bool = True
) -> Tensor:
    """The definition, O = scale * ((Q K^T) * M) V with M_ij = exp(-slope * |i - j|); quadratic in the length.

    Args:
        query: (B, H, T, K).
        key: (B, G, T, K), where G divides H.
        value: (B, G, T, V).
        slopes: (H,).
        scale: factor on the output.
        causal: whether M_ij is 0 for j > i.

    Returns:
        (B, H, T, V) in the inputs' dtype.
    """
    heads = slopes.shape[0]
    key, value = expand_heads(key, heads), expand_heads(value, heads)
    position = torch.arange(query.shape[2], device=query.device)
    distance = position[:, None] - position
    decay = torch.exp(-slopes.to(query.dtype)[:, None, None] * distance.abs())
    decay = decay * (distance >= 0) if causal else decay
    return scale * (query @ key.transpose(-1, -2) * decay) @ value


@in_its_own_dtypes
def recurrent(
    query: Tensor, key: Tensor, value: Tensor, slopes: Tensor, scale: float, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The recurrence, token by token, its state rounded as `rounding.py` says.

    Args:
        query: (B, H, T, K).
        key: (B, G, T, K), where G divides H.
        value: (B, G, T, V).
        slopes: (H,).
        scale: factor on the output.
        state: (B, H, K, V) before the first token; zeros where it is left out.

    Returns:
        The output (B, H, T, V) in the query's dtype, and the final state (B, H, K, V) in fp32 or fp64.
    """
    heads, dtype = slopes.shape[0], query.dtype
    wide = torch.promote_types(dtype, torch.float32)
    q, k, v = (expand_heads(x, heads).to(wide) for x in (query, key, value))
    if state is None:
        state = q.new_zeros(q.shape[0], heads, q.shape[3], v.shape[3])
    forget = torch.expm1(-slopes.to(wide))[:, None, None]
    outputs = []
    for t in range(q.shape[2]):
        # The change is formed before it meets the state: a decay below half an ulp would otherwise be lost.
        key_t, value_t = k[:, :, t], v[:, :, t]
        change = key_t[..., :, None] * value_t[..., None, :] + state * forget
        state = rounding.add(state, change, key_t, value_t)
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, :, t], state))
    stacked = torch.stack(outputs, 2) if outputs else q.new_zeros(*q.shape[:3], v.shape[3])
    return (scale * stacked).to(dtype), state


def step(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor, state: Tensor, scale: float) -> Tensor:
    """`recurrent` for the few tokens of a decoding step; writes the final state into `state`.

    Args:
        query: (B, H, T, K).
        key: (B, G, T, K), where G divides H.
        value: (B, G, T, V).
        slopes: (H,).
        state: (B, H, K, V) fp32 or fp64, overwritten.
        scale: factor on the output.

    Returns:
        (B, H, T, V) in the query's dtype.
    """
    output, final_state = recurrent(query, key, value, slopes, scale, state)
    state.copy_(final_state)
    return output


def _decays(slopes: Tensor, steps: Tensor) -> Tensor:
    """exp(-slope * steps), (H, *steps.shape), and 0 where `steps` is negative."""
    exponent = slopes.view(-1, *[1] * steps.ndim) * steps.clamp(min=0)
    return torch.exp(-exponent) * (steps >= 0)


def _pieces(length: int) -> Iterator[tuple[int, int, int]]:
    """(begin, end, chunk) of the pieces: whole chunks many at a time, then the ragged tail as a chunk of its
    own."""
    whole = length - length % CHUNK
    for begin in range(0, whole, CHUNK * CHUNKS_PER_PIECE):
        yield begin, min(begin + CHUNK * CHUNKS_PER_PIECE, whole), CHUNK
    if length > whole:
        yield whole, length, length - whole


def _piece(
    q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, state: Tensor, chunk: int, reverse: bool, strict: bool
) -> tuple[Tensor, Tensor]:
    """One piece of whole chunks, (B, H, N * chunk, K): its output, and the state behind it."""
    q, k, v = (x.unflatten(2, (-1, chunk)) for x in (q, k, v))  # (B, H, N, C, K)
    num_chunks = q.shape[2]
    position = torch.arange(chunk, device=q.device)
    distance = position[:, None] - position
    mask = _decays(slopes, (-distance if reverse else distance) - int(strict))
    mask = (mask * torch.exp(-slopes)[:, None, None] if strict else mask)[:, None]
    to_first, to_last = _decays(slopes, position + 1)[:, None, :, None], _decays(slopes, chunk - 1 - position)
    to_last = to_last[:, None, :, None]
    enter, leave = (to_last, to_first) if reverse else (to_first, to_last)

    sums = (k * leave).transpose(-1, -2) @ v  # (B, H, N, K, V): the state of each chunk alone
    sums = sums.flip(2) if reverse else sums
    index = torch.arange(num_chunks + 1, device=q.device)
    carry = _decays(slopes, (index[:, None] - 1 - index[:-1]) * chunk)  # (H, N + 1, N)
    states = (carry @ sums.flatten(3)).unflatten(3, sums.shape[3:])
    incoming = states[:, :, :-1] + state[:, :, None] * _decays(slopes, index[:-1] * chunk)[..., None, None]
    incoming = incoming.flip(2) if reverse else incoming
    output = (q @ k.transpose(-1, -2) * mask) @ v + (q * enter) @ incoming
    return output.flatten(2, 3), combine_states(state, states[:, :, -1], num_chunks * chunk, slopes)


def _scan_one(tensors: tuple, state: Tensor, out: Tensor, reverse: bool, strict: bool) -> Tensor:
    """Scans one stretch of tokens piece by piece, writes `out`, and returns the state behind it."""
    query, key, value, slopes = tensors
    heads, wide = slopes.shape[0], state.dtype
    pieces = list(_pieces(query.shape[2]))
    for begin, end, chunk in reversed(pieces) if reverse else pieces:
        q, k, v = (expand_heads(x[:, :, begin:end], heads).to(wide) for x in (query, key, value))
        out[:, :, begin:end], state = _piece(q, k, v, slopes, state, chunk, reverse, strict)
    return state


def documents(cu_seqlens: Tensor | None, batch: int, length: int) -> list[tuple[slice, slice]]:
    """(rows, tokens) of each stretch that shares nothing with the others: the whole batch, or each packed
    document."""
    if cu_seqlens is None:
        return [(slice(0, batch), slice(0, length))]
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != length or bounds != sorted(bounds):
        raise ValueError(f"`cu_seqlens` must rise from 0 to the number of tokens, {length}, got {bounds}.")
    return [(slice(i, i + 1), slice(*pair)) for i, pair in enumerate(zip(bounds, bounds[1:], strict=False))]


def _entering(inputs: ScanInputs, rows: slice, batch: int) -> Tensor:
    """(batch, H, K, V), the given state or zeros, in the dtype that sums are kept in."""
    wide = torch.promote_types(inputs.query.dtype, torch.float32)
    if inputs.state is not None:
        return inputs.state[rows].to(wide)
    shape = (batch, inputs.slopes.shape[0], inputs.query.shape[3], inputs.value.shape[3])
    return torch.zeros(shape, dtype=wide, device=inputs.query.device)


@in_its_own_dtypes
def scan(
    inputs: ScanInputs,
    output: Tensor,
    final_state: Tensor | None,
    scale: float,
    reverse: bool,
    strict: bool,
) -> None:
    """The chunked scan; see `api.py` for its meaning.

    Args:
        inputs: what is read.
        output: (B, H, T, V), written.
        final_state: (B or documents, H, K, V), written where it is given.
        scale: factor on the output.
        reverse: whether time runs backwards.
        strict: whether a token's own key and value are left out of its output.
    """
    query, key, value = inputs[:3]
    wide = torch.promote_types(query.dtype, torch.float32)
    slopes = inputs.slopes.to(wide)
    for rows, tokens in documents(inputs.cu_seqlens, query.shape[0], query.shape[2]):
        state = _entering(inputs, rows, 1 if inputs.cu_seqlens is not None else query.shape[0])
        # The scale goes on the query, before anything is rounded: no pass over the output is needed.
        tensors = (query[:, :, tokens].to(wide) * scale, key[:, :, tokens], value[:, :, tokens], slopes)
        state = _scan_one(tensors, state, output[:, :, tokens], reverse, strict)
        if final_state is not None:
            final_state[rows] = state


@in_its_own_dtypes
def slope_gradient(inputs: ScanInputs, grad_output: Tensor, grad_state: Tensor | None) -> Tensor:
    """d/d slope of sum(o * grad_output) + sum(S_T * grad_state), with scale = 1, in forward mode.

    Carries D_t = dS_t/d slope beside S_t. Sums over (i - j) built from whole rows cancel over long sequences;
    this one weighs each pair by its distance inside a chunk, and leaves the rest to D.

    Args:
        inputs: what the scan read.
        grad_output: (B, H or G, T, V).
        grad_state: (B or documents, H, K, V), or None for zeros.

    Returns:
        (H,) in the slopes' dtype.
    """
    query = inputs.query
    wide = torch.promote_types(query.dtype, torch.float32)
    slopes = inputs.slopes.to(wide)
    total = torch.zeros_like(slopes)
    for rows, tokens in documents(inputs.cu_seqlens, query.shape[0], query.shape[2]):
        primal = _entering(inputs, rows, 1 if inputs.cu_seqlens is not None else query.shape[0])
        tangent = torch.zeros_like(primal)
        stretch = [x[:, :, tokens] for x in (query, inputs.key, inputs.value, grad_output)]
        for begin in range(0, stretch[0].shape[2], 2 * CHUNK):
            tiles = (x[:, :, begin : begin + 2 * CHUNK] for x in stretch)
            q, k, v, g = (expand_heads(x, len(slopes)).to(wide) for x in tiles)
            part, primal, tangent = _slope_chunk(q, k, v, g, slopes, primal, tangent)
            total = total + part
        if grad_state is not None:
            total = total + (grad_state[rows].to(wide) * tangent).sum((0, 2, 3))
    return total.to(inputs.slopes.dtype)


def _slope_chunk(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, slopes: Tensor, primal: Tensor, tangent: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One chunk of `slope_gradient`: its share of the gradient, and S and dS/d slope behind it."""
    length = q.shape[2]
    position = torch.arange(length, device=q.device)
    distance = position[:, None] - position
    pairs = (q @ k.transpose(-1, -2)) * (grad @ v.transpose(-1, -2))
    share = -(pairs * _decays(slopes, distance) * distance).sum((0, 2, 3))
    steps = (position + 1)[:, None]
    entering = q * _decays(slopes, position + 1)[..., None]
    share = share + ((entering @ tangent - (entering * steps) @ primal) * grad).sum((0, 2, 3))

    left = (length - 1 - position)[:, None]
    leaving = k * _decays(slopes, length - 1 - position)[..., None]
    added = leaving.transpose(-1, -2) @ v
    added_tangent = -(leaving * left).transpose(-1, -2) @ v
    tangent = combine_states(tangent - length * primal, added_tangent, length, slopes)
    return share, combine_states(primal, added, length, slopes), tangent
