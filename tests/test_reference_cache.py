"""The store of reference log-probabilities, and what makes one reference differ from another."""

from __future__ import annotations

import math
import os
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor
from transformers import PreTrainedModel

from fastkto.attention import enable_segments
from fastkto.data.batch import TokenSequence
from fastkto.head import attach_scoring
from fastkto.reference import Reference, choose_reference
from fastkto.reference_cache import Lookup, ReferenceCache
from fastkto.reference_fingerprint import reference_fingerprint
from fastkto.score_store import FILE_NAME, ReferenceCacheError, ScoreStore, default_folder
from tests.models import tiny_model

# ---- The store ----


def test_values_come_back_to_the_bit(tmp_path: Path) -> None:
    values = {b"a": -1 / 3, b"b": -0.0, b"c": 5e-324, b"d": -1e300, b"e": -12.0}
    store = ScoreStore(tmp_path)
    store.write(values | {b"nan": math.nan, b"infinite": -math.inf})
    store.write({b"a": 7.0})  # the first value stays
    store.close()
    read = ScoreStore(tmp_path).read([*values, b"nan", b"infinite", b"other"])
    assert {k: struct.pack("d", v) for k, v in read.items()} == {
        k: struct.pack("d", v) for k, v in values.items()
    }


@contextmanager
def without_root() -> Iterator[None]:
    """For root no folder is read-only."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_read_only_folder_is_named_and_loses_nothing() -> None:
    with tempfile.TemporaryDirectory() as name:  # pytest's own is closed to other users
        folder = Path(name)
        store = ScoreStore(folder)
        store.write({b"a": 1.0})
        store.close()
        (folder / FILE_NAME).chmod(0o444)
        folder.chmod(0o555)
        for place in (folder, folder / "new"):
            message = "cannot be used: .*needs a folder that can be written"
            with without_root(), pytest.raises(ReferenceCacheError, match=message):
                ScoreStore(place)
        folder.chmod(0o755)
        (folder / FILE_NAME).chmod(0o644)
        assert ScoreStore(folder).read([b"a"]) == {b"a": 1.0}


WRITER = """
import sys
from fastkto.score_store import ScoreStore
store = ScoreStore(sys.argv[1])
print("open", flush=True)
for number in range(int(sys.argv[3])):
    keys = [f"{sys.argv[2]}-{number}-{part}".encode() for part in range(50)]
    store.write({key: float(number) for key in keys})
    print(number, flush=True)
"""


def start_writer(folder: Path, name: str, transactions: int) -> subprocess.Popen:
    path = {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(folder), name, str(transactions)],
        env=os.environ | path,
        stdout=subprocess.PIPE,
        text=True,
    )


def written(store: ScoreStore, name: str, number: int) -> int:
    values = store.read([f"{name}-{number}-{part}".encode() for part in range(50)])
    assert set(values.values()) <= {float(number)}
    return len(values)


def test_two_processes_write_at_once(tmp_path: Path) -> None:
    writers = [start_writer(tmp_path, name, 200) for name in "ab"]
    for writer in writers:
        writer.communicate(timeout=60)
        assert writer.returncode == 0
    store = ScoreStore(tmp_path)
    assert all(written(store, name, number) == 50 for name in "ab" for number in range(200))


def test_a_kill_in_the_middle_of_writing_loses_nothing_and_leaves_nothing_half(
    tmp_path: Path,
) -> None:
    writer = start_writer(tmp_path, "a", 10**9)
    assert writer.stdout is not None and writer.stdout.readline() == "open\n"
    time.sleep(0.2)
    writer.kill()
    reported = [int(line) for line in writer.stdout.read().split()]
    assert writer.wait() == -signal.SIGKILL and len(reported) > 5
    store = ScoreStore(tmp_path)
    assert all(written(store, "a", number) == 50 for number in reported)
    assert written(store, "a", len(reported)) in (0, 50)
    assert store._connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    store.write({b"more": 1.0})


@pytest.mark.parametrize("start", [0, 4096])
def test_damaged_file_is_named(start: int, tmp_path: Path) -> None:
    store = ScoreStore(tmp_path)
    store.write({f"{number}".encode(): 0.0 for number in range(2000)})
    store.close()
    content = bytearray((tmp_path / FILE_NAME).read_bytes())
    content[start : start + 8192] = b"damage! " * 1024
    (tmp_path / FILE_NAME).write_bytes(content)
    message = f"{tmp_path / FILE_NAME} is damaged: .*Delete it"
    with pytest.raises(ReferenceCacheError, match=message):
        ScoreStore(tmp_path).read([f"{number}".encode() for number in range(2000)])


def test_many_processes_make_a_store_at_once(tmp_path: Path) -> None:
    writers = [start_writer(tmp_path, f"writer{number}", 1) for number in range(6)]
    assert [writer.wait(timeout=120) for writer in writers] == [0] * 6


def test_a_store_serves_another_thread(tmp_path: Path) -> None:
    store = ScoreStore(tmp_path)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(store.write, {b"key": 1.5}).result()
    assert store.read([b"key"]) == {b"key": 1.5}


def test_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ReferenceCacheError, match=f"{tmp_path}/file.*choose another"):
        ScoreStore(tmp_path / "file")


def test_full_disk_is_an_error_that_leaves_what_was_there(tmp_path: Path) -> None:
    store = ScoreStore(tmp_path)
    store.write({b"first": 1.0})
    store._connection.execute("PRAGMA max_page_count = 4")
    with pytest.raises(ReferenceCacheError, match=f"{FILE_NAME} cannot be used: .*full.*free"):
        store.write({os.urandom(16): 0.0 for _ in range(2000)})
    assert store.read([b"first"]) == {b"first": 1.0}


def test_default_folder_does_not_depend_on_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", "/somewhere")
    assert default_folder() == Path("/somewhere/fastkto")


# ---- Lookups ----


def sequence(prompt: list[int], completion: list[int]) -> TokenSequence:
    return TokenSequence(torch.tensor(prompt, dtype=torch.int64), torch.tensor(completion), 0)


def test_lookup_finds_equal_content_only(tmp_path: Path) -> None:
    cache = ReferenceCache(ScoreStore(tmp_path), b"reference")
    one, two = sequence([1, 2], [3]), sequence([], [4])
    first = Lookup(cache, [[one, two], [one]])
    assert first.missing == [[one, two], []] and (first.hits, first.misses) == (0, 3)
    scored = torch.tensor([-1 / 3, -2.0], dtype=torch.float64)
    assert first.complete(scored).tolist() == [-1 / 3, -2.0, -1 / 3]

    others = [sequence([1], [2, 3]), sequence([1, 2], [3, 0]), sequence([2, 1], [3])]
    second = Lookup(cache, [[two, *others], [one]])
    assert second.missing == [others, []] and (second.hits, second.misses) == (2, 3)
    scored = torch.tensor([1.0, 2.0, math.nan], dtype=torch.float64)
    assert second.complete(scored).tolist() == pytest.approx(
        [-2.0, 1.0, 2.0, math.nan, -1 / 3], rel=0, abs=0, nan_ok=True
    )
    assert Lookup(cache, [others]).missing == [others[2:]]  # what is not finite is not kept
    assert Lookup(ReferenceCache(cache.store, b"other"), [[one]]).missing == [[one]]
    assert Lookup(cache, [[], []]).complete(torch.zeros(0).double()).shape == (0,)


# ---- Fingerprints ----


def fingerprint(model: nn.Module, mixed_precision: str = "no", **scoring: Any) -> bytes:
    attach_scoring(model, **scoring)
    model.requires_grad_(False)
    reference = Reference("", model=model)
    return reference_fingerprint(reference, model, mixed_precision=mixed_precision)


def change_last_bit(model: PreTrainedModel) -> None:
    weight = model.model.layers[1].mlp.down_proj.weight.data
    bits = {torch.float32: torch.int32, torch.bfloat16: torch.int16}[weight.dtype]
    weight.view(bits)[3, 5] ^= 1


def buffer(model: PreTrainedModel) -> None:
    model.model.register_buffer("extra", torch.zeros(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "change",
    [change_last_bit, buffer, lambda model: model.to(torch.float16)],
    ids=["last bit", "buffer", "dtype"],
)
def test_another_weight_is_another_reference(
    change: Callable[[Any], Any], dtype: torch.dtype
) -> None:
    model = tiny_model("gemma2", dtype=dtype)
    before = fingerprint(model)
    assert fingerprint(tiny_model("gemma2", dtype=dtype)) == before
    change(model)
    assert fingerprint(model) != before


@pytest.mark.parametrize(
    "overrides",
    [
        {"final_logit_softcapping": 3.5},
        {"sliding_window": 9},
        {"rms_norm_eps": 1e-4},
    ],
    ids=str,
)
def test_another_config_is_another_reference(overrides: dict[str, Any]) -> None:
    assert fingerprint(tiny_model("gemma2", **overrides)) != fingerprint(tiny_model("gemma2"))


def test_another_attention_is_another_reference() -> None:
    eager, sdpa = (tiny_model("llama", attn_implementation=name) for name in ("eager", "sdpa"))
    assert fingerprint(eager) != fingerprint(sdpa)


def test_another_scale_head_backend_or_precision_is_another_reference() -> None:
    def of(logit_scale: float = 0.4, precision: str = "no", **scoring: Any) -> bytes:
        return fingerprint(tiny_model("cohere", logit_scale=logit_scale), precision, **scoring)

    others = [of(0.41), of(precision="bf16"), of(head="logits"), of(backend="triton")]
    assert len({of(), *others}) == 5


def test_what_scores_do_not_depend_on_leaves_the_fingerprint(tmp_path: Path) -> None:
    model = tiny_model("llama")
    before = fingerprint(model)
    model.config.use_cache = not model.config.use_cache
    model.config.pad_token_id, model.config._name_or_path = 5, "elsewhere"
    assert fingerprint(model, head_memory_mib=3) == before
    enable_segments(model)
    assert fingerprint(model) == before
    eager = tiny_model("llama", attn_implementation="eager")
    before = fingerprint(eager)
    enable_segments(eager)
    assert fingerprint(eager) == before


def adapted(new_adapter: bool, **fields: Any) -> tuple[PeftModel, Reference]:
    torch.manual_seed(0)
    fields = {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": False, **fields}
    config = LoraConfig(task_type="CAUSAL_LM", **fields)
    policy = get_peft_model(tiny_model("llama", seed=1), config)
    reference = choose_reference(policy, None, new_adapter=new_adapter, init_kwargs={})
    attach_scoring(policy)
    return policy, reference


def move(policy: PeftModel, part: str) -> None:
    for name, parameter in policy.named_parameters():
        if part in name:
            parameter.data.view(torch.int32).flatten()[0] ^= 1


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [3, 4]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj", "lm_head"]},
    ],
    ids=str,
)
@pytest.mark.parametrize("new_adapter", [True, False])
def test_trained_adapter_is_no_part_of_the_reference(
    new_adapter: bool, fields: dict[str, Any]
) -> None:
    policy, reference = adapted(new_adapter, **fields)
    before = reference_fingerprint(reference, policy)
    trained = [name for name, p in policy.named_parameters() if p.requires_grad]
    assert trained
    for name in trained:
        move(policy, name)
    assert reference_fingerprint(reference, policy) == before
    move(policy, "layers.1.mlp.down_proj.weight")
    assert reference_fingerprint(reference, policy) != before


def test_frozen_adapter_is_part_of_the_reference() -> None:
    policy, reference = adapted(False)
    before = reference_fingerprint(reference, policy)
    other_alpha, _ = adapted(False, lora_alpha=9)
    assert reference_fingerprint(reference, other_alpha) != before
    assert reference_fingerprint(Reference("base"), policy) != before
    move(policy, "q_proj.lora_B.ref.weight")
    assert reference_fingerprint(reference, policy) != before


def test_reference_that_is_trained_is_refused() -> None:
    policy, reference = adapted(True)
    policy.base_model.model.lm_head.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="lm_head.weight is trained in the policy and used by"):
        reference_fingerprint(reference, policy)


def test_weights_that_cannot_be_read_are_refused() -> None:
    model = tiny_model("llama")
    weight = model.model.norm.weight.data
    model.model.norm.weight = nn.Parameter(TwoTensor(weight, weight))
    with pytest.raises(ValueError, match="bytes of model.norm.weight, a TwoTensor"):
        fingerprint(model)
    model = tiny_model("llama")
    model.lm_head.weight.ds_tensor = torch.zeros(1)  # as ZeRO-3 marks what it has cut up
    with pytest.raises(ValueError, match="whole of lm_head.weight, which ZeRO-3 has cut up"):
        fingerprint(model)
