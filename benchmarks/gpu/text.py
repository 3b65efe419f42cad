"""Text to train on where there is no network: the Python files of all packages that are installed here.

    python -m benchmarks.gpu.text FOLDER [--megabytes 80]     # FOLDER/text.jsonl, a line for each file

Files that stand twice are taken once, those over 200 kB (tables and generated code) and under 1 kB not at all; packages
take turns, so that none fills the limit alone. The text is for runs of your own: its packages' licences hold.
"""

import argparse
import hashlib
import json
import sysconfig
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

SMALLEST, LARGEST = 1_000, 200_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--megabytes", type=float, default=80, help="of text, at most")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    left, seen, num_files = int(1e6 * options.megabytes), set[bytes](), 0
    with (options.folder / "text.jsonl").open("w") as file:
        for path in taking_turns(Path(sysconfig.get_path("purelib"))):
            text = path.read_bytes()
            digest = hashlib.sha256(text).digest()
            if not SMALLEST <= len(text) <= min(LARGEST, left) or digest in seen:
                continue
            seen.add(digest)
            file.write(json.dumps({"text": text.decode(errors="replace")}) + "\n")
            left, num_files = left - len(text), num_files + 1
    print(f"{num_files} files, {options.megabytes - left / 1e6:.1f} MB of text in {options.folder}")


def taking_turns(packages: Path) -> Iterator[Path]:
    """The Python files below: the first of every package, the second of every package, and so on."""
    folders = sorted(path for path in packages.iterdir() if path.is_dir())
    for paths in zip_longest(*(sorted(folder.rglob("*.py")) for folder in folders)):
        yield from (path for path in paths if path is not None and path.is_file())


if __name__ == "__main__":
    main()
