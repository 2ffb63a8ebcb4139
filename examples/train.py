"""KTO with a LoRA adapter: python examples/train.py MODEL OUTPUT_DIR."""

import sys
from pathlib import Path

from peft import LoraConfig

from fastkto import KTOConfig, KTOTrainer
from fastkto.data.load import load_rows

model, output_dir = sys.argv[1:]
trainer = KTOTrainer(
    model=model,
    args=KTOConfig(output_dir, num_train_epochs=1, learning_rate=1e-5),
    train_dataset=load_rows(Path(__file__).parent / "kto_rows.jsonl"),
    peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
)
trainer.train()
trainer.save_model()
