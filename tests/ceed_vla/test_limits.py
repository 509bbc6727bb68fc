"""Limits apply to the actual work, not to sizes that a file declares: lengths, values, unpacked
bytes, patterns.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from ceed_vla.data.parquet import FREE, RATIO, Budget, open_parquet, read_table
from ceed_vla.decoding.names import OWN, named_config
from ceed_vla.errors import (
    CheckpointError,
    ConfigError,
    DatasetError,
    MalformedChunkError,
    raised_as,
)
from ceed_vla.files import parse_json, read_bytes, read_json
from ceed_vla.limited import process, tokenizers
from ceed_vla.limited.process import run_limited
from ceed_vla.limited.tokenizers import check_tokenizer_text, check_tokenizers
from ceed_vla.tokens.fast_codec import FastCodec

# ---- names ---------------------------------------------------------------------------------------


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "name",
    [
        "risk" + "1" * 10**6,
        "risk" + "1" * 10**6 + "x",
        "plan" + "9" * 10**6 + "_",
        "_" * 10**6,
        "conf" * 10**5,
    ],
)
def test_a_long_name_is_refused_as_fast_as_a_short_one(name: str) -> None:
    OWN.fullmatch(name)  # in linear, not quadratic time
    for own in (None, {}, {"risk0.05": name}):
        with pytest.raises(ConfigError, match="Unknown decoder"):
            named_config(name if own is None else "risk0.05" if own else name, own=own)


@pytest.mark.parametrize(
    "name", ["risk1", "risk0.05", "risk.5", "plan", "plan12", "plan1.5", "plan.5", "learned"]
)
def test_names_of_a_checkpoint(name: str) -> None:
    assert OWN.fullmatch(name)


@pytest.mark.parametrize(
    "name", ["risk", "risk.", "risk1.", "plan.", "plan1.2.3", "learned1", "risk\uff11"]
)
def test_other_names(name: str) -> None:
    assert not OWN.fullmatch(name)


# ---- JSON ----------------------------------------------------------------------------------------


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" + "[]," * 20_000_000 + "[]]", "more than 17 MB"),
        ('{"a": [' + "[]," * 4_000_000 + "[]]}", "values; at most"),
        ('{"a": [' + "{}," * 4_000_000 + "{}]}", "values; at most"),
        ('{"a": ' + "[" * 900_000 + "]" * 900_000 + "}", "nested too deep"),
        ('{"a": ' + "9" * 5000 + "}", "digits"),
    ],
    ids=["60 MB", "lists", "mappings", "deep", "digits"],
)
def test_json_is_read_up_to_a_size(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        read_json(tmp_path / "config.json")


def test_json_of_a_line() -> None:
    assert parse_json('{"a": [1, {"b": null}]}') == {"a": [1, {"b": None}]}
    for text in ("[" * 10**5, "[" + "[]," * 10**6 + "0]", "", "{", "nonsense", '{"a": 1, "a": 2}'):
        with pytest.raises(ValueError, match=r"nested|values|duplicate|Expecting"):
            parse_json(text)


@pytest.mark.parametrize("kind", ["pipe", "device", "link", "folder", "large"])
def test_what_has_no_end_is_not_read(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "config.json"
    make: dict[str, Callable[[], Any]] = {
        "pipe": lambda: os.mkfifo(file),
        "device": lambda: file.symlink_to("/dev/zero"),
        "link": lambda: file.symlink_to(file),
        "folder": file.mkdir,
        "large": lambda: file.write_bytes(b"0" * 101),
    }
    make[kind]()
    with pytest.raises(DatasetError, match=r"must be a file|cannot be read|more than"):
        read_bytes(file, DatasetError, most=100)


def test_a_size_that_is_not_declared_counts() -> None:
    file = Path("/proc/self/maps")
    if not file.exists():
        pytest.skip("no /proc here")
    assert file.stat().st_size == 0
    with pytest.raises(DatasetError, match="more than"):
        read_bytes(file, DatasetError, most=100)


# ---- parquet -------------------------------------------------------------------------------------

ROWS = 20_000


def repeated(**options: Any) -> Callable[[Path], Any]:
    """A text of 8 kB in every row: 160 MB that compress to a few kB."""
    table = pa.table({"task": ["x" * 8192] * ROWS, "index": np.arange(ROWS)})
    return lambda file: pq.write_table(table, file, **options)


def constant(file: Path) -> None:
    """2,000 zeros per row: 160 MB."""
    zeros = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(ROWS * 2000, np.float32)), 2000)
    pq.write_table(pa.table({"task": zeros, "index": np.arange(ROWS)}), file)


BOMBS: dict[str, tuple[Callable[[Path], Any], tuple[int, ...]]] = {
    "a dictionary": (repeated(), ()),
    "compression": (repeated(use_dictionary=False, compression="zstd"), ()),
    "prefixes": (repeated(use_dictionary=False, column_encoding={"task": "DELTA_BYTE_ARRAY"}), ()),
    "numbers": (constant, (2000,)),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_small_file_unpacks_to_little(tmp_path: Path, kind: str) -> None:
    write, shape = BOMBS[kind]
    file = tmp_path / "file.parquet"
    write(file)
    most = FREE + RATIO * file.stat().st_size
    assert file.stat().st_size < 300_000
    before = pa.total_allocated_bytes()
    pool = pa.default_memory_pool()
    with pytest.raises(DatasetError, match="unpacks to more than"):
        read_table(file, {"task": shape, "index": ()}, Budget([file]))
    assert pa.total_allocated_bytes() - before < most
    assert (pool.max_memory() or 0) < 10**9
    rest = read_table(file, {"index": ()}, Budget([file]))  # the cost stays the same
    assert rest["index"].to_pylist()[-1] == ROWS - 1


def test_one_budget_for_all_files(tmp_path: Path) -> None:
    numbers = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(5000 * 2000, np.float32)), 2000)
    files = [tmp_path / f"{i}.parquet" for i in range(4)]
    for file in files:
        pq.write_table(pa.table({"task": numbers, "index": np.arange(5000)}), file)  # 40 MB
    budget = Budget(files)
    with pytest.raises(DatasetError, match="unpacks to more than"):
        _ = [read_table(file, {"task": (2000,)}, budget) for file in files]


def test_what_is_read_is_what_arrow_reads(tmp_path: Path) -> None:
    source = np.random.default_rng(0)
    count = 3000
    table = pa.table(
        {
            "action": pa.array(source.normal(size=(count, 7)).tolist(), pa.list_(pa.float32())),
            "state": pa.FixedSizeListArray.from_arrays(pa.array(source.normal(size=count * 2)), 2),
            "task": [f"task {i % 7}" for i in range(count)],
            "flag": source.random(count) < 0.5,
        }
    )
    shapes = {"action": (7,), "state": (2,), "task": (), "flag": ()}
    for compression in ("snappy", "zstd", "gzip", "none"):
        for version in ("1.0", "2.0"):
            file = tmp_path / f"{compression}{version}.parquet"
            pq.write_table(
                table,
                file,
                row_group_size=1100,
                compression=compression,
                data_page_version=version,
                data_page_size=2000,
            )
            read = read_table(file, shapes, Budget([file]))
            assert read.equals(pq.read_table(file))


def test_pages_hold_what_the_footer_says(tmp_path: Path) -> None:
    file = tmp_path / "file.parquet"
    pq.write_table(
        pa.table({"a": pa.array([[1.0] * 3] * 100, pa.list_(pa.float32()))}),
        file,
        compression="none",
    )
    data = bytearray(file.read_bytes())
    chunk = pq.ParquetFile(file).metadata.row_group(0).column(0)
    assert chunk.num_values == 300
    at = data.index(b"\x15\xd8\x04", chunk.data_page_offset)  # the count in the header is 300
    data[at + 1 : at + 3] = b"\xfe\x7f"  # 8191 values of one row
    file.write_bytes(bytes(data))
    open_parquet(file, {"a": (3,)})  # the footer is unchanged
    with pytest.raises(DatasetError, match="do not hold the values that it"):
        read_table(file, {"a": (3,)}, Budget([file]))


@pytest.mark.parametrize("change", ["more texts", "no such column", "too many values"])
def test_other_columns(tmp_path: Path, change: str) -> None:
    file = tmp_path / "file.parquet"
    kind = pa.list_(pa.string()) if change == "more texts" else pa.list_(pa.int64())
    pq.write_table(
        pa.table({"a": pa.array([["1"] * 3 if change == "more texts" else [1] * 3], kind)}), file
    )
    shapes = {
        "more texts": {"a": (3,)},
        "no such column": {"b": ()},
        "too many values": {"a": (2,)},
    }[change]
    with pytest.raises(DatasetError, match=r"several texts|no column b|other lengths"):
        read_table(file, shapes, Budget([file]))


# ---- tokenizers ----------------------------------------------------------------------------------


def bpe(**parts: Any) -> str:
    """tokenizer.json of a byte-level BPE, with some parts replaced."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["put the red cube in the bin"] * 3, trainer)
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    return str(tokenizer.to_str())


def doubled(text: str, times: int) -> Any:
    return normalizers.Sequence([normalizers.Replace(text, 2 * text)] * times)


def padded(length: int) -> str:
    values = json.loads(bpe())
    values["padding"] = {
        "strategy": {"Fixed": length},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "!",
    }
    return json.dumps(values)


def split(pattern: str) -> Any:
    return pre_tokenizers.Split(Regex(pattern), "isolated")


BAD_TOKENIZERS = {
    "back reference": lambda: bpe(pre_tokenizer=split(r"(a+)+\1+$")),
    "nested": lambda: bpe(pre_tokenizer=split(r"(Q+)+$")),
    "nested words": lambda: bpe(normalizer=normalizers.Replace(Regex(r"((\w)+)*\1\1x"), "y")),
    "10 doublings": lambda: bpe(normalizer=doubled("\u03a8", 10)),
    "a million of padding": lambda: padded(10**6),
    "long template": lambda: bpe(
        post_processor=processors.TemplateProcessing(
            single=" ".join(["a"] * 100_000) + " $A", special_tokens=[("a", 64)]
        )
    ),
    "decoder": lambda: bpe(decoder=decoders.Sequence([decoders.Replace("t", "tt")] * 28)),
    "no model": lambda: "{}",
    "no JSON": lambda: "nonsense",
    "half": lambda: bpe()[:1000],
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", BAD_TOKENIZERS)
def test_a_tokenizer_that_costs_too_much_is_refused(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "CPU_S", 1)
    monkeypatch.setattr(process, "MEMORY", 2**29)
    (tmp_path / "tokenizer.json").write_text(BAD_TOKENIZERS[kind]())
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read \("):
        check_tokenizers(tmp_path)
    with pytest.raises(ConfigError, match=r"BPE cannot be read \("):
        FastCodec.from_json((tmp_path / "tokenizer.json").read_text(), 10.0, -5)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("times", [20, 34, 200])
def test_doublings_end(times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "CPU_S", 1)
    with pytest.raises(
        ConfigError, match=r"cannot be read \(it took more than|cannot be read \(ValueError"
    ):
        check_tokenizer_text(bpe(normalizer=doubled("a", times)), "The BPE", ConfigError)


def test_a_tokenizer_is_tried_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[Any] = []
    monkeypatch.setattr(
        tokenizers, "run_limited", lambda *given: runs.append(given) or run_limited(*given)
    )
    monkeypatch.setattr(tokenizers, "_checked", set())
    (tmp_path / "tokenizer.json").write_text(bpe())
    for _ in range(3):
        check_tokenizers(tmp_path, ["the prompt"])
    assert len(runs) == 1
    check_tokenizers(tmp_path, ["another prompt"])
    (tmp_path / "tokenizer.json").write_text(bpe(decoder=decoders.Fuse()))
    check_tokenizers(tmp_path, ["the prompt"])
    assert len(runs) == 3


def test_a_prompt_that_a_pattern_waits_for(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(bpe(pre_tokenizer=split(r"(\p{Greek}+)+$")))
    check_tokenizers(tmp_path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        check_tokenizers(tmp_path, ["\u03a8" * 2000 + "!"])


@pytest.mark.parametrize("content", ["[" * 10**5, "[" + "[]," * 10**6 + "[]]", "{"])
def test_files_beside_a_tokenizer(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(bpe())
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json is not JSON"):
        check_tokenizers(tmp_path)


def test_sentencepiece_files(tmp_path: Path) -> None:
    pytest.importorskip("sentencepiece")
    for content in (b"", b"\x0a" + struct.pack("<I", 2**31), os.urandom(1000)):
        (tmp_path / "tokenizer.model").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"tokenizer\.model cannot be read"):
            check_tokenizers(tmp_path)


def test_ids_of_long_texts_are_no_chunk() -> None:
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "a" * 50_000: 1}, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    codec = FastCodec(tokenizer, 10.0, 0)
    with pytest.raises(MalformedChunkError, match="decode to more than 448 bytes"):
        codec.decode([1] * 100_000, 4, 7)  # 5 GB of text
    assert codec.decode([0] * 28, 4, 7).shape == (4, 7)


def test_a_panic_in_rust_is_an_error_of_ours() -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = split(r"(a+)+\1$")
    with (
        pytest.raises(CheckpointError, match="PanicException: Onig"),
        raised_as(CheckpointError, "It fails", "copy it."),
    ):
        tokenizer.encode("a" * 2000 + "!")
    for error in (KeyboardInterrupt, SystemExit, GeneratorExit):
        with pytest.raises(error), raised_as(CheckpointError, "It fails", "copy it."):
            raise error
