"""Site settings: from a TOML file and options into scripts, or to a refusal that helps."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from launcher.cli import run_command
from launcher.jobs import Job, render
from launcher.site import SCRIPT_NAMES, Site, load_site, shell_lines
from launcher.template import BEGIN, END, FOLDER, SlurmUsageError
from train.config import ConfigError

ROGUE = "a b; touch owned $(touch owned) `touch owned` ' \" \\ # %j"
FULL = """
partition = "gpu"
account = "project-17"
qos = "long"
modules = ["cuda/12.4", "nccl"]
network_interface = "ib0"
scratch = "/local"
preflight = true
environment = { HTTPS_PROXY = "http://proxy:3128", NCCL_IB_HCA = "mlx5" }
[container]
runtime = "pyxis"
image = "/images/headrace.sqsh"
mounts = ["/data:/data"]
"""


def site_in(folder: Path, text: str) -> Site:
    path = folder / "site.toml"
    path.write_text(text)
    return load_site(path)


def job(run: Path, site: Site, **changes: object) -> Job:
    values = {
        "recipe": "tiny-cpu", "overrides": ("data=/data/x",), "run": run, "num_nodes": 1,
        "gpus_per_node": 0, "time": "60", "site": site,
    }  # fmt: skip
    return Job(**(values | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("partiton = 'x'", r"site\.toml: unknown key 'partiton'; did you mean 'partition'\?"),
        ("[container]\nimag = 'x'", r"unknown key 'container\.imag'; did you mean 'container\.im"),
        ("zzz = 1", r"unknown key 'zzz'; there are partition, account, qos, modules, network_inte"),
        ("modules = 'cuda'", r"modules = 'cuda': Input should be a valid tuple"),
        ("environment = { 'A B' = 'x' }", r"environment: 'A B' is no name of an environment varia"),
        ("environment = { RUN = 'x' }", r"RUN is a variable of the batch scripts themselves; lea"),
        ("environment = { SLURM_JOB_ID = '1' }", r"SLURM_JOB_ID is a variable of the batch script"),
        ("partition = true", r"partition = True: Input should be a valid string"),
        ("scratch = 'local'", r"scratch: 'local' is no absolute path; name a folder that every"),
    ],
)
def test_a_setting_that_is_none_is_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        site_in(tmp_path, text)
    assert refused.value.exit_code == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("partition", r"site\.toml: not valid TOML"),
        ("[container]\nimage = 'x'", r"container\.runtime and container\.image come together"),
        ("[container]\nruntime = 'pyxis'", r"container\.runtime and container\.image come togeth"),
    ],
)
def test_half_a_file_is_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        site_in(tmp_path, text)


def test_no_setting_replaces_what_a_script_was_given() -> None:
    """What the blocks assign comes in part before the site's own variables."""
    for script in FOLDER.glob("*.sbatch"):
        block = script.read_text().split(BEGIN)[1].split(END)[0]
        assert set(re.findall(r"^([A-Z_]+)=", block, re.MULTILINE)) <= SCRIPT_NAMES, script


def test_a_site_file_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    with pytest.raises(SlurmUsageError, match=r"cannot be read: Is a directory; name a TOML file"):
        load_site(tmp_path)


def test_a_site_file_that_is_named_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no site file at .*gone\.toml; write it, or leave --si"):
        load_site(tmp_path / "gone.toml")


def test_the_default_place_may_be_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_site() == Site()
    (tmp_path / ".config" / "headrace").mkdir(parents=True)
    (tmp_path / ".config" / "headrace" / "site.toml").write_text("account = 'mine'\n")
    assert load_site().account == "mine"


def test_options_win_over_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "site.toml").write_text(FULL)
    monkeypatch.chdir(tmp_path)
    argv = ["submit", "tiny-cpu", "data=x", "--dry-run", "--site", "site.toml"]
    argv += ["--account", "other", "--container", "new.sif", "--sbatch=-p short"]
    run_command(argv, standalone=False)
    script = capsys.readouterr().out
    directives = [line for line in script.splitlines() if line.startswith("#SBATCH")]
    assert "#SBATCH --account=other" in directives and "#SBATCH -p short" in directives
    assert "#SBATCH --qos=long" in directives and "#SBATCH --partition=gpu" not in directives
    assert "WITHIN=(apptainer exec --nv " in script and "new.sif)\n" in script


@pytest.mark.parametrize(
    ("asked", "is_asked"), [((), 1), (("--preflight",), 1), (("--no-preflight",), 0)]
)
def test_a_preflight_is_asked_for_by_an_option_or_by_the_site(
    asked: tuple[str, ...],
    is_asked: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The environment of the job has the last word, as in a script that is submitted by hand."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    argv = ["submit", "tiny-cpu", "data=x", "--dry-run", *asked]
    run_command(argv, standalone=False)
    without = int("--preflight" in asked)
    assert f"PREFLIGHT=${{PREFLIGHT:-{without}}}\n" in capsys.readouterr().out
    (tmp_path / "site.toml").write_text("preflight = true\n")
    run_command([*argv, "--site", "site.toml"], standalone=False)
    block = capsys.readouterr().out.split(BEGIN)[1].split(END)[0]
    for environ, told in (({}, is_asked), ({"PREFLIGHT": "0"}, 0), ({"PREFLIGHT": "1"}, 1)):
        done = subprocess.run(
            ["bash", "-c", f'{block}printf %s "$PREFLIGHT"'],
            env=environ, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert done.stdout == str(told)


def test_nobody_guesses_what_runs_an_image() -> None:
    with pytest.raises(
        ValueError, match=r"--container nvcr\.io#x: neither \.sif \(apptainer\) nor"
    ):
        Site().within("nvcr.io#x")


def test_a_colon_in_a_mounted_folder_is_refused(tmp_path: Path) -> None:
    site = Site().within("a.sif")
    with pytest.raises(ValueError, match=r"a:b cannot be mounted in a container: its name holds a"):
        shell_lines(site, tmp_path / "a:b", gpus=False)


def test_what_comes_from_data_stays_data(tmp_path: Path) -> None:
    """Every value that a person may write holds what a shell would run; the block is then run."""
    rogue = ROGUE.replace("touch owned", f"touch {tmp_path / 'owned'}")
    site = Site.model_validate(
        {
            "environment": {"ROGUE": rogue}, "network_interface": rogue, "scratch": f"/{rogue}",
            "container": {"runtime": "apptainer", "image": rogue, "python": rogue},
        }
    )  # fmt: skip
    asked = job(tmp_path / rogue.replace("/", ""), site, overrides=(f"data={rogue}",), recipe=rogue)
    block = render(asked).split(BEGIN)[1].split(END)[0]
    show = 'printf "%s\\0" "$RUN" "$PYTHON" "$ROGUE" "$NODE_LOCAL" "${WITHIN[@]: -1}" "$@"'
    done = subprocess.run(["bash", "-c", block + show], capture_output=True, text=True, check=True)
    assert done.stdout.split("\0")[:-1] == [
        str(asked.run), rogue, rogue, f"/{rogue}", rogue, rogue, f"data={rogue}",
    ]  # fmt: skip
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    ("site", "told"),
    [
        (Site(), "/job/tmp"),
        (Site(scratch="/local"), "/local"),
        (Site().within("a.sif"), "/tmp"),  # what the container sees
    ],
)
def test_caches_go_where_the_site_or_the_job_has_its_disk(site: Site, told: str) -> None:
    lines = [*shell_lines(site, gpus=False), 'printf %s "$NODE_LOCAL"']
    done = subprocess.run(
        ["bash", "-c", "\n".join(lines)], env={"TMPDIR": "/job/tmp"}, capture_output=True, text=True
    )
    assert done.stdout == told


def test_modules_are_loaded_by_the_function_of_the_site(tmp_path: Path) -> None:
    site = Site(modules=("cuda/12.4", "a; false"))
    loaded = "module() { printf '%s|' $UNSET \"$@\"; }; set -u; "
    lines = "\n".join(shell_lines(site, gpus=False))
    done = subprocess.run(["bash", "-c", loaded + lines], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "load|cuda/12.4|a; false|"), done.stderr
