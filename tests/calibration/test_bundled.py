"""The text inside the package: whole, kept apart by purpose, and made the same way twice."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest

from kvq_calibration import bundled
from kvq_calibration.bundled import BUILTIN, STAND_INS, builtin_source, bundled_text
from kvq_formats.errors import DataError

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "bundle_text.py"


@pytest.fixture
def copy_of_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The bundled text in a folder where it may be damaged."""
    original = Path(str(resources.files("kvq_calibration"))) / "text"
    shutil.copytree(original, tmp_path / "text")
    monkeypatch.setattr(bundled.resources, "files", lambda _package: tmp_path)
    return tmp_path / "text"


def test_wikitext2_is_the_whole_test_split_as_the_field_joins_it() -> None:
    text = bundled_text("test", "wikitext2")
    # wiki.test.raw has 1,290,590 bytes in 4,358 lines, of which 1,467 are blank (" \n"). Blank
    # lines become empty and all lines are joined by two line ends.
    assert len(text.encode()) == 1_290_590 - 2 * 1_467 + 2 * (4_358 - 1)
    assert text.count("\n") == (4_358 - 1_467) + 2 * (4_358 - 1)
    assert "\r" not in text
    assert text.startswith("\n\n = Robert Boulter = \n\n\n\n\n Robert Boulter is")


def test_no_text_serves_two_purposes() -> None:
    folders: dict[str, set[str]] = {}
    for purpose, names in BUILTIN.items():
        folders[purpose] = {folder for files in names.values() for folder, _name in files}
        folders[purpose] |= {folder for folder, _name in STAND_INS[purpose].values()}
    assert folders == {"calibrate": {"calibration"}, "eval": {"test", "dev"}}
    digests = [
        hashlib.sha256(paragraph.encode()).digest()
        for folder, names in (("calibration", ("wikipedia", "c4")), ("test", ("wikitext2", "c4")))
        for paragraph in {
            line
            for name in names
            for line in bundled_text(folder, name).splitlines()
            if len(line) > 200
        }
    ]
    assert len(digests) == len(set(digests))


def test_every_builtin_name_opens() -> None:
    for purpose, names in BUILTIN.items():
        for name in names:
            source = builtin_source(name, purpose=purpose)
            assert source.name == name
            joined = source.separator.join(source.texts)
            assert source.revision == f"sha256:{hashlib.sha256(joined.encode()).hexdigest()}"
            assert not source.streamed


def test_name_of_the_other_purpose_is_refused() -> None:
    with pytest.raises(DataError, match="kept for evaluation"):
        builtin_source("builtin:dev", purpose="calibrate")
    with pytest.raises(DataError, match=r"no text 'builtin:x'.*builtin:c4, builtin:dev"):
        builtin_source("builtin:x", purpose="eval")


def test_damaged_text_is_refused(copy_of_text: Path) -> None:
    path = copy_of_text / "dev" / "c4.txt.xz"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"dev/c4\.txt is damaged"):
        bundled_text("dev", "c4")
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"dev/c4\.txt is damaged"):
        bundled_text("dev", "c4")


def test_other_text_in_its_place_is_refused(copy_of_text: Path) -> None:
    shutil.copy(copy_of_text / "dev" / "c4.txt.xz", copy_of_text / "test" / "c4.txt.xz")
    with pytest.raises(DataError, match=r"test/c4\.txt is damaged: its sha256"):
        bundled_text("test", "c4")


def test_missing_text_is_refused(copy_of_text: Path) -> None:
    (copy_of_text / "dev" / "c4.txt.xz").unlink()
    with pytest.raises(DataError, match=r"dev/c4\.txt cannot be read"):
        bundled_text("dev", "c4")


def test_bundling_is_deterministic_and_only_touches_line_ends(tmp_path: Path) -> None:
    for folder in ("calibration", "dev", "test"):
        (tmp_path / "in" / folder).mkdir(parents=True)
        (tmp_path / "in" / folder / "a.txt").write_bytes(f"{folder} é\r\nend ".encode() * 50)
    outputs = []
    for name in ("one", "two"):
        command = [sys.executable, SCRIPT, tmp_path / "in", "--output", tmp_path / name]
        subprocess.run(command, check=True, capture_output=True)
        files = sorted(path for path in (tmp_path / name).rglob("*") if path.is_file())
        outputs.append([(path.relative_to(tmp_path / name), path.read_bytes()) for path in files])
    assert outputs[0] == outputs[1]
    assert len(outputs[0]) == 4
    text = b"dev \xc3\xa9\nend " * 50
    sums = (tmp_path / "one" / "SHA256SUMS").read_text()
    assert f"{hashlib.sha256(text).hexdigest()}  dev/a.txt\n" in sums
