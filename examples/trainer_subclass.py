"""KTO in a subclass of transformers' Trainer: python examples/trainer_subclass.py MODEL FOLDER"""

import sys

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import fastkto


class MyTrainer(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        known = fastkto.completion_logprobs(reference, inputs)
        kl = fastkto.estimate_kl(model, reference, inputs, reduce=self.accelerator.reduce)
        return fastkto.kto_loss(
            *fastkto.score_completions(model, inputs), known, inputs["label"], kl=kl
        ).loss


path, folder = sys.argv[1:]
model, reference = (AutoModelForCausalLM.from_pretrained(path) for _ in range(2))
for scored in (model, reference):
    fastkto.attach_scoring(scored)
data = load_dataset("json", data_files="examples/kto_rows.jsonl", split="train")
rows, _ = fastkto.prepare_rows(data, AutoTokenizer.from_pretrained(path), max_length=512)
args = TrainingArguments(folder, per_device_train_batch_size=8, remove_unused_columns=False)
args.accelerator_config.dispatch_batches = False  # ragged batches cannot be cut up
trainer = MyTrainer(model, args, fastkto.KTOCollator(512), rows)
reference.to(args.device)
trainer.train()
