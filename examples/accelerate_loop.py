"""KTO in a loop of one's own, with accelerate: python examples/accelerate_loop.py MODEL FOLDER"""

import sys

import torch
from accelerate import Accelerator
from datasets import load_dataset
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

import fastkto

path, folder = sys.argv[1:]
accelerator = Accelerator()
tokenizer = AutoTokenizer.from_pretrained(path)
policy = AutoModelForCausalLM.from_pretrained(path)
reference = AutoModelForCausalLM.from_pretrained(path).requires_grad_(False)
fastkto.attach_scoring(policy)
fastkto.attach_scoring(reference)

data = load_dataset("json", data_files="examples/kto_rows.jsonl", split="train")
rows, _ = fastkto.prepare_rows(data, tokenizer, max_length=512)
loader = DataLoader(
    rows, batch_size=8, shuffle=True, collate_fn=fastkto.KTOCollator(512), drop_last=True
)
optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6)
policy, reference, optimizer, loader = accelerator.prepare(policy, reference, optimizer, loader)

for batch in loader:
    reference_logprob = fastkto.completion_logprobs(reference, batch, max_length=512)
    kl = fastkto.estimate_kl(policy, reference, batch, max_length=512, reduce=accelerator.reduce)
    scores = fastkto.score_completions(policy, batch, max_length=512)
    result = fastkto.kto_loss(*scores, reference_logprob, batch["label"], kl=kl, beta=0.1)
    accelerator.backward(result.loss)
    optimizer.step()
    optimizer.zero_grad()
    metrics = {
        "loss": result.loss.item(),
        **fastkto.reward_metrics(result, batch["label"], beta=0.1),
    }
    accelerator.print({name: round(value, 4) for name, value in metrics.items()})

accelerator.unwrap_model(policy).save_pretrained(folder)
