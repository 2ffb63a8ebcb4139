"""`linear_logprob` as operators of PyTorch: opaque to `torch.compile`, known to autograd.

Nothing in them depends on the data, so they do not synchronise. The exceptions are on the CPU,
where a look costs nothing: targets are checked, and ignored tokens are left out.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fastkto.backend import choose_backend, on_its_device
from fastkto_kernels.gradients import logits_gradients
from fastkto_kernels.operands import Operands
from fastkto_kernels.scan import Scan, direction_dtype, scan_logits
from fastkto_kernels.scan_table import blocks_for
from fastkto_kernels.tiles import LogitTransform, Steps, spans

ROWS_AT_ONCE = 2048  # of an elementwise product whose fp32 result is rounded


class _Settings(NamedTuple):
    """The arguments of `linear_logprob` that are no tensors."""

    ignore_index: int
    scale: float
    softcap: float | None
    temperature: float
    compute_dtype: torch.dtype
    stats: bool
    with_direction: bool
    backend: str
    memory_bytes: int


def _score(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    bias: Tensor | None,  # [V]
    extra_hidden: Tensor | None,  # [N, E]
    extra_weight: Tensor | None,  # [V, E]
    factor: Tensor | None,  # [V]
    target: Tensor,  # [N] int64
    ignore_index: int,
    scale: float,
    softcap: float | None,
    temperature: float,
    compute_dtype: torch.dtype,
    stats: bool,
    with_direction: bool,
    backend: str,
    memory_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(logprob, entropy, mean_logit, log_odds, reference, other_sum, direction, direction_scale).

    [N] fp32 but for the direction, [N, D], see `fastkto_kernels.scan.Direction`; what was not
    asked for is empty.
    """
    _check_target(target, ignore_index, weight.shape[0])
    target = _without_ignored(target, ignore_index)
    transform = LogitTransform(scale, softcap, temperature)
    operands = Operands(
        hidden, weight, bias, extra_hidden, extra_weight, target, compute_dtype, transform, factor
    )
    chosen = choose_backend(backend, hidden.device).name
    rows = _scored_rows(target, chosen)
    # The operands are in the compute dtype already, and autocast would round fp32 operands.
    with torch.autocast(hidden.device.type, enabled=False):
        state, direction = _scan(
            operands if rows is None else operands.rows(rows),
            chosen,
            stats=stats,
            with_direction=with_direction,
            memory_bytes=memory_bytes,
        )
        is_scored = (target if rows is None else target[rows]) >= 0
        log_odds = (state.reference - state.target_logit) + state.other_sum.log()
        logprob = torch.where(is_scored, logsigmoid(-log_odds), 0.0)
        entropy = mean_logit = None
        if state.weighted_sum is not None and state.logit_sum is not None:
            entropy = _entropy(log_odds, state.other_sum, state.weighted_sum)
            entropy = torch.where(is_scored, entropy, 0.0)
            mean_logit = torch.where(is_scored, state.logit_sum / weight.shape[0], 0.0)
    scores = (logprob, entropy, mean_logit, log_odds, state.reference, state.other_sum)
    values = (*scores, *((None, None) if direction is None else direction))
    if rows is not None:
        values = cast(Any, tuple(_spread(value, rows, target.shape[0]) for value in values))
    # what an operator returns is never None
    dtypes = (*(torch.float32,) * 6, direction_dtype(compute_dtype), torch.float32)
    empty = (hidden.new_empty(0, dtype=dtype) for dtype in dtypes)
    filled = (e if value is None else value for value, e in zip(values, empty, strict=True))
    return cast(Any, tuple(filled))


linear_logprob = torch.library.custom_op(
    "fastkto::linear_logprob", on_its_device(_score), mutates_args=()
)


@linear_logprob.register_fake
def _(hidden: Tensor, *others: Any) -> tuple[Tensor, ...]:
    settings = _Settings(*others[6:])
    num_tokens = hidden.shape[0]

    def rows(present: bool) -> Tensor:
        return hidden.new_empty(num_tokens if present else 0, dtype=torch.float32)

    shape = hidden.shape if settings.with_direction else (0,)
    direction = hidden.new_empty(shape, dtype=direction_dtype(settings.compute_dtype))
    always = (rows(True) for _ in range(3))
    stats = (rows(settings.stats) for _ in range(2))
    return rows(True), *stats, *always, direction, rows(settings.with_direction)


def _differentiate(
    row_gradient: Tensor,  # [N] fp32, of the raw target logit; zero where ignored
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    extra_hidden: Tensor | None,
    extra_weight: Tensor | None,
    factor: Tensor | None,
    target: Tensor,
    reference: Tensor,  # [N] fp32
    other_sum: Tensor,  # [N] fp32
    ignore_index: int,
    scale: float,
    softcap: float | None,
    temperature: float,
    compute_dtype: torch.dtype,
    needs: list[bool],
    backend: str,
    memory_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the six inputs before the target, in their order; empty where not needed."""
    target = _without_ignored(target, ignore_index)
    transform = LogitTransform(scale, softcap, temperature)
    operands = Operands(
        hidden, weight, bias, extra_hidden, extra_weight, target, compute_dtype, transform, factor
    )
    chosen = choose_backend(backend, hidden.device).name
    rows, num_tokens = _scored_rows(target, chosen), target.shape[0]
    if rows is not None:
        operands = operands.rows(rows)
        row_gradient, reference, other_sum = row_gradient[rows], reference[rows], other_sum[rows]
    with torch.autocast(hidden.device.type, enabled=False):
        gradients = logits_gradients(
            operands,
            _steps(chosen),
            reference,
            other_sum,
            row_gradient,
            needs=cast(Any, tuple(needs)),
            memory_bytes=memory_bytes,
        )
    if rows is not None:
        del operands  # with its copy of the hidden states
        gradients = gradients._replace(
            hidden=_spread(gradients.hidden, rows, num_tokens),
            extra_hidden=_spread(gradients.extra_hidden, rows, num_tokens),
        )
    return cast(Any, tuple(row_gradient.new_empty(0) if g is None else g for g in gradients))


linear_logprob_backward = torch.library.custom_op(
    "fastkto::linear_logprob_backward", on_its_device(_differentiate), mutates_args=()
)


@linear_logprob_backward.register_fake
def _(row_gradient: Tensor, *others: Any) -> tuple[Tensor, ...]:
    inputs, needs = others[:6], others[-3]
    return tuple(
        torch.empty_like(value, memory_format=torch.contiguous_format)
        if needed and value is not None
        else row_gradient.new_empty(0)
        for value, needed in zip(inputs, needs, strict=True)
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    operands, target = inputs[:6], inputs[6]
    ctx.settings = settings = _Settings(*inputs[7:])
    log_odds, reference, other_sum, *direction = output[3:]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    if settings.with_direction:
        ctx.hidden_dtype = operands[0].dtype
        ctx.save_for_backward(target, log_odds, *direction)
    else:
        ctx.save_for_backward(target, log_odds, *operands, reference, other_sum)


def _backward(ctx: Any, grad_logprob: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    settings: _Settings = ctx.settings
    nothing = (None,) * (1 + len(settings))  # of the target and the settings
    if grad_logprob is None:
        return (None,) * 6 + nothing
    target, log_odds, *saved = ctx.saved_tensors
    row_gradient = grad_logprob * log_odds.sigmoid() * (settings.scale / settings.temperature)
    row_gradient = torch.where(target == settings.ignore_index, 0.0, row_gradient)
    if settings.with_direction:
        direction, scale = saved
        gradient = scale_rows(direction, row_gradient * scale, ctx.hidden_dtype)
        return (gradient, *(None,) * 5, *nothing)
    *operands, reference, other_sum = saved
    needs = ctx.needs_input_grad[:6]
    gradients = linear_logprob_backward(
        row_gradient,
        *operands,
        target,
        reference,
        other_sum,
        settings.ignore_index,
        settings.scale,
        settings.softcap,
        settings.temperature,
        settings.compute_dtype,
        list(needs),
        settings.backend,
        settings.memory_bytes,
    )
    kept = (g if needed else None for g, needed in zip(gradients, needs, strict=True))
    return (*kept, *nothing)


linear_logprob.register_autograd(_backward, setup_context=_setup_context)


def _scale_rows(direction: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """direction * factor of each row, [N, D] in `dtype`; fp32 exists for some rows at a time."""
    result = torch.empty_like(direction, dtype=dtype)
    for start, end in spans(direction.shape[0], ROWS_AT_ONCE):
        torch.mul(direction[start:end], factor[start:end, None], out=result[start:end])
    return result


scale_rows = torch.library.custom_op("fastkto::scale_rows", _scale_rows, mutates_args=())


@scale_rows.register_fake
def _(direction: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(direction, dtype=dtype)


# What each operator does: `memory_fake` runs them on tensors without data.
IMPLEMENTATIONS: dict[Any, Callable[..., Any]] = {
    torch.ops.fastkto.linear_logprob.default: _score,
    torch.ops.fastkto.linear_logprob_backward.default: _differentiate,
    torch.ops.fastkto.scale_rows.default: _scale_rows,
}


def _without_ignored(target: Tensor, ignore_index: int) -> Tensor:
    """`target` with -1 where it is ignored."""
    return torch.where(target == ignore_index, -1, target)


def _check_target(target: Tensor, ignore_index: int, vocab_size: int) -> None:
    is_bad = (target != ignore_index) & ((target < 0) | (target >= vocab_size))
    if target.device.type == "cuda":
        torch._assert_async(~is_bad.any(), f"target outside [0, {vocab_size}) and not ignore_index")
    elif is_bad.any():
        row = int(is_bad.nonzero()[0, 0])
        raise ValueError(
            f"target[{row}] is {int(target[row])}; expected a value in [0, {vocab_size}) or "
            "ignore_index"
        )


def _scored_rows(target: Tensor, backend: str) -> Tensor | None:
    """Index of the tokens to compute, where some are left out."""
    if target.device.type != "cpu" or backend != "torch":
        return None
    is_ignored = target < 0
    return (~is_ignored).nonzero()[:, 0] if bool(is_ignored.any()) else None


def _spread(value: Tensor | None, rows: Tensor, num_tokens: int) -> Tensor | None:
    """[N, ...] with `value` in `rows` and zero elsewhere."""
    if value is None:
        return None
    return value.new_zeros(num_tokens, *value.shape[1:]).index_copy_(0, rows, value)


def _steps(backend: str) -> Steps:
    """The module with the backend's tile steps; Triton is imported only when it is used."""
    return cast(Steps, import_module(f"fastkto_kernels.tile_steps_{backend}"))


def _scan(
    operands: Operands, backend: str, *, stats: bool, with_direction: bool, memory_bytes: int
) -> Scan:
    """One sweep over the vocabulary, in the fused kernel where that was measured to be faster."""
    blocks = None if with_direction or backend != "triton" else blocks_for(operands)
    if blocks is not None:
        fused_scan = import_module("fastkto_kernels.fused_scan")
        state = fused_scan.scan_fused(operands, blocks, stats=stats, memory_bytes=memory_bytes)
        return Scan(state, direction=None)
    return scan_logits(
        operands,
        _steps(backend),
        stats=stats,
        with_direction=with_direction,
        memory_bytes=memory_bytes,
    )


def _entropy(log_odds: Tensor, other_sum: Tensor, weighted_sum: Tensor) -> Tensor:
    """Entropy in nats, [N]: of target against others, plus the others' own, without cancellation.

    H = -p log p - q log q + q * H_others, with q = 1 - p.
    """
    p, q = (-log_odds).sigmoid(), log_odds.sigmoid()
    # A vocabulary of one has no others: their sum is 0, and so is their share q.
    other_sum = other_sum.clamp_min(1.0)
    others_entropy = other_sum.log() - weighted_sum / other_sum
    return -p * logsigmoid(-log_odds) + torch.special.entr(q) + q * others_entropy
