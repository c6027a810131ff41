"""Nothing that is loaded runs code, reaches out, or reads outside its folder; and whatever is wrong
with it ends in a message.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

MEMORY_MIB = 400
"""Above the process that has loaded a good model: 593 files took 228 MiB when this was written."""


def test_hostile_files_do_nothing_and_are_refused_in_words(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.train.attack", str(tmp_path / "attack")],
        cwd=Path(__file__).parent.parent.parent,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["count"] >= 300
    assert found["violations"] == [] and found["ran"] == []
    assert found["unexpected"] == []
    assert found["slow"] == []
    assert found["memory_mib"] < MEMORY_MIB


def test_the_hook_sees_what_it_is_there_for(tmp_path: Path) -> None:
    """Without this the test above could not fail."""
    program = (
        "import pickle, sys, tests.train.attack as a\n"
        "seen = []\n"
        "sys.addaudithook(lambda event, args: seen.append(event))\n"
        "pickle.loads(pickle.dumps(a.Evil()))\n"
        "assert {'pickle.find_class', 'os.system'} <= set(seen) & set(a.FORBIDDEN), seen\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parent.parent.parent,
        env={"PYTHONPATH": ".", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    (Path(__file__).parent.parent.parent / "ran").unlink(missing_ok=True)
    assert done.returncode == 0, done.stderr[-2000:]
