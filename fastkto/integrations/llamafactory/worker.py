"""What torchrun runs in each process: LLaMA-Factory's training, patched."""

import sys


def main() -> None:
    """Train as the configuration in `sys.argv` says."""
    from fastkto.integrations.llamafactory import patch

    patch()
    from llamafactory.train import tuner

    tuner.run_exp()


if __name__ == "__main__":
    del sys.path[0]  # this folder, whose modules are not to be found by their bare names
    main()
