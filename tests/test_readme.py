"The README's recipe for training on one's own videos runs as it stands, in an empty folder."
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_recipe(tmp_path):
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    recipe = next(b for b in blocks if "VideoManifest" in b)
    run = subprocess.run([sys.executable, "-c", recipe], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    assert "fresh 4: fc_norm.weight" in run.stdout and (tmp_path / "student.safetensors").exists()
