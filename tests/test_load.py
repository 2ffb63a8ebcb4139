"""Data sets from files, their cache, and the example data."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset, DatasetDict
from transformers import PreTrainedTokenizerFast

from fastkto.data.load import load_rows
from fastkto.data.rows import prepare_rows
from tests.models import tiny_tokenizer
from tests.row_data import MAX_LENGTH, make, text_data, text_row

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` would find what an earlier test has written."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def save(rows: list[dict[str, Any]], path: Path) -> Path:
    dataset = Dataset.from_list(rows)
    if path.suffix == ".jsonl":
        dataset.to_json(path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".csv":
        dataset.to_csv(path)
    elif path.suffix == ".parquet":
        dataset.to_parquet(path)
    else:
        dataset.save_to_disk(path)
    return path


@pytest.mark.parametrize("name", ["r.jsonl", "r.json", "r.csv", "r.parquet", "folder"])
def test_files_of_every_kind(name: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = text_data(12)
    loaded = load_rows(save(rows, tmp_path / name))
    assert loaded.column_names == ["prompt", "completion", "label"]
    prepared, report = prepare_rows(loaded, tokenizer, max_length=MAX_LENGTH)
    wanted, _ = prepare_rows(Dataset.from_list(rows), tokenizer, max_length=MAX_LENGTH)
    assert list(prepared) == list(wanted)
    assert report.desirable == report.undesirable == 6


def test_cells_of_a_csv_file_stay_text(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(
        '\ufeffprompt,completion,label\n1+1?,2,1\n"gas, ""inert""?",NA,0\n2-2?,00,true\n'
    )
    assert list(load_rows(str(path))) == [
        {"prompt": "1+1?", "completion": "2", "label": "1"},
        {"prompt": 'gas, "inert"?', "completion": "NA", "label": "0"},
        {"prompt": "2-2?", "completion": "00", "label": "true"},
    ]


def test_mixed_labels_in_a_file_are_an_error_with_the_row(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = tmp_path / "rows.jsonl"
    rows = text_data(4, label={1: "maybe", 2: 0})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    # Older versions of datasets cannot read such a file, newer ones leave the label as it is.
    message = r"no boolean: row 1 \('maybe'\)|changed from boolean to string in row 1"
    with pytest.raises(ValueError, match=message):
        prepare_rows(load_rows(path), tokenizer, max_length=MAX_LENGTH)


def test_a_slice_of_a_file_and_a_split_of_a_folder(tmp_path: Path) -> None:
    path = save(text_data(12), tmp_path / "rows.jsonl")
    assert len(load_rows(path, split="train[:5]")) == 5
    assert len(load_rows(path, split="test")) == 12
    splits = {"train": text_data(3), "test": text_data(2)}
    folder = tmp_path / "folder"
    DatasetDict({k: Dataset.from_list(v) for k, v in splits.items()}).save_to_disk(folder)
    assert len(load_rows(folder, split="test")) == 2
    repository = tmp_path / "repository"
    repository.mkdir()
    for split, rows in splits.items():
        save(rows, repository / f"{split}.jsonl")
    assert len(load_rows(str(repository))) == 3
    assert len(load_rows(str(repository), split="test")) == 2


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("rows.jsonl", "", "cannot read split 'train' of .*rows.jsonl: it has no rows"),
        ("rows.jsonl", "\n\n", "cannot read split 'train' of .*rows.jsonl: "),
        ("rows.csv", "", "cannot read split 'train' of .*rows.csv: it has no rows"),
        ("rows.jsonl", '{"prompt": "p"}\n{"prompt": bad\n', "rows.jsonl: JSON parse error.*row 1"),
        ("rows.parquet", "text", "rows.parquet: Parquet file size is 4 bytes"),
        ("rows.txt", "text", "must end in .jsonl, .json, .csv, .parquet; convert or rename it"),
    ],
)
def test_files_that_cannot_be_read(name: str, text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        load_rows(tmp_path / name)


@pytest.mark.parametrize("name", ["no.jsonl", "./no", "/no/folder", "~/no-such-folder/no.csv"])
def test_a_missing_file(name: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no file or folder .*no"):
        load_rows(name)


def test_a_name_that_is_neither_here_nor_on_the_hub() -> None:
    message = "fastkto/no-such-rows is no local file or folder, and the hub gave no such data set"
    with pytest.raises(FileNotFoundError, match=message):
        load_rows("fastkto/no-such-rows")


def test_an_unknown_split_of_a_folder(tmp_path: Path) -> None:
    DatasetDict(train=Dataset.from_list(text_data(2))).save_to_disk(tmp_path / "folder")
    with pytest.raises(ValueError, match="cannot read split 'test' of .*folder: "):
        load_rows(tmp_path / "folder", split="test")


def test_the_example_data_is_what_its_description_says(tokenizer: PreTrainedTokenizerFast) -> None:
    dataset = load_rows(EXAMPLES / "kto_rows.jsonl")
    rows, report = prepare_rows(dataset, tokenizer, max_length=512)
    assert (report.rows, report.desirable, report.undesirable) == (247, 137, 110)
    assert report.dropped == report.cut == report.merged == 0
    assert report.weight_advice(1.0, 1.0) is None
    pairs = set(zip(dataset["prompt"], dataset["completion"], strict=True))
    assert len(pairs) == 247 and len(set(dataset["prompt"])) == 167
    lengths = [len(completion) for completion in dataset["completion"]]
    assert (min(lengths), max(lengths)) == (1, 250)
    text = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    for claim in ("247 rows: 137 desirable", "110 undesirable", "167 prompts", "1 to 250 char"):
        assert claim in text


def test_the_cache_serves_other_values_of_max_length(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(text_row, 30).to_parquet(tmp_path / "rows.parquet")

    def files_after(max_length: int) -> set[Path]:
        prepare_rows(load_rows(tmp_path / "rows.parquet"), tokenizer, max_length=max_length)
        return set((tmp_path / "cache").rglob("cache-*.arrow"))

    first = files_after(60)
    assert len(first) == 2  # one for the check, one for the tokens
    assert files_after(30) == first
    monkeypatch.setattr("fastkto.data.rows.source_digest", lambda: "code of another version")
    assert len(files_after(60)) == 4
