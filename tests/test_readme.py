"The README's Python runs as it stands, in an empty folder, and prints what the README shows."
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```)?", README, re.M | re.S)


@pytest.mark.parametrize("code, shown", BLOCKS, ids=range(len(BLOCKS)))
def test_python(code, shown, tmp_path):
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    if shown: assert run.stdout == shown
    if "VideoManifest" in code:
        assert "fresh 4: fc_norm.weight" in run.stdout and (tmp_path / "student.safetensors").exists()
