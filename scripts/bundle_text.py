"""Make the compressed text that travels inside the wheel, from a folder of text files.

    python scripts/bundle_text.py FOLDER [--output calibration/kvq_calibration/text]

FOLDER holds ``calibration/``, ``dev/`` and ``test/``, each with UTF-8 ``.txt`` files. Every file is
written as ``.txt.xz`` beside a ``SHA256SUMS`` of the uncompressed text, which is checked whenever
the text is read. The same input gives the same bytes. Apart from line ends, which become Unix ones,
the text is not changed.
"""

from __future__ import annotations

import argparse
import hashlib
import lzma
from pathlib import Path

FOLDERS = ("calibration", "dev", "test")
TARGET = Path(__file__).resolve().parent.parent / "calibration" / "kvq_calibration" / "text"


def bundle(source: Path, target: Path) -> list[str]:
    """Compress every text below ``source``; return one ``SHA256SUMS`` line a file."""
    sums = []
    for folder in FOLDERS:
        paths = sorted((source / folder).glob("*.txt"))
        if not paths:
            raise SystemExit(f"{source / folder} holds no .txt files")
        (target / folder).mkdir(parents=True, exist_ok=True)
        for path in paths:
            # Some archives hand text out with Windows line ends; perplexity would count them.
            text = path.read_text(encoding="utf-8").encode("utf-8")
            compressed = lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)
            (target / folder / f"{path.name}.xz").write_bytes(compressed)
            sums.append(f"{hashlib.sha256(text).hexdigest()}  {folder}/{path.name}")
            print(f"{folder}/{path.name}: {len(text):,} bytes, compressed {len(compressed):,}")
    (target / "SHA256SUMS").write_text("\n".join(sums) + "\n", encoding="utf-8")
    return sums


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder with calibration/, dev/ and test/")
    parser.add_argument("--output", type=Path, default=TARGET, help="where the files go")
    arguments = parser.parse_args()
    bundle(arguments.folder, arguments.output)


if __name__ == "__main__":
    main()
