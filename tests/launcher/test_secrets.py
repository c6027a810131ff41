"""Secrets that a job carries in its environment and in URLs are in no line that it prints and in no
file that it leaves: canaries go in, and everything that came out is searched.
"""

from __future__ import annotations

import base64
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.data.servers import serving
from tests.launcher.test_cli import headrace
from tests.train.test_pretrain import RECIPE
from train.attempts import attempts

CANARY = "c4n4ry-9f3e"
ENVIRON = {
    name: f"{name}-{CANARY}"
    for name in (
        "WANDB_API_KEY",
        "HF_TOKEN",
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_SESSION_TOKEN",
        "DATA_PASSWORD",
    )
}


class Work:
    """A folder where commands run with secrets around them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.said = ""
        (folder / "small.toml").write_text(RECIPE, encoding="utf-8")

    def run(self, *argv: object, code: int = 0, **variables: str) -> str:
        """`headrace ARGV`, its exit code, and what it said."""
        caches = {"HOME": str(self.folder), "XDG_CACHE_HOME": str(self.folder / "cache")}
        done = headrace(*argv, cwd=self.folder, **ENVIRON, **caches, **variables)
        said = done.stdout + done.stderr
        assert done.returncode == code, said
        self.said += said
        return said

    def pretrain(self, data: str, *more: str, code: int = 0, **variables: str) -> str:
        """A run of four steps."""
        sizes = ("steps=4", "checkpoint.every=2", "eval.samples=2", "log.wandb=offline")
        argv = ("pretrain", "small.toml", f"data={data}", "--run", "run", *sizes, *more)
        return self.run(*argv, code=code, **variables)

    def files(self) -> dict[Path, bytes]:
        """All that lies there."""
        found = (path for path in self.folder.rglob("*") if path.is_file())
        return {path.relative_to(self.folder): path.read_bytes() for path in found}


@pytest.fixture(scope="module")
def work(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Work]:
    """One of everything: what is fetched, refused, interrupted, resumed, exported and submitted."""
    folder = tmp_path_factory.mktemp("secrets")
    made = Work(folder)
    served = tmp_path_factory.mktemp("served")
    (served / "text.txt").write_text("one text\n\nanother text\n" * 400, encoding="utf-8")
    shutil.copytree(dataset, served / "dataset")
    with serving(served, password=f"pass-{CANARY}") as server:
        host = server.url.removeprefix("http://")
        secret = f"http://user:pass-{CANARY}@{host}"
        query = f"?token=query-{CANARY}"
        argv = ("prepare", "--vocab-size", "270", "--workers", "1", "--input")
        made.run(*argv, f"{secret}/text.txt{query}", "--output", "made")
        made.run(*argv, f"{secret}/nowhere.txt{query}", "--output", "other", code=2)
        made.pretrain(f"{secret}/dataset", code=2)
        made.pretrain(f"http://{host}/dataset{query}", code=2)
        (folder / ".netrc").write_text(f"machine 127.0.0.1 login user password pass-{CANARY}\n")
        (folder / ".netrc").chmod(0o600)
        data = f"http://{host}/dataset"
        made.pretrain(data, code=1, HEADRACE_FAULT="optimizer:3:0:raise")
        made.pretrain(data, "checkpoint.mirror=copies")
    (folder / ".netrc").unlink()
    made.run("export", "run", "model")
    submit = ("submit", "small.toml", f"data={data}", "--run", "other-run", "--nodes", "1")
    made.run(*submit, "--gpus-per-node", "1", "--time", "1:00:00", "--dry-run")
    told = f"checkpoint.mirror=s3://user:pass-{CANARY}@host/copies"
    made.run(*submit, "--dry-run", told, code=2)
    yield made


def test_the_commands_did_what_they_are_searched_for(work: Work) -> None:
    outcomes = [row["outcome"] for row in attempts(work.folder / "run") if row["event"] == "end"]
    assert outcomes[-1] == "complete"
    names = {path.as_posix() for path in work.files()}
    for expected in ("made/manifest.json", "run/config.json", "model/config.json"):
        assert expected in names
    assert any("wandb" in name for name in names)
    assert any(name.startswith("run/checkpoints/step-") for name in names)
    assert any(name.startswith("copies/run/step-") for name in names)
    assert "checkpoint: the mirror at s3://host/... is named with a password" in work.said
    assert "Traceback" in work.said or "HEADRACE_FAULT" in work.said, "the fault was told"
    assert "nowhere.txt" in work.said
    assert "is named with a password, a query or a fragment" in work.said


def test_no_secret_is_printed(work: Work) -> None:
    assert CANARY not in work.said


def test_no_secret_is_in_a_file(work: Work) -> None:
    spelled = [CANARY.encode(), CANARY.encode("utf-16-le")]
    spelled += [base64.b64encode(f"{skip}{CANARY}".encode())[4:-4] for skip in ("", "x", "xx")]
    found = [
        path for path, content in work.files().items() if any(word in content for word in spelled)
    ]
    assert found == []
