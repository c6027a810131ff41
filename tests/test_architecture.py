"""The house rules that prose would lose: layers, one vendor one module, sizes, nothing unpickled.

Everything is read from the syntax trees of the four packages, imports inside functions included, so
a rule cannot be escaped by importing late. What must not be imported at run time is tried in fresh
interpreters.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("launcher", "train", "model", "data")
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))

MAX_FILE_LINES = 350
MAX_FUNCTION_LINES = 80

LAYERS = {
    "data": set(),
    "model": set(),
    "train": {"data", "model"},
    "launcher": {"data", "model", "train"},
}
"""Package -> the packages of ours that it may import."""

VENDORS = {
    "deepspeed": {"train/engine.py", "train/zero_state.py"},
    "torch.distributed": {"train/world.py"},
    "webdataset": {"data/shards.py"},
    "sentencepiece": {"data/tokenizer.py"},
    "tokenizers": {"data/tokenizer.py"},
    "zstandard": {"data/compressed.py"},
    "wandb": {"train/metrics.py"},
    "tensorboard": {"train/metrics.py"},
    "transformers": {"train/hf.py"},
    "peft": {"train/hf.py"},
    "typer": {
        "launcher/checkpoint_cli.py",
        "launcher/cli.py",
        "launcher/cluster_cli.py",
        "launcher/data_cli.py",
        "launcher/options.py",
        "launcher/preflight_cli.py",
        "launcher/tokenizer_cli.py",
        "launcher/usage.py",
    },
    "subprocess": {
        "launcher/queue.py",
        "launcher/spawn.py",
        "launcher/slurm.py",
        "train/deadline.py",
        "train/export.py",
        "data/commands.py",
    },
}
"""What is imported -> the only modules that may."""

ONE_MODULE_EACH = {
    "data": ("fsspec", "pyarrow", "datatrove", "spacy", "warcio", "py3langid", "rensa"),
    "train": ("sklearn", "sacrebleu", "gguf"),
}
"""Package -> vendors that one of its modules may import; no second one, no other package."""

UNPICKLING = ("pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve")
CODE_FROM_DATA = {"torch.load", "os.system", "os.popen"}
CODE_FROM_NAMES = {"eval", "exec"}

CHECKPOINT_MODULES = (
    "checkpoint",
    "choice",
    "compare",
    "listing",
    "mirror",
    "mirror_thread",
    "pruning",
    "retention",
    "slices",
)
"""Modules of train/ that commands and tests use where there is no torch."""

WITHOUT_TORCH = sorted(
    str(path.relative_to(ROOT).with_suffix("")).replace("/", ".").removesuffix(".__init__")
    for path in MODULES
    if path.name == "config.py"
    or path.parts[-2:] == ("model", "flops.py")
    or path.parts[-2:] in {("train", f"{name}.py") for name in CHECKPOINT_MODULES}
    or (path.is_relative_to(ROOT / "launcher") and path.name != "__main__.py")
)
HEAVY = {"torch", "deepspeed", "transformers"}
CONFIGS = {"data.config", "train.config"}
SLOW = {"numpy", "rich", "fsspec"} | CONFIGS | HEAVY
"""What takes a tenth of a second or more to import: an answer within 0.5 s has none of it. Whether
pydantic is imported decides typer, which converts lists with it.
"""

module = pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))


@module
def test_imports_follow_the_layers(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    ours = {name.split(".")[0] for name in imports(path)} & set(PACKAGES)
    assert ours - {package} <= LAYERS[package], f"{path} imports from a layer above"


@pytest.mark.parametrize("vendor", VENDORS)
def test_a_vendor_lives_in_one_module(vendor: str) -> None:
    assert importers(vendor) <= VENDORS[vendor]


@pytest.mark.parametrize(
    ("package", "vendor"),
    [(package, vendor) for package, vendors in ONE_MODULE_EACH.items() for vendor in vendors],
)
def test_an_optional_vendor_lives_in_one_module_of_its_package(package: str, vendor: str) -> None:
    found = importers(vendor)
    assert len(found) <= 1
    assert all(name.startswith(f"{package}/") for name in found)


@module
def test_files_and_functions_stay_small(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_FILE_LINES
    long = {
        f"{node.name}: {node.end_lineno - node.lineno + 1} lines"
        for node in ast.walk(tree(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno - node.lineno + 1 > MAX_FUNCTION_LINES
    }
    assert not long


@module
def test_modules_and_what_they_offer_are_documented(path: Path) -> None:
    found = tree(path)
    assert ast.get_docstring(found), "no module docstring"
    bare = {
        node.name
        for node in found.body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
    }
    assert not bare, "public names without a docstring"


@pytest.mark.parametrize("pattern", ["*.py", "*.toml", "*.sbatch", "Makefile"])
def test_code_is_ascii(pattern: str) -> None:
    folders = [ROOT / name for name in (*PACKAGES, "tests", "slurm")]
    files = [path for folder in folders for path in folder.rglob(pattern)]
    files += [path for path in ROOT.glob(pattern) if path.is_file()]
    assert files
    assert [path for path in files if not path.read_bytes().isascii()] == []


@module
def test_nothing_we_load_can_execute_code(path: Path) -> None:
    """No pickle, no torch.load, no remote code, no shell.

    Between our own processes Python's queues do pickle: object collectives (train/world.py) and
    the workers of loader and preparation (data/). Nothing read from a file or URL goes that way.
    """
    names = {name.split(".")[0] for name in imports(path)}
    assert not names & set(UNPICKLING)
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Attribute):
            assert ast.unparse(node) not in CODE_FROM_DATA, f"line {node.lineno}"
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in CODE_FROM_NAMES, f"line {node.lineno}"
        if isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "allow_pickle"):
            assert ast.unparse(node.value) == "False", f"line {node.lineno}: {node.arg}"
        if isinstance(node, ast.keyword) and node.arg == "weights_only":
            assert ast.unparse(node.value) == "True", f"line {node.lineno}: {node.arg}"
        if isinstance(node, ast.keyword) and node.arg == "shell":
            assert ast.unparse(node.value) == "False", f"line {node.lineno}: {node.arg}"


def test_modules_of_login_node_commands_import_no_torch() -> None:
    """In one interpreter, in which each import is checked before the next one."""
    names = ", ".join(repr(name) for name in WITHOUT_TORCH)
    run_clean(f"""
        import importlib
        for name in [{names}]:
            importlib.import_module(name)
            check(name)
    """)


@pytest.mark.parametrize(
    "argv",
    [
        ["--help"],
        ["--version"],
        ["pretrain", "--help"],
        ["recipes", "classify"],
        ["plan", "llama-7b", "--nodes", "4", "--gpu", "h100", "--explain"],
        ["submit", "llama-7b", "--nodes", "4", "--run", "RUN", "data=DATASET", "--dry-run"],
    ],
    ids=lambda argv: argv[0],
)
def test_login_node_commands_import_no_torch(argv: list[str]) -> None:
    run_command(argv)


@pytest.mark.parametrize(
    ("argv", "allowed"),
    [
        (["--help"], {"rich"}),
        (["--version"], set()),
        (["status", "RUN"], set()),
        (["status", "RUN", "--json"], set()),
        (["status", "RUN", "RUN"], {"rich"}),
        (["plan", "llama-7b"], {"rich"} | CONFIGS),
        (["submit", "llama-7b", "--run", "RUN", "data=DATASET", "--dry-run"], CONFIGS),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_login_node_commands_start_at_once(
    argv: list[str], allowed: set[str], tmp_path: Path
) -> None:
    """Measured by what they import: a clock on a busy machine proves nothing."""
    (tmp_path / "RUN" / "logs").mkdir(parents=True)
    run_command([word.replace("RUN", str(tmp_path / "RUN")) for word in argv], SLOW - allowed)


def test_the_rules_notice_a_breach(tmp_path: Path) -> None:
    """The reading of imports is not blind: late, nested and attribute forms are all seen."""
    path = tmp_path / "module.py"
    path.write_text(
        "import torch.distributed as dist\n"
        "from torch import distributed\n"
        "def late():\n    from deepspeed.ops import adam\n"
        "class Holder:\n    def method(self):\n        import pickle\n"
        "import torch\ntorch.distributed.rpc\n"
    )
    expected = {"torch.distributed", "deepspeed.ops.adam", "pickle", "torch.distributed.rpc"}
    assert expected <= imports(path)


def tree(path: Path) -> ast.Module:
    """Syntax tree of a file."""
    return ast.parse(path.read_text(), filename=str(path))


def imports(path: Path) -> set[str]:
    """Dotted names that a file imports or reaches anywhere; `from a import b` is a and a.b."""
    return set(_imports(tree(path)))


def _imports(parsed: ast.Module) -> Iterator[str]:
    for node in ast.walk(parsed):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "packages are imported by name"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch."):
            # `import torch` is enough to reach torch.distributed.
            yield ast.unparse(node)


def importers(vendor: str) -> set[str]:
    """Our modules that import `vendor` or something below it, relative to the root."""
    return {
        str(path.relative_to(ROOT))
        for path in MODULES
        if any(name == vendor or name.startswith(f"{vendor}.") for name in imports(path))
    }


def run_command(argv: list[str], heavy: set[str] = HEAVY) -> None:
    """Run a command line that imports nothing of `heavy`."""
    run_clean(
        f"""
        sys.argv = ["headrace", *{argv!r}]
        from launcher.cli import main
        try:
            main()
        except SystemExit as end:
            assert not end.code, end.code
        check("headrace")
    """,
        heavy,
    )


def run_clean(body: str, heavy: set[str] = HEAVY) -> None:
    """Run `body` in a fresh interpreter that can `check(name)`: nothing heavy is loaded by now."""
    lines = [line[8:] for line in body.splitlines()]
    program = "\n".join(
        [
            "import sys",
            "def check(name):",
            f"    heavy = {heavy!r} & set(sys.modules)",
            "    assert not heavy, f'{name} imports {heavy}'",
            *lines,
        ]
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
