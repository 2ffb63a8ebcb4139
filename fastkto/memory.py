"""What a run needs in memory: what stays, and what its largest pass adds, in bytes.

Nothing is loaded: a model on the meta device is enough. What stays is counted from the parameters,
what a pass adds is measured on tensors without data (`memory_probe`).

Not counted: the CUDA context and the libraries' workspaces, fragmentation, the batch's tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from fastkto.config import KTOConfig
from fastkto.memory_optimizer import OptimizerBytes, optimizer_bytes
from fastkto.memory_probe import WITH_MASKS, PassBytes, PassProbe, ProbeSettings
from fastkto.memory_search import largest
from fastkto.router import router_settings


class RunMemory(NamedTuple):
    """Bytes on one device, and the two passes that need the most there."""

    pass_tokens: int
    weights: int
    unpacked: int  # weights that FSDP has gathered, or that a 4- or 8-bit layer has unpacked
    gradients: int
    buckets: int  # DistributedDataParallel's own copy of the gradients
    optimizer: int
    optimizer_step: int  # beyond its state, while it steps
    reference: int
    filling: int  # a pass that fills the cache of a reference which is released then; else 0
    gradient_pass: PassBytes
    no_gradient_pass: PassBytes

    @property
    def lasting(self) -> int:
        """What is there before a pass of the training begins."""
        stays = self.weights + self.unpacked + self.gradients + self.buckets
        return stays + self.optimizer + (0 if self.filling else self.reference)

    @property
    def working(self) -> int:
        """The most that comes on top of it."""
        return max(self.gradient_pass.peak, self.no_gradient_pass.peak, self.optimizer_step)

    @property
    def before_training(self) -> int:
        """The peak while the cache is filled: no gradients and no optimizer state yet; 0 if not."""
        models = self.weights + self.unpacked + self.buckets + self.reference
        return models + self.filling if self.filling else 0

    @property
    def total(self) -> int:
        """The peak."""
        return max(self.before_training, self.lasting + self.working)


@dataclass(frozen=True)
class Deployment:
    """How a run is spread over devices, and what is stored in another way than it is computed."""

    processes: int = 1
    sharded: bool = False  # FSDP2: weights, gradients and optimizer state divided by processes
    bytes_per_quantised: float | None = None  # of a weight in the linear layers but for the head
    releases_reference: bool = False  # once its scores are on disk, see `fastkto.precompute`


class MemoryEstimator:
    """Bytes that training `policy` with `args` needs.

    `policy` may lie on any device, and is as the trainer prepares it: with its adapter, dropout as
    in training, input gradients enabled where an adapter needs them. A model that is quantised or
    sharded already has to be given as it was before.
    """

    def __init__(
        self,
        policy: PreTrainedModel | PeftModel,
        args: KTOConfig,
        *,
        reference: PreTrainedModel | None = None,
        deployment: Deployment | None = None,
    ) -> None:
        self.policy, self.args, self.reference = policy, args, reference
        self.deployment = deployment or Deployment()
        self._pads = policy.config._attn_implementation in WITH_MASKS
        autocast = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
        router = router_settings(policy.config.get_text_config(), args)
        settings = ProbeSettings(
            autocast=autocast,
            head=args.head,
            head_memory_mib=args.head_memory_mib,
            router_loss=router.coefficient != 0.0,
            activation_offloading=args.activation_offloading,
            checkpointing_kwargs=dict(args.gradient_checkpointing_kwargs or {})
            or {"use_reentrant": False},
        )
        self._probe = PassProbe(policy, settings)
        self._quantised = self._quantise(autocast)

    # ---- A pass ----

    def pass_bytes(
        self,
        tokens: int,
        *,
        longest: int | None = None,
        gradient: bool = True,
        checkpointing: bool | None = None,
    ) -> PassBytes:
        """What a pass of `tokens` tokens adds, all of them scored.

        longest: tokens of its longest sequence, by default all. Where attention takes masks, the
            pass is `tokens // longest` rows of so many tokens; else it is one row.
        checkpointing: of the gradient pass; by default as in `args`.
        """
        rows = 1 if longest is None or not self._pads else max(tokens // longest, 1)
        checkpointing = bool(
            self.args.gradient_checkpointing if checkpointing is None else checkpointing
        )
        return self._probe.measure(
            rows, max(tokens // rows, 1), gradient=gradient, checkpointing=checkpointing
        )

    def most_tokens(
        self,
        limit: int,
        *,
        gradient: bool = True,
        checkpointing: bool | None = None,
        longest: int | None = None,
    ) -> int:
        """Tokens of the largest pass that adds no more than `limit` bytes, see `largest`."""

        def peak(tokens: int) -> int:
            within = None if longest is None else min(longest, tokens)
            return self.pass_bytes(
                tokens, longest=within, gradient=gradient, checkpointing=checkpointing
            ).peak

        return largest(peak, limit)

    # ---- A run ----

    def run(
        self,
        max_length: int,
        max_tokens_per_pass: int | None = None,
        *,
        checkpointing: bool | None = None,
    ) -> RunMemory:
        """The memory of a run whose longest sequence has `max_length` tokens.

        A pass holds at most `max_tokens_per_pass` tokens or one sequence (None: one sequence), and
        no more than the rows of a batch. `checkpointing` is as for `pass_bytes`.
        """
        budget = max_length if max_tokens_per_pass is None else max_tokens_per_pass
        batch = max_length * self.args.per_device_train_batch_size
        tokens = max(max_length, min(budget, batch))
        step = batch * self.args.gradient_accumulation_steps
        plan, shards = self.deployment, 1
        if plan.sharded:
            shards = plan.processes
        gradients = sum(p.numel() * p.element_size() for p in _trainable(self.policy))
        optimizer = self._optimizer
        return RunMemory(
            pass_tokens=tokens,
            weights=self._weights // shards,
            unpacked=self._unpacked,
            gradients=gradients // shards,
            buckets=gradients if plan.processes > 1 and not plan.sharded else 0,
            optimizer=optimizer.state // shards,
            optimizer_step=optimizer.step // shards,
            reference=0 if self.reference is None else model_bytes(self.reference) // shards,
            filling=self._filling(max_length, budget, step),
            gradient_pass=self.pass_bytes(tokens, longest=max_length, checkpointing=checkpointing),
            no_gradient_pass=self._no_gradient_pass(max_length, budget, step),
        )

    def _no_gradient_pass(self, max_length: int, budget: int, waiting: int) -> PassBytes:
        """The largest, where sequences of `waiting` tokens wait, and as many mismatched ones."""
        # both kinds together, see `KTOConfig.no_grad_tokens`
        tokens = max(max_length, 2 * min(budget, waiting))
        return self.pass_bytes(tokens, longest=max_length, gradient=False)

    def _filling(self, max_length: int, budget: int, step: int) -> int:
        if self.reference is None or not self.deployment.releases_reference:
            return 0
        more = max_length * (self.args.precompute_ref_batch_size or 0)
        return self._no_gradient_pass(max_length, budget, step + more).peak

    def largest_budget(self, max_length: int, memory: int) -> int:
        """The most tokens for a pass of a run that fits into `memory` bytes, see `largest`.

        `max_length` if nothing larger does; no more than a batch of the longest rows has.
        """
        whole = max_length * self.args.per_device_train_batch_size
        if self.run(max_length, whole).total <= memory:
            return whole
        found = largest(lambda tokens: self.run(max_length, tokens).total, memory)
        return max(found, max_length)

    def largest_context(self, memory: int, max_tokens_per_pass: int | None = None) -> int:
        """The longest sequence with which a run fits into `memory` bytes, see `largest`."""
        return largest(lambda length: self.run(length, max_tokens_per_pass).total, memory)

    # ---- What stays ----

    @cached_property
    def _optimizer(self) -> OptimizerBytes:
        return optimizer_bytes(self.policy, self.args)

    @property
    def _weights(self) -> int:
        stored = sum(p.numel() for p in self._quantised)
        unquantised = sum(p.numel() * p.element_size() for p in self._quantised)
        packed = int(stored * (self.deployment.bytes_per_quantised or 0))
        return model_bytes(self.policy) - unquantised + packed

    @property
    def _unpacked(self) -> int:
        if self._quantised:
            return max(p.numel() * p.element_size() for p in self._quantised)
        if not self.deployment.sharded:
            return 0
        # Two layers, of which one is fetched ahead, and what is in no layer, with their gradients.
        layers = [layer for kind in self._probe.kinds for layer in kind]
        sizes = [model_bytes(layer) + _gradient_size(layer) for layer in layers]
        whole = model_bytes(self.policy) + _gradient_size(self.policy)
        return whole - sum(sizes) + 2 * max(sizes, default=0)

    def _quantise(self, autocast: torch.dtype | None) -> list[Any]:
        """The parameters that would be quantised, in the dtype in which they are multiplied."""
        if self.deployment.bytes_per_quantised is None:
            return []
        head: Any = self.policy.get_output_embeddings()
        parts = set(head.modules())  # with an adapter on it, its own layer is inside
        weights = [
            module.weight
            for name, module in self.policy.named_modules()
            if isinstance(module, nn.Linear) and module not in parts and "lora_" not in name
        ]
        for weight in weights:
            weight.data = weight.data.to(autocast or weight.dtype)
        return weights


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _gradient_size(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in _trainable(model))


def model_bytes(model: nn.Module) -> int:
    """Bytes of the parameters and buffers."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
