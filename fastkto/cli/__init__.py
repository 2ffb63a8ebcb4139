"""The command line: `fastkto train`, `plan`, `demo`, `trl` and `llamafactory`."""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import fastkto
from fastkto.cli.console import (
    CommandError,
    SentenceParser,
    complain,
    mistakes,
    nearest,
    rank,
    say,
    show_library_logs,
)

COMMANDS = {
    "train": "train a model on rows of your own",
    "plan": "say what a run will need in memory, before anything is loaded",
    "demo": "teach a tiny model a task and improve it with KTO: no download, no GPU, 3 minutes",
    "trl": "run TRL's command line with fastkto's trainer: fastkto trl kto ...",
    "llamafactory": "run a LLaMA-Factory configuration with stage: kto on fastkto's trainer",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit status: 0, 2 for a mistake of the user's, 130 for Ctrl-C."""
    words = sys.argv[1:] if argv is None else list(argv)
    try:
        _run(words)
    except CommandError as error:
        if rank() == 0 or error.everywhere:
            complain(f"error: {error}")
        return 2
    except KeyboardInterrupt as error:
        if rank() == 0:
            complain(str(error) or "interrupted")
        return 130
    return 0


def _run(words: list[str]) -> None:
    lines = "\n".join(f"  {name:<12} {text}" for name, text in COMMANDS.items())
    parser = SentenceParser(
        prog="fastkto",
        usage="fastkto COMMAND ...",
        description="KTO training for long contexts and little memory.",
        epilog=f"commands:\n{lines}\n\n`fastkto COMMAND --help` lists a command's arguments.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", nargs="?", help=argparse.SUPPRESS)
    parser.add_argument("--version", action="version", version=f"fastkto {fastkto.__version__}")
    command = parser.parse_args(words[:1]).command
    if command is None:
        say(parser.format_help())
    elif command not in COMMANDS:
        near = nearest(command, COMMANDS)
        raise CommandError(f"there is no command {command!r}; did you mean {near}?")
    else:
        show_library_logs()
        run = {
            "train": _train,
            "plan": _plan,
            "demo": _demo,
            "trl": _trl,
            "llamafactory": _llamafactory,
        }
        run[command](words[1:])


def _train(words: list[str]) -> None:
    # transformers takes seconds to import, so what does not need it comes first
    from fastkto.cli.parser import HELP_FLAGS, TrainParser

    parser = TrainParser()
    if set(words) & set(HELP_FLAGS):
        say(parser.format_help() if set(words) & {"-h", "--help"} else parser.format_all())
        return
    arguments = parser.parse(words)

    from fastkto.cli.train import train

    train(arguments)


def _plan(words: list[str]) -> None:
    from fastkto.cli.parser import HELP_FLAGS
    from fastkto.cli.plan import PlanParser, plan

    parser = PlanParser()
    if set(words) & set(HELP_FLAGS):
        say(parser.format_help() if set(words) & {"-h", "--help"} else parser.format_all())
        return
    plan(*parser.parse_plan(words))


def _trl(words: list[str]) -> None:
    with mistakes(ImportError):
        from fastkto.integrations.trl import run_command

        try:
            status = run_command(words)
        except subprocess.CalledProcessError as error:  # which has said on its own what is wrong
            status = error.returncode
    if status:
        raise SystemExit(status)


def _demo(words: list[str]) -> None:
    parser = SentenceParser(prog="fastkto demo", description=COMMANDS["demo"])
    parser.add_argument(
        "--output_dir", "--output-dir", type=Path, default=Path("fastkto-demo"), metavar="FOLDER",
        help="where the model, the rows and the plot go (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--seed", type=int, default=0, metavar="NUMBER", help="another seed, another run"
    )
    arguments = parser.parse_args(words)

    from fastkto.demo import run_demo

    with mistakes(OSError):
        run_demo(arguments.output_dir, seed=arguments.seed, say=say)


def _llamafactory(words: list[str]) -> None:
    usage = "fastkto llamafactory train FILE [field=value ...]"
    if set(words) & {"-h", "--help"} or not words:
        say(
            f"usage: {usage}\n\n{COMMANDS['llamafactory']}\n\nFILE is what `llamafactory-cli "
            "train` takes, a YAML or JSON file. Fields of fastkto's own stand\nunder `fastkto:` in "
            "it, for example max_tokens_per_pass. See docs/from-llama-factory.md."
        )
        return
    if words[0] != "train" or len(words) == 1:
        raise CommandError(
            f"{' '.join(words)!r} is no command of LLaMA-Factory's here; use {usage}"
        )

    from fastkto.integrations.llamafactory.launch import train

    with mistakes(FileNotFoundError):
        train(words[1:])
