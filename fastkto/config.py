"""KTOConfig: TRL 1.16's names and defaults, plus the fields that are fastkto's own."""

import copy
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from transformers import TrainingArguments
from transformers.utils import is_torch_bf16_gpu_available

from fastkto.config_check import check_config
from fastkto.data.batch import TRUNCATION_MODES
from fastkto.data.pairing import DATASET_PAIRING, KL_PAIRINGS
from fastkto.logprob import DEFAULT_HEAD_MEMORY_MIB
from fastkto.loss import LOSS_TYPES
from fastkto.metrics import METRICS
from fastkto.window import KL_SCOPES

# Most tokens in a pass, unless another number is given or found.
DEFAULT_TOKENS = 4096
_STEPS_IN_BACKWARD = ("lomo", "layerwise")


@dataclass
class KTOConfig(TrainingArguments):
    """Arguments of `KTOTrainer`: those of `transformers.TrainingArguments` and the ones below.

    Names and defaults are those of TRL 1.16's `KTOConfig`, with two differences. `bf16` is on by
    default only where the device supports it (TRL's default raises an error on a CPU), and every
    `train_sampling_strategy` is allowed, because sequences are paired when a batch is formed.

    Defaults that differ from `TrainingArguments`: `learning_rate` 1e-6, `logging_steps` 10,
    `gradient_checkpointing` on, `bf16` on where supported, `train_sampling_strategy` sequential.
    """

    learning_rate: float = field(default=1e-6, metadata={"help": "Initial learning rate."})
    logging_steps: float = field(
        default=10, metadata={"help": "Log every so many steps; below 1: a share of all steps."}
    )
    gradient_checkpointing: bool | None = field(
        default=True,
        metadata={"help": "Recompute activations in backward instead of storing them."},
    )
    bf16: bool | None = field(
        default=None,
        metadata={"help": "bfloat16 autocast. Default: on if the GPU supports it, fp16 is off."},
    )
    train_sampling_strategy: str = field(
        default="sequential",
        metadata={
            "help": "Order of the training rows. Any is valid with any loss.",
            "choices": ["random", "sequential", "group_by_length"],
        },
    )

    # The model
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Keyword arguments of `from_pretrained`, when `model` is a path or id."},
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Allow models and tokenizers that ship their own code."}
    )
    router_aux_loss_coef: float | None = field(
        default=None,
        metadata={
            "help": "Weight of a mixture-of-experts model's load-balancing loss. Default: the "
            "model config's; 0 turns it off."
        },
    )
    disable_dropout: bool = field(
        default=True, metadata={"help": "Set every dropout probability of both models to 0."}
    )

    # The data
    dataset_num_proc: int | None = field(
        default=None, metadata={"help": "Processes that tokenise the data set."}
    )
    max_length: int | None = field(
        default=1024,
        metadata={
            "help": "Longest sequence, in tokens; longer ones are cut (truncation_mode). "
            "None (null in YAML): any."
        },
    )
    truncation_mode: str = field(
        default="keep_start",
        metadata={
            "help": "What is kept of a longer sequence. 'keep_start': as in TRL the completion's "
            "end is cut, and rows whose prompt leaves no room are dropped. 'keep_end': the "
            "prompt's beginning is cut, and no row is dropped.",
            "choices": list(TRUNCATION_MODES),
        },
    )

    pad_to_multiple_of: int | str | None = field(
        default="auto",
        metadata={"help": "TRL pads batches to a multiple of this. Here only 'auto' or None: no."},
    )

    # The reference
    sync_ref_model: bool = field(
        default=False,
        metadata={
            "help": "Move the reference towards the policy every ref_model_sync_steps steps "
            "(TR-DPO, arXiv:2404.09656)."
        },
    )
    ref_model_mixup_alpha: float = field(
        default=0.6,
        metadata={
            "help": "Share of the policy in the reference after a move: alpha * policy + "
            "(1 - alpha) * reference, weight by weight. 1 copies the policy, adapters included."
        },
    )
    ref_model_sync_steps: int = field(
        default=512,
        metadata={"help": "Optimizer steps from one move of the reference to the next."},
    )
    precompute_ref_log_probs: bool = field(
        default=False,
        metadata={
            "help": "Keep the reference's log-probabilities in a cache on disk, and fill it before "
            "the first step with all that is known to be needed."
        },
    )
    precompute_ref_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Rows of a device that are scored and saved together before the first step; "
            "more of them fill passes better. Default: those of an optimizer step."
        },
    )

    # The loss
    loss_type: str = field(
        default="kto", metadata={"help": "Loss to train with.", "choices": list(LOSS_TYPES)}
    )
    beta: float = field(
        default=0.1,
        metadata={"help": "Weight of the log-ratio: higher keeps closer to the reference."},
    )
    desirable_weight: float = field(
        default=1.0, metadata={"help": "Weight of the losses of desirable rows."}
    )
    undesirable_weight: float = field(
        default=1.0, metadata={"help": "Weight of the losses of undesirable rows."}
    )

    # fastkto's own
    kl_scope: str = field(
        default="batch",
        metadata={
            "help": "Rows that share one KL estimate and are paired with each other. 'batch': a "
            "device batch, as in TRL. 'window': all rows of an optimizer step, whatever their "
            "micro-batch and rank; batches of one row need it.",
            "choices": list(KL_SCOPES),
        },
    )
    kl_pairing: str = field(
        default="rotate",
        metadata={
            "help": "The completion a prompt is paired with for the KL estimate. 'rotate': that of "
            "the row before in its batch, as TRL's in the order of the data. 'distinct': where "
            "possible, that of another prompt. 'dataset': that of the row before in the data set, "
            "in blocks of per_device_train_batch_size, as in TRL whatever the order.",
            "choices": [*KL_PAIRINGS, DATASET_PAIRING],
        },
    )
    max_tokens_per_pass: int | str | None = field(
        default=DEFAULT_TOKENS,
        metadata={
            "help": "Most tokens in one pass of the model; a longer sequence is a pass of its own. "
            "Memory follows this number, not the batch size; the loss does not depend on it. "
            "'auto': the largest that fits, found before the first step."
        },
    )
    reference_cache: str | None = field(
        default=None,
        metadata={
            "help": "Folder of the cache that precompute_ref_log_probs uses, on a disk of this "
            "machine; runs may share it. Default: fastkto in the folder of Hugging Face's caches "
            "(HF_HOME)."
        },
    )
    checkpoint_passes: str | None = field(
        default=None,
        metadata={
            "help": "'auto': turn gradient checkpointing off if the run is estimated to fit into "
            "memory without it. Default: as gradient_checkpointing says.",
            "choices": ["auto"],
        },
    )
    activation_offloading: bool = field(
        default=False,
        metadata={
            "help": "Keep activations in host memory from a pass's forward to its backward, with "
            "or without gradient checkpointing."
        },
    )
    metrics: str = field(
        default="trl",
        metadata={
            "help": "How metrics are averaged. 'trl': over rows in a batch, then over the batches "
            "since the last log. 'exact': over all rows since the last log, whatever their batch.",
            "choices": list(METRICS),
        },
    )
    nonfinite: str = field(
        default="error",
        metadata={
            "help": "A row whose log-probabilities are not finite. 'error': stop before the "
            "optimizer steps. 'nanmean': as TRL's loss, leave rows out whose reference is NaN; "
            "a policy or a KL estimate that is not finite stops the run all the same.",
            "choices": ["error", "nanmean"],
        },
    )
    head: str = field(
        default="auto",
        metadata={
            "help": "'auto': log-probabilities without logits. 'logits': from the model's own "
            "logits, in slices, for a model whose head does something unknown.",
            "choices": ["auto", "logits"],
        },
    )
    backend: str = field(
        default="auto",
        metadata={
            "help": "Implementation of the operations. 'auto': Triton on a GPU, else PyTorch.",
            "choices": ["auto", "triton", "torch"],
        },
    )
    head_memory_mib: int = field(
        default=DEFAULT_HEAD_MEMORY_MIB,
        metadata={"help": "Scratch memory for tiles of logits, in MiB."},
    )

    def __post_init__(self) -> None:
        if self.bf16 is None:
            self.bf16 = not self.fp16 and not self.use_cpu and is_torch_bf16_gpu_available()
        # Newer transformers call it activation_checkpointing and warn about the name TRL uses.
        for old, new in (
            ("gradient_checkpointing", "activation_checkpointing"),
            ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"),
        ):
            if hasattr(self, new) and getattr(self, new) is None:
                setattr(self, new, getattr(self, old))
        super().__post_init__()
        self._resolve()
        check_config(self)

    @classmethod
    def from_arguments(cls, args: TrainingArguments) -> "KTOConfig":
        """`args` as a `KTOConfig`: TRL's, or any other `TrainingArguments`.

        Fields keep their values, and what only a `KTOConfig` has gets its default. Raises
        ValueError for a field that it does not know and that is not at its default: nothing is
        ignored.
        """
        if isinstance(args, cls):
            return args
        known = {one.name for one in fields(cls)}
        for one in fields(args):
            value = getattr(args, one.name)
            default = one.default if one.default_factory is MISSING else one.default_factory()
            if one.name not in known and one.init and value != default:
                raise ValueError(
                    f"args is a {type(args).__name__} with {one.name}={value!r}, which "
                    "fastkto.KTOConfig does not have; leave it out, or pass a fastkto.KTOConfig"
                )
        config = copy.copy(args)
        config.__class__ = cls  # TrainingArguments cannot be initialised a second time
        for one in fields(cls):
            if not hasattr(config, one.name):
                setattr(config, one.name, one.default)
        config._resolve()
        check_config(config)
        return config

    def _resolve(self) -> None:
        """Numbers that a command line gives as text, and what "auto" and None stand for."""
        for name in ("max_tokens_per_pass", "pad_to_multiple_of"):
            if str(getattr(self, name)).isdecimal():
                setattr(self, name, int(getattr(self, name)))
        if self.pad_to_multiple_of == "auto":
            self.pad_to_multiple_of = None
        if self.max_tokens_per_pass is None:
            self.max_tokens_per_pass = DEFAULT_TOKENS

    @property
    def no_grad_tokens(self) -> int:
        """Most tokens in a pass without gradient: twice as many, since it keeps no activations."""
        return 2 * self.grad_tokens

    @property
    def grad_tokens(self) -> int:
        """`max_tokens_per_pass`; its default where "auto" has not been found yet."""
        return self.given_tokens or DEFAULT_TOKENS

    @property
    def given_tokens(self) -> int | None:
        """`max_tokens_per_pass`; None where "auto" has not been found yet."""
        number = self.max_tokens_per_pass
        return number if isinstance(number, int) else None

    @property
    def optimizer_name(self) -> str:
        """The value of `optim`, of which transformers makes a member of an enumeration."""
        return str(getattr(self.optim, "value", self.optim))

    @property
    def steps_in_backward(self) -> bool:
        """Whether the optimizer updates the weights inside backward: a second pass sees others."""
        return any(kind in self.optimizer_name for kind in _STEPS_IN_BACKWARD)

    @property
    def pairs_are_known(self) -> bool:
        """Whether it is known before the first step which rows will be paired."""
        return self.train_sampling_strategy == "sequential" or not self.needs_partners

    @property
    def scores_are_known(self) -> bool:
        """Whether it is known then what the reference will score.

        A batch size that is found while training gives other pairs.
        """
        return self.pairs_are_known and not self.auto_find_batch_size

    @property
    def needs_kl(self) -> bool:
        """Whether the loss uses a KL estimate, and so mismatched sequences."""
        return self.loss_type == "kto"

    @property
    def needs_partners(self) -> bool:
        """Whether the rows that meet are paired; batches may bring mismatched sequences."""
        return self.needs_kl and self.kl_pairing != DATASET_PAIRING


KTOConfig._VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs"]
