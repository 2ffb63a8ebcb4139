"""The model of `fastkto demo`: a tiny decoder, its tokenizer, supervised training and sampling."""

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fastkto.demo_task import LETTERS, LONGEST_ANSWER

LESSON_BATCH = 64
LESSON_LEARNING_RATE = 3e-3
SAMPLING_BATCH = 256


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each character."""
    vocabulary = ["<pad>", "<eos>", "<unk>", "=", *LETTERS]
    tokenizer = Tokenizer(
        models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
    )


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """An untrained decoder of about 190,000 parameters, fp32, on the GPU if there is one."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def teach(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, lessons: list[tuple[str, str]]
) -> None:
    """Supervised training of `model`, in place, one epoch."""
    steps = len(lessons) // LESSON_BATCH
    optimizer = torch.optim.AdamW(model.parameters(), lr=LESSON_LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LESSON_LEARNING_RATE, total_steps=steps, pct_start=0.1
    )
    model.train()
    for step in tqdm(range(steps), desc="teaching", unit="step"):
        batch = lessons[step * LESSON_BATCH : (step + 1) * LESSON_BATCH]
        model(**_lesson_batch(tokenizer, batch, model.device)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()


def _lesson_batch(
    tokenizer: PreTrainedTokenizerFast, lessons: list[tuple[str, str]], device: torch.device
) -> dict[str, Tensor]:
    """input_ids, attention_mask and labels, [B, T] int64; labels are -100 before the answer."""
    texts = [prompt + answer + tokenizer.eos_token for prompt, answer in lessons]
    batch = tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
    labels = batch["input_ids"].clone()
    for i, (_, answer) in enumerate(lessons):
        labels[i, : -(len(answer) + 1)] = -100
    return {name: tensor.to(device) for name, tensor in {**batch, "labels": labels}.items()}


def sample_answers(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[str],
    *,
    samples: int,
    seed: int,
) -> list[list[str]]:
    """`samples` answers to each prompt at temperature 1, as text up to the end-of-sequence token.

    Models that are sampled with the same seed meet the same random numbers, which takes most of the
    sampling noise out of their difference. The global random state stays as it was.
    """
    answers: list[list[str]] = []
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        for start in tqdm(range(0, len(prompts), SAMPLING_BATCH), desc="answering", unit="batch"):
            batch = tokenizer(
                prompts[start : start + SAMPLING_BATCH],
                padding=True,
                return_tensors="pt",
                return_token_type_ids=False,
            ).to(model.device)
            tokens = model.generate(
                **batch,
                do_sample=True,
                top_k=0,
                num_return_sequences=samples,
                max_new_tokens=LONGEST_ANSWER,
            )
            texts = tokenizer.batch_decode(tokens[:, batch["input_ids"].shape[1] :])
            texts = [text.split(tokenizer.eos_token)[0] for text in texts]
            answers += [texts[i : i + samples] for i in range(0, len(texts), samples)]
    return answers
