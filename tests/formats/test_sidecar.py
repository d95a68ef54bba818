from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from kvq_formats import atomic
from kvq_formats.codebook import Codebook
from kvq_formats.config import KVQConfig
from kvq_formats.errors import OutputError, SidecarError
from kvq_formats.fingerprint import Fingerprint
from kvq_formats.parameters import (
    KeyParameters,
    LayerParameters,
    LayerStatistics,
    ValueParameters,
)
from kvq_formats.records import EMBEDDED_MODEL_ID, BaseModelRecord, CalibrationRecord
from kvq_formats.sidecar import Sidecar, check_output_directory
from kvq_formats.sidecar_header import document_sha256
from kvq_formats.sidecar_tensors import layer_tensors, tensors_sha256

H, D = 2, 16
FILES = {"kvq.safetensors", "kvq_config.json", "README.md"}


def make_codebook(generator: torch.Generator, bits: int) -> Codebook:
    entries = torch.rand(1 << bits, generator=generator).sort().values * 2 - 1
    return Codebook.fit_grid(entries, qnorm_scale=1.25, qnorm_shift=0.01)


def make_sidecar(*, key_bits: int = 3, value_bits: int = 2, model_id: str = "org/tiny") -> Sidecar:
    generator = torch.Generator().manual_seed(0)
    # Eleven layers, so that "layers.10" and "layers.2" sort differently as words and as numbers.
    layers, statistics = {}, {}
    for layer_idx in range(11):
        layers[layer_idx] = LayerParameters(
            key=KeyParameters(
                center=torch.randn(H, D, generator=generator),
                half_range=torch.rand(H, D, generator=generator) + 0.5,
                codebook=make_codebook(generator, key_bits),
                outlier_step=2.0**-6,
            ),
            value=ValueParameters(make_codebook(generator, value_bits), outlier_step=2.0**-7),
        )
        statistics[layer_idx] = LayerStatistics(0.1 + layer_idx, 0.2, 0.01, 0.0123456789)
    fingerprint = Fingerprint.from_config(
        {
            "model_type": "llama",
            "num_hidden_layers": 11,
            "num_attention_heads": 4,
            "num_key_value_heads": H,
            "head_dim": D,
            "hidden_size": 64,
            "vocab_size": 320,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        }
    )
    return Sidecar(
        config=KVQConfig.create(key_bits=key_bits, value_bits=value_bits),
        base_model=BaseModelRecord(id=model_id, revision="a" * 40, fingerprint=fingerprint),
        calibration=CalibrationRecord(
            dataset="builtin",
            revision=None,
            num_samples=16,
            seq_len=1024,
            seed=0,
            token_sha256="0" * 64,
        ),
        layers=layers,
        statistics=statistics,
    )


def make_mixed() -> Sidecar:
    """Ten layers of 3 and 2 bits, and layer 4 of 2 and 4."""
    sidecar, other = make_sidecar(), make_sidecar(key_bits=2, value_bits=4)
    widths = {i: (2, 4) if i == 4 else (3, 2) for i in sidecar.layers}
    return replace(
        sidecar,
        config=sidecar.config.with_layer_bits(widths),
        layers={**sidecar.layers, 4: other.layers[4]},
    )


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def rewrite(
    directory: Path,
    change: Callable[[dict[str, torch.Tensor], dict[str, str], dict[str, Any]], None],
    *,
    rehash: bool = True,
) -> None:
    """Alter a sidecar as an outsider would, with its hashes put right unless asked otherwise."""
    file = directory / "kvq.safetensors"
    tensors = load_file(file)
    with safe_open(file, framework="pt") as reader:
        metadata = dict(reader.metadata())
    document = json.loads(metadata["kvq_config"])
    change(tensors, metadata, document)
    if rehash:
        document["tensors_sha256"] = tensors_sha256(
            {k: v for k, v in tensors.items() if v.dtype in (torch.float32, torch.uint8)}
        )
        document["document_sha256"] = document_sha256(document)
    metadata["kvq_config"] = json.dumps(document)
    save_file(tensors, file, metadata)
    (directory / "kvq_config.json").unlink(missing_ok=True)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return make_sidecar().save(tmp_path / "sidecar")


# Round trip


def test_round_trip_is_exact(tmp_path: Path) -> None:
    sidecar = make_sidecar()
    loaded = Sidecar.load(sidecar.save(tmp_path / "s"))
    assert loaded.config == sidecar.config
    assert loaded.base_model == sidecar.base_model
    assert loaded.calibration == sidecar.calibration
    assert loaded.statistics == sidecar.statistics
    assert list(loaded.layers) == list(range(11))
    before, after = layer_tensors(sidecar.layers), layer_tensors(loaded.layers)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert loaded.layers[3].key.codebook.offset == sidecar.layers[3].key.codebook.offset
    assert loaded.layers[3].value.codebook.bits == 2


def test_loads_the_file_as_well_as_the_folder(saved: Path) -> None:
    assert Sidecar.load(saved / "kvq.safetensors").config == Sidecar.load(str(saved)).config
    (saved / "kvq_config.json").unlink()
    (saved / "README.md").unlink()
    assert Sidecar.load(saved).layers.keys() == set(range(11))
    moved = (saved / "kvq.safetensors").rename(saved.parent / "renamed.safetensors")
    assert Sidecar.load(moved).layers.keys() == set(range(11))


def test_tensors_are_those_of_format_1(saved: Path) -> None:
    tensors = load_file(saved / "kvq.safetensors")
    scalars = {"codebook_offset", "codebook_step", "outlier_step", "qnorm_scale", "qnorm_shift"}
    expected = {
        "key": {"center", "half_range", "codebook", "codebook_levels"} | scalars,
        "value": {"codebook", "codebook_levels"} | scalars,
    }
    assert set(tensors) == {
        f"layers.{layer_idx}.{kind}.{name}"
        for layer_idx in range(11)
        for kind, names in expected.items()
        for name in names
    }
    assert tensors["layers.0.key.center"].shape == (H, D)
    assert tensors["layers.0.key.codebook"].shape == (8,)
    assert tensors["layers.0.value.codebook_levels"].dtype == torch.uint8
    assert tensors["layers.0.value.qnorm_scale"].shape == (1,)


def test_metadata_and_json_agree(saved: Path) -> None:
    with safe_open(saved / "kvq.safetensors", framework="pt") as reader:
        metadata = reader.metadata()
    assert metadata.keys() == {"format", "kvq_format", "kvq_config"}
    assert (metadata["format"], metadata["kvq_format"]) == ("pt", "1")
    document = json.loads((saved / "kvq_config.json").read_text())
    assert json.loads(metadata["kvq_config"]) == document
    assert set(document) == {
        "format_version",
        "kvq_version",
        "config",
        "base_model",
        "calibration",
        "statistics",
        "effective_bits",
        "tensors_sha256",
        "rotary_channels",
        "document_sha256",
    }
    assert document["effective_bits"]["tokens"] == 32768
    assert document["statistics"]["10"]["key_error"] == 10.1


def test_the_stated_hashes_can_be_computed_from_the_file_alone(saved: Path) -> None:
    """As docs/sidecar-format.md describes it, without our code or safetensors."""
    content = (saved / "kvq.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    document = json.loads(header.pop("__metadata__")["kvq_config"])
    digest = hashlib.sha256()
    for name, entry in sorted(header.items()):
        shape = ",".join(map(str, entry["shape"]))
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        digest.update(f"{name} {entry['dtype']} [{shape}]\n".encode() + content[begin:end])
    assert digest.hexdigest() == document["tensors_sha256"]
    stated = document.pop("document_sha256")
    assert hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest() == stated


def test_peek_reads_all_but_the_tensors(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("safetensors.torch.load_file", None)
    header = Sidecar.peek(saved)
    assert header.base_model == make_sidecar().base_model
    assert header.statistics[10].key_error == 10.1
    assert header.effective_bits["tokens"] == 32768


# Layers of different widths


def test_widths_of_layers_round_trip(tmp_path: Path) -> None:
    sidecar = make_mixed()
    directory = sidecar.save(tmp_path / "s")
    loaded = Sidecar.load(directory)
    assert loaded.config == sidecar.config
    assert (loaded.layers[4].key.codebook.bits, loaded.layers[4].value.codebook.bits) == (2, 4)
    assert (loaded.layers[5].key.codebook.bits, loaded.layers[5].value.codebook.bits) == (3, 2)
    assert contents(loaded.save(tmp_path / "again")) == contents(directory)
    document = json.loads((directory / "kvq_config.json").read_text())
    assert document["config"]["layer_bits"]["4"] == [2, 4]
    # Tokens and channels of keys: ten layers of 3 and one of 2 bits; of values 2 and 4.
    codes = (10 * (3 + 2) + (2 + 4)) / 11 / 2
    paged = 127 * 256
    assert document["effective_bits"]["codes"] == pytest.approx(codes * paged / 32768, abs=1e-6)
    card = (directory / "README.md").read_text()
    # Keys 32/11 bits, values 24/11, both 56/22.
    assert "key/value cache at 2-4 bits (2.545 on average)" in card
    assert "| keys | 2-3 bits (2.909 on average), per channel" in card
    assert "| values | 2-4 bits (2.182 on average), scaled" in card


def test_layers_that_are_alike_are_not_named(saved: Path) -> None:
    document = json.loads((saved / "kvq_config.json").read_text())
    assert "layer_bits" not in document["config"]
    card = (saved / "README.md").read_text()
    assert "key/value cache at 2-3 bits\n" in card
    assert "| keys | 3 bits, per channel" in card


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda bits: bits.pop("10"), r"layer_bits are of layers \[0.*9\], its tensors"),
        (lambda bits: bits.update({"11": [3, 2]}), r"layer_bits are of layers .*11\], its tensors"),
        (lambda bits: bits.update({"3": [2, 2]}), r"layers\.3\.key\.codebook is .*\[8\]"),
        (lambda bits: bits.update({"3": [3, 5]}), r"config\.layer_bits\.3\.1"),
        (lambda bits: bits.update({"4": [3, 3]}), "value_bits is 4, but the largest"),
    ],
)
def test_widths_of_layers_that_no_calibration_wrote(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    directory = make_mixed().save(tmp_path / "s")
    rewrite(directory, lambda t, m, document: change(document["config"]["layer_bits"]))
    with pytest.raises(SidecarError, match=message):
        Sidecar.load(directory)


# Bytes


def test_bytes_are_the_same_in_another_process(tmp_path: Path) -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import test_sidecar as t;"
        "t.make_sidecar().save(sys.argv[2])"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(Path(__file__).parent), str(tmp_path / "there")],
        env={**os.environ, "PYTHONHASHSEED": "1"},
        check=True,
    )
    here = contents(make_sidecar().save(tmp_path / "here"))
    assert here.keys() == FILES
    assert here == contents(tmp_path / "there")


def test_saving_what_was_loaded_changes_nothing(saved: Path, tmp_path: Path) -> None:
    assert contents(Sidecar.load(saved).save(tmp_path / "again")) == contents(saved)


def test_tensors_of_any_layout_give_the_same_bytes(saved: Path, tmp_path: Path) -> None:
    sidecar = make_sidecar()
    key = sidecar.layers[0].key
    strided = replace(key, center=key.center.double().T.contiguous().T.requires_grad_())
    sidecar.layers[0] = replace(sidecar.layers[0], key=strided)
    assert contents(sidecar.save(tmp_path / "again")) == contents(saved)


def test_modes_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        directory = make_sidecar().save(tmp_path / "s")
    finally:
        os.umask(before)
    assert stat.S_IMODE(directory.stat().st_mode) == 0o750
    assert {stat.S_IMODE(path.stat().st_mode) for path in directory.iterdir()} == {0o640}


# The model card


def test_card_names_the_base_model_for_the_hub(saved: Path) -> None:
    card = (saved / "README.md").read_text()
    front = card.split("---\n")[1].splitlines()
    assert "library_name: kvq" in front
    assert "base_model: org/tiny" in front
    assert "base_model_relation: quantized" in front
    assert "kvq eval org/tiny --sidecar ." in card
    assert 'kvq.attach(model, "."' in card
    document = json.loads((saved / "kvq_config.json").read_text())
    assert f"{document['effective_bits']['without_unfinished']:.3f}" in card


def test_card_of_a_local_model_gives_its_name_and_no_path(tmp_path: Path) -> None:
    sidecar = make_sidecar(model_id="/home/someone/models/tiny-llama")
    card = (sidecar.save(tmp_path / "s") / "README.md").read_text()
    assert "tiny-llama" in card
    assert "someone" not in card
    assert "base_model" not in card.split("---\n")[1]


def test_card_of_the_embedded_model_names_no_model_of_the_hub(tmp_path: Path) -> None:
    sidecar = make_sidecar(model_id=EMBEDDED_MODEL_ID)
    card = (sidecar.save(tmp_path / "s") / "README.md").read_text()
    assert "base_model" not in card.split("---\n")[1]
    assert f"kvq eval {EMBEDDED_MODEL_ID} --sidecar ." in card
    assert card.count("from_pretrained(kvq.embedded_model_path())") == 2


# Where it may be written


def test_creates_missing_parents(tmp_path: Path) -> None:
    directory = make_sidecar().save(tmp_path / "a" / "b" / "c")
    assert directory == tmp_path / "a" / "b" / "c"
    assert set(os.listdir(directory)) == FILES


def test_fills_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    assert set(os.listdir(make_sidecar().save(tmp_path / "s"))) == FILES


def test_relative_paths_and_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert make_sidecar().save("s") == tmp_path / "s"
    monkeypatch.chdir(tmp_path / "s")
    make_sidecar(key_bits=4).save(".", overwrite=True)
    assert Sidecar.load(".").config.key_bits == 4


def test_refuses_to_replace_a_sidecar_unasked(saved: Path) -> None:
    before = contents(saved)
    with pytest.raises(OutputError, match="already holds a sidecar") as caught:
        make_sidecar(key_bits=4).save(saved)
    assert "--overwrite" in (caught.value.hint or "")
    assert contents(saved) == before


def test_overwrite_replaces_the_sidecar_and_nothing_else(saved: Path) -> None:
    (saved / "report.html").write_text("mine")
    (saved / "notes").mkdir()
    make_sidecar(key_bits=4).save(saved, overwrite=True)
    assert Sidecar.load(saved).config.key_bits == 4
    assert (saved / "report.html").read_text() == "mine"
    assert set(os.listdir(saved)) == FILES | {"report.html", "notes"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_never_writes_into_a_folder_of_other_files(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(OutputError, match=r"thesis\.tex") as caught:
        make_sidecar().save(tmp_path, overwrite=overwrite)
    assert "-o" in (caught.value.hint or "")
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_refuses_a_path_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match="is a file"):
        make_sidecar().save(tmp_path / "file")
    with pytest.raises(OutputError, match="is a file"):
        make_sidecar().save(tmp_path / "file" / "below")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_stage_of_a_killed_run_is_in_nobodys_way(tmp_path: Path) -> None:
    (tmp_path / "s" / ".kvq-0123").mkdir(parents=True)
    assert set(os.listdir(make_sidecar().save(tmp_path / "s"))) >= FILES


def test_the_check_before_the_work_creates_nothing(tmp_path: Path, saved: Path) -> None:
    assert check_output_directory(tmp_path / "new" / "s") == tmp_path / "new" / "s"
    assert not (tmp_path / "new").exists()
    assert check_output_directory(saved, overwrite=True) == saved
    with pytest.raises(OutputError):
        check_output_directory(saved)


def test_the_check_finds_a_folder_without_permission(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(OutputError, match="permission denied"):
        check_output_directory(tmp_path / "s")


# What is left when it fails

FAILURES = [
    (OSError(errno.ENOSPC, "No space left on device"), OutputError, "disk is full"),
    (OSError(errno.EDQUOT, "Disk quota exceeded"), OutputError, "quota"),
    (PermissionError(errno.EACCES, "Permission denied"), OutputError, "permission denied"),
    (OSError(errno.EROFS, "Read-only file system"), OutputError, "read-only"),
    (OSError(errno.EIO, "Input/output error"), OutputError, "Input/output error"),
    (KeyboardInterrupt(), KeyboardInterrupt, None),
]


def fail_at(
    monkeypatch: pytest.MonkeyPatch, function: str, call: int, error: BaseException
) -> None:
    """Let one of the calls that saving makes fail, the ``call``-th one."""
    original = getattr(os, function) if function != "open" else open
    count = 0

    def failing(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == call:
            raise error
        return original(*args, **kwargs)

    if function == "open":
        monkeypatch.setattr(atomic, "open", failing, raising=False)
    else:
        monkeypatch.setattr(os, function, failing)


@pytest.mark.parametrize(("error", "raised", "message"), FAILURES)
@pytest.mark.parametrize(
    ("function", "call"),
    [
        ("mkdir", 1),
        ("mkdir", 2),
        ("open", 1),
        ("open", 3),
        ("fsync", 2),
        ("fsync", 4),
        ("rename", 1),
    ],
)
def test_a_failed_first_save_leaves_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    function: str,
    call: int,
    error: BaseException,
    raised: type[BaseException],
    message: str | None,
) -> None:
    fail_at(monkeypatch, function, call, error)
    with pytest.raises(raised, match=message):
        make_sidecar().save(tmp_path / "a" / "s")
    monkeypatch.undo()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("error", "raised", "message"), FAILURES)
@pytest.mark.parametrize(
    ("function", "call", "replaced"),
    [
        ("mkdir", 1, False),
        ("mkdir", 2, False),
        ("open", 2, False),
        ("fsync", 3, False),
        # Renames: two old files away, the tensors in, two new files in.
        ("replace", 1, False),
        ("replace", 2, False),
        ("replace", 3, False),
        ("replace", 4, True),
        ("replace", 5, True),
    ],
)
def test_a_failed_overwrite_leaves_one_whole_sidecar(
    saved: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    function: str,
    call: int,
    replaced: bool,
    error: BaseException,
    raised: type[BaseException],
    message: str | None,
) -> None:
    new = make_sidecar(key_bits=4)
    expected = contents(new.save(tmp_path / "new")) if replaced else contents(saved)
    fail_at(monkeypatch, function, call, error)
    with pytest.raises(raised, match=message):
        new.save(saved, overwrite=True)
    monkeypatch.undo()
    assert contents(saved) == expected
    assert Sidecar.load(saved).config.key_bits == (4 if replaced else 3)


def test_a_killed_overwrite_leaves_a_sidecar_that_loads(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the moment: readers never see new tensors beside the old JSON."""
    seen = []
    original = os.replace

    def watching(source: Path, target: Path) -> None:
        original(source, target)
        seen.append(Sidecar.load(saved).config.key_bits if _has_tensors(saved) else None)

    monkeypatch.setattr(os, "replace", watching)
    make_sidecar(key_bits=4).save(saved, overwrite=True)
    assert seen == [3, 3, 4, 4, 4]


def _has_tensors(directory: Path) -> bool:
    return (directory / "kvq.safetensors").exists()


def test_hints_of_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_at(monkeypatch, "fsync", 1, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(OutputError, match=r"needs 0\.0 MB") as caught:
        make_sidecar().save(tmp_path / "s")
    assert "another disk" in (caught.value.hint or "")


# What is refused at load


def test_missing_sidecar(tmp_path: Path) -> None:
    with pytest.raises(SidecarError, match="no sidecar at") as caught:
        Sidecar.load(tmp_path / "nowhere")
    assert "kvq calibrate" in (caught.value.hint or "")


def test_a_folder_without_a_sidecar(tmp_path: Path, tiny_model_dir: Path) -> None:
    with pytest.raises(SidecarError, match=r"no kvq\.safetensors"):
        Sidecar.load(tmp_path)
    with pytest.raises(SidecarError, match="holds a model"):
        Sidecar.load(tiny_model_dir)


def test_other_safetensors_files(tmp_path: Path, tiny_model_dir: Path) -> None:
    with pytest.raises(SidecarError, match="no kvq sidecar"):
        Sidecar.load(tiny_model_dir / "model.safetensors")
    (tmp_path / "text.safetensors").write_text("nothing of the kind\n" * 10)
    with pytest.raises(SidecarError, match="not a safetensors file"):
        Sidecar.load(tmp_path / "text.safetensors")
    with pytest.raises(SidecarError, match="not a safetensors file"):
        Sidecar.load(tiny_model_dir / "config.json")


@pytest.mark.parametrize("keep", [0, 4, 8, 100, 4000, -4000, -1])
def test_truncated_anywhere(saved: Path, keep: int) -> None:
    file = saved / "kvq.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    for read in (Sidecar.load, Sidecar.peek):
        with pytest.raises(SidecarError, match=r"damaged|not a safetensors file"):
            read(saved)


def test_grown(saved: Path) -> None:
    with open(saved / "kvq.safetensors", "ab") as file:
        file.write(b"\0" * 8)
    with pytest.raises(SidecarError, match=r"bytes, expected \d+"):
        Sidecar.load(saved)


@pytest.mark.parametrize("place", [-1, -500, -4000])
def test_a_flipped_bit(saved: Path, place: int) -> None:
    file = saved / "kvq.safetensors"
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)
    with pytest.raises(SidecarError, match="damaged or was altered") as caught:
        Sidecar.load(saved)
    assert "calibrate again" in (caught.value.hint or "")


def test_swapped_tensors_are_found_by_the_hash(saved: Path) -> None:
    def swap(tensors: dict[str, torch.Tensor], *_: Any) -> None:
        a, b = "layers.0.key.center", "layers.1.key.center"
        tensors[a], tensors[b] = tensors[b], tensors[a]

    rewrite(saved, swap, rehash=False)
    with pytest.raises(SidecarError, match="hash of its tensors"):
        Sidecar.load(saved)


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize(
    ("before", "after"),
    [
        (r"\"outlier_fraction\": 0.01", r"\"outlier_fraction\": 0.02"),
        (r"\"sink_tokens\": 1", r"\"sink_tokens\": 2"),
        (r"\"key_outlier_share\": 0.01", r"\"key_outlier_share\": 0.09"),
        (r"\"org/tiny\"", r"\"org/tinY\""),
        (r"\"tensors_sha256\"", r"\"tensors_sha265\""),
    ],
)
def test_a_number_edited_in_place_is_found_by_the_hash(
    saved: Path, before: str, after: str, alone: bool
) -> None:
    file = saved / "kvq.safetensors"
    if alone:
        (saved / "kvq_config.json").unlink()
    content = file.read_bytes()
    assert before.encode() in content
    file.write_bytes(content.replace(before.encode(), after.encode(), 1))
    for read in (Sidecar.load, Sidecar.peek):
        with pytest.raises(
            SidecarError, match=r"kvq\.safetensors is damaged or was altered: .*hash"
        ):
            read(saved)


def test_a_document_without_its_hash(saved: Path) -> None:
    rewrite(
        saved, lambda tensors, metadata, document: document.pop("document_sha256"), rehash=False
    )
    with pytest.raises(SidecarError, match="document_sha256 is missing"):
        Sidecar.peek(saved)


def set_tensor(name: str, value: torch.Tensor | None) -> Callable[..., None]:
    def change(tensors: dict[str, torch.Tensor], *_: Any) -> None:
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value

    return change


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("layers.3.key.center", None, r"layers\.3\.key\.center is missing"),
        ("layers.3.key.extra", torch.zeros(1), r"layers\.3\.key\.extra that no sidecar has"),
        ("lm_head.weight", torch.zeros(1), r"lm_head\.weight that no sidecar has"),
        ("layers.0.key.center", torch.zeros(D, H), r"\[16, 2\], expected torch.float32 \[2, 16\]"),
        ("layers.0.key.center", torch.zeros(H, D).half(), r"float16 .* expected torch.float32"),
        ("layers.0.key.center", torch.full((H, D), torch.nan), "center .* not finite"),
        ("layers.0.key.half_range", torch.zeros(H, D), "half_range .* not positive"),
        ("layers.0.key.half_range", -torch.ones(H, D), "half_range .* not positive"),
        ("layers.0.key.codebook", torch.linspace(-1, 1, 4), r"\[4\], expected torch.float32 \[8\]"),
        ("layers.0.value.codebook", torch.zeros(4), "codebook does not increase"),
        ("layers.0.value.codebook", torch.linspace(1, -1, 4), "codebook does not increase"),
        (
            "layers.0.value.codebook_levels",
            torch.tensor([0, 200, 100, 255], dtype=torch.uint8),
            "codebook_levels decreases",
        ),
        ("layers.0.value.codebook_step", torch.zeros(1), "codebook_step is 0"),
        ("layers.0.key.outlier_step", torch.tensor([-0.5]), "outlier_step is -0.5"),
        ("layers.0.key.qnorm_scale", torch.tensor([torch.inf]), "qnorm_scale .* not finite"),
    ],
)
def test_tensors_that_no_calibration_wrote(
    saved: Path, name: str, value: torch.Tensor | None, message: str
) -> None:
    rewrite(saved, set_tensor(name, value))
    with pytest.raises(SidecarError, match=message):
        Sidecar.load(saved)


def test_a_layer_beyond_the_model(saved: Path) -> None:
    def rename(tensors: dict[str, torch.Tensor], *_: Any) -> None:
        for name in list(tensors):
            if name.startswith("layers.10."):
                tensors[name.replace("layers.10.", "layers.11.")] = tensors.pop(name)

    rewrite(saved, rename)
    with pytest.raises(SidecarError, match="a layer 11, but the model has 11"):
        Sidecar.load(saved)


def test_statistics_of_other_layers(saved: Path) -> None:
    rewrite(saved, lambda tensors, metadata, document: document["statistics"].pop("4"))
    with pytest.raises(SidecarError, match="statistics"):
        Sidecar.load(saved)


def test_channels_that_are_rotated(tmp_path: Path) -> None:
    """Kept by layer; files from before they were written have none."""
    layers = {0: (0, 0), 4: (2, 10)}
    sidecar = replace(make_sidecar(), rotary_channels=layers)
    assert Sidecar.load(sidecar.save(tmp_path / "kept")).rotary_channels == layers
    older = make_sidecar().save(tmp_path / "older")
    rewrite(older, lambda tensors, metadata, document: document.pop("rotary_channels"))
    assert Sidecar.load(older).rotary_channels == {}


@pytest.mark.parametrize(
    "channels", [{"12": [0, 4]}, {"0": [4, 2]}, {"0": [0, 17]}, {"0": [-1, 4]}]
)
def test_channels_that_no_layer_has(saved: Path, channels: dict[str, list[int]]) -> None:
    rewrite(saved, lambda tensors, metadata, document: document.update(rotary_channels=channels))
    with pytest.raises(SidecarError, match="rotates channels"):
        Sidecar.load(saved)


def test_no_layers_at_all(saved: Path) -> None:
    rewrite(saved, lambda tensors, metadata, document: tensors.clear())
    with pytest.raises(SidecarError, match="holds no layer"):
        Sidecar.load(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda document: document["config"].update(key_bits=9), r"config\.key_bits"),
        (lambda document: document["config"].update(colour=1), r"config\.colour"),
        (lambda document: document.pop("calibration"), "calibration"),
        (lambda document: document["base_model"].pop("fingerprint"), r"base_model\.fingerprint"),
        (lambda document: document.update(format_version=0), "format 1 and 0"),
    ],
)
def test_json_that_no_calibration_wrote(
    saved: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    rewrite(saved, lambda tensors, metadata, document: change(document))
    with pytest.raises(SidecarError, match=message):
        Sidecar.load(saved)


@pytest.mark.parametrize("text", ["broken", "[]", '{"a": NaN}', ""])
def test_broken_json_in_the_metadata(saved: Path, text: str) -> None:
    file = saved / "kvq.safetensors"
    save_file(load_file(file), file, {"format": "pt", "kvq_format": "1", "kvq_config": text})
    with pytest.raises(SidecarError, match="metadata cannot be read"):
        Sidecar.load(saved)


def test_a_newer_format_says_which_kvq_reads_it(saved: Path) -> None:
    def renew(tensors: Any, metadata: dict[str, str], document: dict[str, Any]) -> None:
        metadata["kvq_format"] = "2"
        document.update(format_version=2, kvq_version="3.1.0", config={"new": "options"})

    rewrite(saved, renew)
    with pytest.raises(SidecarError, match=r"format 2, written by kvq 3\.1\.0.* up to 1") as caught:
        Sidecar.load(saved)
    assert caught.value.hint == 'pip install --upgrade "kvq>=3.1.0"'


def test_unknown_optional_keys_give_one_warning(
    saved: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rewrite(saved, lambda tensors, metadata, document: document.update(author="me", mood="good"))
    with caplog.at_level(logging.WARNING):
        Sidecar.load(saved)
    (record,) = caplog.records
    assert "['author', 'mood']" in record.getMessage()


def test_json_beside_that_says_otherwise(saved: Path) -> None:
    file = saved / "kvq_config.json"
    document = json.loads(file.read_text())
    document["config"]["outlier_fraction"] = 0.05
    file.write_text(json.dumps(document))
    for read in (Sidecar.load, Sidecar.peek):
        with pytest.raises(SidecarError, match=r"outlier_fraction is 0\.05, but 0\.01") as caught:
            read(saved)
        assert "delete" in (caught.value.hint or "")
    file.write_text("{")
    with pytest.raises(SidecarError, match="not valid JSON"):
        Sidecar.load(saved)


def test_json_beside_may_be_laid_out_anew(saved: Path) -> None:
    file = saved / "kvq_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()), sort_keys=False))
    assert Sidecar.load(saved).config == make_sidecar().config


def test_a_file_that_may_not_be_read(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("kvq_formats.sidecar_header.open", refuse, raising=False)
    with pytest.raises(SidecarError, match="cannot be read: Permission denied"):
        Sidecar.load(saved)


def test_copies_are_as_good(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "copy")
    assert contents(tmp_path / "copy") == contents(saved)
    assert Sidecar.load(tmp_path / "copy").statistics == make_sidecar().statistics
