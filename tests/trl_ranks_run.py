"""The same small run in TRL's trainer and in ours on two processes, for tests/test_trl_ranks.py.

    torchrun --nproc-per-node 2 tests/trl_ranks_run.py OUTPUT_DIR

Neither data set fills its last batch on all ranks.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from accelerate import PartialState

from tests.launch import finish
from tests.test_trl_equality import models
from tests.trl_runs import both, text_rows

CASES: dict[str, dict[str, Any]] = {
    "one": {},
    "accumulated": {"gradient_accumulation_steps": 2},
    "not dropped": {"dataloader_drop_last": False},
}


def main(directory: Path) -> None:
    state = PartialState(cpu=True)
    for case, fields in CASES.items():
        logs = both(
            directory / f"rank {state.process_index}",
            {"max_tokens_per_pass": 40},
            equal_weights=case != "not dropped",
            **models(),
            train_dataset=text_rows(21),
            eval_dataset=text_rows(10, seed=9),
            per_device_train_batch_size=2,
            per_device_eval_batch_size=2,
            max_steps=6,
            **{"dataloader_drop_last": True, **fields},
        )
        (directory / f"{case} {state.process_index}.json").write_text(json.dumps(logs))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    finish()
