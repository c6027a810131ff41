"""A preparation that is killed at any moment is completed by the same command, to the byte."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from data.config import PrepareConfig
from data.prepare import prepare
from tests.data.prepared import tree
from tests.data.texts import prose, write_lines

KILLS = """
import os, signal, sys
from pathlib import Path
from data import prepare, shards
from data.config import PrepareConfig
import webdataset.writer

corpus, folder = sys.argv[1], Path(sys.argv[2])
settings = PrepareConfig.model_validate_json(sys.argv[3])

def child(work):
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException as error:
            print(type(error), error, flush=True)
            os._exit(1)
        os._exit(0)
    return os.waitpid(pid, 0)[1]

def dying(call, name):
    # Counts the moments at which files come into being, and dies before or after the call-th.
    left = [call]
    for function in ("replace", "fsync", "mkdir"):
        def counting(*args, real=getattr(os, function), **kwargs):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)
        setattr(os, function, counting)
    prepare.prepare([corpus], folder / name, settings, workers=1)

call = 1
while True:
    name = f"kill-{call}"
    status = child(lambda: dying(call, name))
    if os.WIFEXITED(status):
        assert os.WEXITSTATUS(status) == 0
        break
    complete = (folder / name / "manifest.json").exists()
    status = child(lambda: prepare.prepare([corpus], folder / name, settings, workers=1))
    assert status == 0, (call, status)
    print(name, complete, flush=True)
    call += 1
"""


def test_a_kill_at_any_moment_leaves_what_the_same_command_completes(
    tmp_path: Path,
) -> None:
    corpus = write_lines(tmp_path / "a.jsonl", [prose(300, seed=seed) for seed in range(40)])
    settings = PrepareConfig(vocab_size=330, val_fraction=0.2, part_bytes=5000, shard_bytes=6000)
    reference = tmp_path / "reference"
    prepare([str(corpus)], reference, settings, workers=1)
    command = [sys.executable, "-c", KILLS, str(corpus), str(tmp_path / "kills")]
    (tmp_path / "kills").mkdir()
    command.append(settings.model_dump_json())
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    killed = [line.split() for line in done.stdout.splitlines()]
    assert len(killed) > 25, "too few moments were tried"
    assert {complete for _, complete in killed} == {"True", "False"}
    expected = tree(reference)
    for name, _ in killed:
        assert tree(tmp_path / "kills" / name) == expected, name
