"""The parser of `fastkto train`: flags and a YAML file, a short help, errors in one sentence."""

import argparse
import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from fastkto.cli.arguments import Arguments, DataArguments, ModelArguments
from fastkto.cli.console import CommandError, SentenceParser, mistakes, nearest, unknown_flag
from fastkto.config import KTOConfig

HELP_FLAGS = ("-h", "--help", "--help_all", "--help-all")

# What `--help` shows; `--help_all` shows everything.
COMMON = {
    "what to train": (
        "model_name_or_path", "dataset_name", "eval_data", "output_dir", "config", "ref_model",
    ),
    "how": (
        "loss_type", "beta", "desirable_weight", "undesirable_weight", "learning_rate",
        "num_train_epochs", "max_steps", "per_device_train_batch_size",
        "gradient_accumulation_steps", "train_sampling_strategy", "max_length", "seed",
    ),
    "memory and speed": (
        "max_tokens_per_pass", "dtype", "bf16", "attn_implementation", "gradient_checkpointing",
        "checkpoint_passes", "activation_offloading", "precompute_ref_log_probs", "backend", "head",
        "head_memory_mib",
    ),
    "adapters": ("use_peft", "lora_r", "lora_alpha", "lora_target_modules", "load_in_4bit"),
    "logs and checkpoints": (
        "logging_steps", "save_steps", "eval_strategy", "resume_from_checkpoint", "report_to",
    ),
}  # fmt: skip


# Where the texts of TrainingArguments do not fit.
HELP = {
    "--output_dir": "Folder for the model, checkpoints, metrics and the plot.",
    "--resume_from_checkpoint": "A checkpoint's folder; alone or with true: the last one in "
    "output_dir.",
    "--max_steps": "Optimizer steps; overrides num_train_epochs if above 0.",
    "--per_device_train_batch_size": "Rows in a batch on one device; 2 or more for loss_type=kto.",
    "--gradient_accumulation_steps": "Batches in an optimizer step.",
    "--save_steps": "Save a checkpoint every so many steps; below 1: a share of all steps.",
    "--report_to": "Experiment trackers: wandb, tensorboard, ..., all or none.",
}
# A flag with more choices than these does not list them in an error.
MOST_CHOICES = 8
VALUE_NAMES: dict[Any, str] = {str: "TEXT", int: "NUMBER", float: "NUMBER"}


class TrainParser(HfArgumentParser):
    """`HfArgumentParser` with a YAML file of defaults, a short help, and errors in one sentence."""

    groups: dict[str, tuple[str, ...]] = COMMON
    usage_text = "fastkto train --model MODEL --data ROWS [--output_dir FOLDER] ..."

    def __init__(self) -> None:
        super().__init__(
            (ModelArguments, DataArguments, KTOConfig),
            prog=" ".join(self.usage_text.split()[:2]),
            usage=self.usage_text,
            formatter_class=_HelpFormatter,
            add_help=False,
            allow_abbrev=False,
        )
        self.add_argument(
            "--config", help="YAML file with any of these arguments; flags win.", metavar="FILE"
        )
        for action in self._actions:
            if action.type is string_to_bool:
                action.type, action.nargs, action.const = _true_or_false, "?", True
        # As annotated: HfArgumentParser has taken the None out of the dataclass fields' types.
        self._optional = {
            name
            for kind in (ModelArguments, DataArguments, KTOConfig)
            for base in kind.__mro__
            for name, annotation in vars(base).get("__annotations__", {}).items()
            if "None" in str(annotation)
        }
        self._option_string_actions["--max_tokens_per_pass"].type = _number_or_auto
        resume = self._option_string_actions["--resume_from_checkpoint"]
        resume.nargs, resume.const = "?", "true"
        for flag, text in HELP.items():
            self._option_string_actions[flag].help = text

    def parse(self, argv: Sequence[str]) -> Arguments:
        """The arguments; flags override the YAML file, and that the defaults.

        Raises CommandError for anything that cannot be used.
        """
        return self.build(self.read(argv))

    def read(self, argv: Sequence[str]) -> argparse.Namespace:
        """The values of all arguments, not yet checked together."""
        config, flags = _config_parser().parse_known_args(list(argv))
        if config.config is not None:
            self._read_defaults(Path(config.config).expanduser())
        namespace, unknown = self.parse_known_args(flags)
        if unknown:
            text = unknown_flag(unknown, self._names())
            raise CommandError(f"{text} ({self.prog} --help_all lists all)")
        return namespace

    def build(self, namespace: argparse.Namespace) -> Arguments:
        """The arguments that the values make; raises CommandError where they do not fit."""
        values = vars(namespace)

        def make(kind: Any) -> Any:
            names = [field.name for field in dataclasses.fields(kind) if field.init]
            return kind(**{name: values[name] for name in names})

        with mistakes(ValueError, TypeError, ImportError, OSError):
            return Arguments(make(ModelArguments), make(DataArguments), make(KTOConfig))

    def _read_defaults(self, path: Path) -> None:
        """Make the values of a YAML file the defaults, with the same checks as for flags."""
        words = []
        for key, value in _read_yaml(path).items():
            action = self._option_string_actions.get(f"--{key}")
            if action is None or f"--{key}" in HELP_FLAGS or str(key).startswith("no_"):
                near = nearest(str(key), self._names())
                raise CommandError(f"{path}: there is no field {key!r}; did you mean {near}?")
            if key == "config":
                raise CommandError(f"{path}: a file cannot name another file with config")
            if isinstance(value, list) and action.nargs is None:
                raise CommandError(f"{path}: {key} takes one value, and {value} is a list")
            if value is None and action.dest not in self._optional:
                raise CommandError(f"{path}: {key} has no value; give one, or leave {key} out")
            if value is None or value == []:
                self.set_defaults(**{action.dest: value})
            elif isinstance(value, list):
                words += [f"--{key}", *map(str, value)]
            elif value is False and "no" in (action.choices or ()):
                words.append(f"--{key}=no")  # YAML reads a bare no as false
            else:
                text = json.dumps(value) if isinstance(value, dict | bool) else str(value)
                words.append(f"--{key}={text}")
        try:
            self.set_defaults(**vars(self.parse_known_args(words)[0]))
        except CommandError as error:
            raise CommandError(f"{path}: {str(error).removeprefix('--')}") from None

    def _names(self) -> list[str]:
        """Every field's names, aliases included."""
        flags = [flag[2:] for flag in self._option_string_actions if flag.startswith("--")]
        return [name for name in flags if "-" not in name and not name.startswith("no_")]

    def error(self, message: str) -> NoReturn:
        raise CommandError(re.sub(r"^argument (--[^/:]+)[^:]*: ", r"\1: ", message))

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        choices = [str(choice) for choice in action.choices]
        if len(choices) > MOST_CHOICES:
            near = nearest(str(value), choices)
            raise argparse.ArgumentError(action, f"there is no {value!r}; did you mean {near}?")
        raise argparse.ArgumentError(action, f"{value!r} is none of {', '.join(choices)}")

    def format_help(self) -> str:
        """The arguments that most runs need."""
        groups = {
            title: [self._option_string_actions[f"--{name}"] for name in names]
            for title, names in self.groups.items()
        }
        more = f"{self.prog} --help_all lists all {len(self._names())} arguments."
        return self._format(groups, more)

    def format_all(self) -> str:
        """Every argument."""
        return self._format({"arguments": [a for a in self._actions if a.option_strings]}, None)

    def _format(self, groups: dict[str, list[argparse.Action]], epilog: str | None) -> str:
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, (), ())
        for title, actions in groups.items():
            formatter.start_section(title)
            formatter.add_arguments(actions)
            formatter.end_section()
        formatter.add_text(epilog)
        return str(formatter.format_help())


class _HelpFormatter(argparse.HelpFormatter):
    """One spelling of each flag, and the default only where there is one."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        names = [n for n in action.option_strings if "-" not in n[2:] or n.startswith("--no_")]
        names = sorted(names, key=len)[:2] if len(names) > 1 else names
        choices = [str(choice) for choice in action.choices or ()]
        values = "{" + ",".join(choices) + "}"
        if not choices or len(values) > 40:
            values = str(action.metavar or VALUE_NAMES.get(action.type, "NAME"))
        if action.nargs == 0:
            return ", ".join(names)
        if action.type is _true_or_false:
            values = "true|false"
        if action.type is _number_or_auto:
            values = "NUMBER|auto"
        return f"{', '.join(names)} {values}"

    def _get_help_string(self, action: argparse.Action) -> str:
        text = " ".join((action.help or "").split())
        if action.default in (None, argparse.SUPPRESS, "", []) or "(default" in text:
            return text
        return f"{text} (default: %(default)s)"


def _true_or_false(text: str) -> bool:
    try:
        return bool(string_to_bool(text))
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false") from None


def _number_or_auto(text: str) -> int | str:
    if text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor auto") from None


def _config_parser() -> argparse.ArgumentParser:
    """A parser that finds --config alone, since the file's values must be known first."""
    parser = SentenceParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    return parser


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CommandError(f"--config: there is no file {path}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise CommandError(f"{path} is no YAML file: {reason}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise CommandError(f"{path} holds a {kind}; write one `field: value` on each line")
    return content
