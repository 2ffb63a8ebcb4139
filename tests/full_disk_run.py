"""A run of several processes, which leaves checkpoints and ranks' errors in the folder given."""

import os
import sys
from pathlib import Path

from fastkto.full_disk import WriteError
from tests.launch import finish
from tests.test_full_disk import trainer

folder = Path(sys.argv[1])
run = trainer(folder, optim="sgd")
try:
    run.train()
except WriteError as error:
    (folder / f"error {run.args.process_index}").write_text(str(error))
    os._exit(1)
finish()
