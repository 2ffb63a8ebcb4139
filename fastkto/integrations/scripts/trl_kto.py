"""TRL's script `kto.py` with fastkto's trainer, for `accelerate launch`."""

from fastkto.integrations.trl import patch

if __name__ == "__main__":
    patch()
    from trl.scripts.kto import main, make_parser

    main(*make_parser().parse_args_and_config(fail_with_unknown_args=False))
