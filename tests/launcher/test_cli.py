"""The command line as a person meets it: exit code, stdout and stderr of a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from data.config import CleanConfig, PrepareConfig

ROOT = Path(__file__).resolve().parent.parent.parent

COMMANDS = (
    "quickstart", "prepare", "data", "recipes", "plan", "preflight", "pretrain", "replay", "guard",
    "submit", "status", "checkpoint", "export", "finetune", "evaluate", "generate",
)  # fmt: skip


def headrace(*argv: object, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """`headrace ARGV`, with these environment variables."""
    environ = os.environ | {"OMP_NUM_THREADS": "1", "NO_COLOR": "1", "COLUMNS": "120"}
    return subprocess.run(
        [sys.executable, "-m", "launcher", *map(str, argv)],
        cwd=cwd,
        env=environ | {"PYTHONPATH": str(ROOT)} | variables,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_help_reads_like_a_table_of_contents(tmp_path: Path) -> None:
    done = headrace("--help", cwd=tmp_path)
    assert done.returncode == 0
    listed = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("\u2502 ")]
    assert [name for name in listed if name in COMMANDS] == list(COMMANDS)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["pretrian"], "No such command 'pretrian'"),
        (["pretrain"], "Missing argument 'RECIPE'"),
        (
            ["prepare", "--input", "a.txt", "--output", "o", "--language", "en,,zh"],
            "--language 'en,,zh': a name is empty; leave out the comma too many",
        ),
        (["pretrain", "tiny-cup"], "error: no recipe named 'tiny-cup'; did you mean 'tiny-cpu'?"),
        (
            ["pretrain", "tiny-cpu", "optim.l_r=1"],
            "error: tiny-cpu: unknown key 'optim.l_r'; did you mean 'optim.lr'?",
        ),
        (["pretrain", "tiny-cpu", "batch_tokens=100"], "no multiple of seq_len=128"),
        (["pretrain", "tiny-cpu", "zero.stage=0"], "write zero.stage=1"),
        (["pretrain", "tiny-cpu", "steps=soon"], "error: tiny-cpu: steps = 'soon'"),
        (
            ["pretrain", "tiny-cpu", "data=D", "--nproc", "0"],
            "'--nproc': Input should be greater than or equal to 1",
        ),
        (["finetune", "tiny-cpu"], "error: recipe 'tiny-cpu' is for `headrace pretrain`"),
        (["plan", "llama-7b", "--gpu", "v100"], "error: unknown GPU 'v100'; did you mean"),
        (["prepare", "--input", "x", "--output", "y", "--val-fraction", "2"], "--val-fraction 2"),
        (["prepare", "--input", "", "--output", "y"], "error: --input '' names nothing, as when"),
        (["prepare", "--input", "x", "--output", ""], "Invalid value for '--output': it is empty"),
        (["pretrain", "tiny-cpu", "--run", ""], "Invalid value for '--run': it is empty"),
        (["pretrain", "tiny-cpu", "--run", "/dev/null"], "/dev/null is a file, no folder; name"),
        (["generate", "", "x"], "Invalid value for 'MODEL': it is empty, as when a variable is"),
        (["submit", "llama-7b", "data=D", "--time", "xyz"], "error: --time 'xyz' is no Slurm time"),
        (["submit", "llama-7b", "data=D", "--sbatch", "x"], "error: --sbatch 'x' is no sbatch"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_bad_command_line_leaves_with_2_and_says_why(
    argv: list[str], message: str, tmp_path: Path
) -> None:
    done = headrace(*argv, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_options_and_overrides_may_stand_anywhere(tmp_path: Path) -> None:
    argv = ["submit", "--nodes", "2", "llama-7b", "data=D", "--dry-run", "steps=9000", "--run", "R"]
    done = headrace(*argv, "zero.stage=3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "set -- llama-7b data=D steps=9000 zero.stage=3\n" in done.stdout
    assert f"RUN={tmp_path}/R\n" in done.stdout
    assert "note: there is no dataset at D yet: submit will refuse\n" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_plan_prints_results_on_stdout_and_json_for_programs(tmp_path: Path) -> None:
    argv = ["plan", "llama-7b", "--nodes", 32, "--gpus-per-node", 8, "--gpu", "h100"]
    done = headrace(*argv, "--explain", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "32 x 8 h100, ZeRO stage 2, bf16" in done.stdout
    assert "tokens per day" in done.stdout
    found = json.loads(headrace(*argv, "--json", cwd=tmp_path).stdout)
    assert found["dummy_waste"] == 0.0
    fitted = headrace(*argv, "--fit", cwd=tmp_path).stdout.splitlines()[-1]
    assert fitted.startswith("fits: micro_batch=")
    again = json.loads(headrace(*argv, *fitted.split()[1:], "--json", cwd=tmp_path).stdout)
    assert again["fits"] and again["step_seconds"] <= found["step_seconds"]


def test_the_version_is_that_of_the_package(tmp_path: Path) -> None:
    done = headrace("--version", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"headrace {version('headrace')}\n")


def test_help_of_prepare_tells_what_happens_without_an_option(tmp_path: Path) -> None:
    words = " ".join(headrace("prepare", "--help", cwd=tmp_path, COLUMNS="200").stdout.split())
    fields = PrepareConfig.model_fields | CleanConfig.model_fields
    for field in ("vocab_size", "tokenizer_type", "val_fraction", "text_field", "max_bad_lines",
                  "language_min"):  # fmt: skip
        option = "--" + field.replace("_", "-")
        told = words.split(f" {option} ")[1].split(" --")[0]
        assert f"[default: ({fields[field].default})]" in told


def test_help_of_finetune_names_the_keys_that_it_needs(tmp_path: Path) -> None:
    shown = headrace("finetune", "--help", cwd=tmp_path).stdout
    for key in ("model=", "data=", "data.text_column=", "data.label_column=", "data.val=",
                "epochs=", "`headrace recipes`"):  # fmt: skip
        assert key in shown


def test_an_error_of_ours_keeps_its_traceback(tmp_path: Path) -> None:
    """Only errors meant for people are shortened."""
    program = (
        "import launcher.cli as cli, launcher.spawn\n"
        "def broken(name, command):\n    raise ValueError('our mistake')\n"
        "cli.find_recipe = broken\n"
        "import sys; sys.argv = ['headrace', 'pretrain', 'tiny-cpu']\n"
        "cli.main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "ValueError: our mistake" in done.stderr


def test_an_ascii_terminal_gets_escapes(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("na\u00efve caf\u00e9 \u2014\n\n" * 400, encoding="utf-8")
    made = headrace(
        "prepare", "--input", "text.txt", "--output", "D", "--vocab-size", 280, cwd=tmp_path
    )
    assert made.returncode == 0, made.stderr
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = headrace("data", "inspect", "D", "--step", 1, cwd=tmp_path, **ascii_only)
    assert done.returncode == 0, done.stderr
    assert "na\\xefve caf\\xe9 \\u2014" in done.stdout
