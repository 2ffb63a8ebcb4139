"""Settings of the short runs by which libraries are compared."""

from typing import Any

SHORT_RUN: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "logging_steps": 1,
    "learning_rate": 0.02,
    "optim": "sgd",
    "lr_scheduler_type": "constant",
    "use_cpu": True,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "seed": 7,
}
