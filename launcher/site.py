"""What a cluster wants of every job, in one TOML file: ~/.config/headrace/site.toml.

    partition = "gpu"
    account = "project-17"
    modules = ["cuda/12.4"]
    network_interface = "ib0"
    scratch = "/local"
    preflight = true
    environment = { HTTPS_PROXY = "http://proxy:3128" }

    [container]
    runtime = "pyxis"
    image = "/images/headrace.sqsh"
    mounts = ["/data:/data"]

Every value goes into scripts as quoted text; none is run.
"""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from launcher.template import SlurmUsageError, refuse_control_characters
from train.decode import decode
from train.settings import Table

SUFFIXES = {".sif": "apptainer", ".sqsh": "pyxis"}
"""Image files -> what runs them."""
SCRIPT_NAMES = {
    "RUN", "OUT", "PYTHON", "TASKS", "CODE", "COPY_CODE", "MIN_NODES", "PREFLIGHT", "RECORD",
    "NODE_LOCAL", "CONTAINER", "WITHIN", "STAGE", "LOCAL", "IFS", "UID", "EUID", "PPID",
    "BASHOPTS", "SHELLOPTS",
}  # fmt: skip
"""Variables that the batch scripts use themselves, or that bash has for itself."""


class Container(Table):
    """What ranks run in."""

    runtime: Literal["none", "pyxis", "apptainer"] = "none"
    """pyxis: srun --container-image; apptainer: apptainer exec."""
    image: str = ""
    """File or name of the image, as the runtime takes it."""
    mounts: tuple[str, ...] = ()
    """FROM:TO of folders that the container sees; run, working and scratch folder are added."""
    python: str = "python"
    """Python inside the image."""


class Site(Table):
    """The settings of a cluster; empty ones are left to Slurm."""

    partition: str = ""
    """Where jobs go."""
    account: str = ""
    """Who pays."""
    qos: str = ""
    """Quality of service."""
    modules: tuple[str, ...] = ()
    """What `module load` is given before anything starts."""
    network_interface: str = ""
    """NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME."""
    environment: dict[str, str] = Field(default_factory=dict)
    """Variables of every job."""
    scratch: str = ""
    """Folder on each node's own disk, for caches; empty: TMPDIR, or /tmp."""
    preflight: bool = False
    """Whether `headrace preflight` looks at the nodes before each attempt of pretraining."""
    container: Container = Container()
    """What ranks run in."""

    @field_validator("environment")
    @classmethod
    def _names(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                raise ValueError(f"{name!r} is no name of an environment variable")
            if name in SCRIPT_NAMES or name.startswith("SLURM_"):
                raise ValueError(
                    f"{name} is a variable of the batch scripts themselves; leave it out"
                )
        return value

    @field_validator("scratch")
    @classmethod
    def _absolute(cls, value: str) -> str:
        if value and not Path(value).is_absolute():
            raise ValueError(f"{value!r} is no absolute path; name a folder that every node has")
        return value

    @property
    def directives(self) -> dict[str, str]:
        """sbatch options."""
        told = {"partition": self.partition, "account": self.account, "qos": self.qos}
        return {option: value for option, value in told.items() if value}

    def but(self, **changes: str) -> Site:
        """With values of a command line, where they are not empty."""
        return self.model_copy(update={key: value for key, value in changes.items() if value})

    def within(self, image: str) -> Site:
        """With another container image. SlurmUsageError when nobody knows what runs it."""
        if not image:
            return self
        runtime = SUFFIXES.get(Path(image).suffix, self.container.runtime)
        if runtime == "none":
            raise SlurmUsageError(
                f"--container {image}: neither .sif (apptainer) nor .sqsh (pyxis), and no site "
                'file says what runs it; write runtime = "pyxis" or "apptainer" under [container]'
            )
        changes = {"image": image, "runtime": runtime}
        return self.model_copy(update={"container": self.container.model_copy(update=changes)})


def default_path() -> Path:
    """Where a person keeps the settings of their cluster."""
    return Path.home() / ".config" / "headrace" / "site.toml"


def load_site(path: Path | None = None) -> Site:
    """The settings in `path`, or in the default place, if there is a file.

    ConfigError names each key that is unknown or has a bad value.
    """
    place = path or default_path()
    if path is None and not place.is_file():
        return Site()
    try:
        table = tomllib.loads(place.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SlurmUsageError(f"no site file at {place}; write it, or leave --site out") from None
    except OSError as error:
        raise SlurmUsageError(
            f"{place} cannot be read: {error.strerror}; name a TOML file, or leave --site out"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SlurmUsageError(f"{place}: not valid TOML: {error}") from None
    site = decode(Site, table, name=str(place))
    if (site.container.runtime == "none") != (site.container.image == ""):
        raise SlurmUsageError(
            f"{place}: container.runtime and container.image come together; write runtime = "
            '"pyxis" or "apptainer" and image = "FILE" under [container], or neither'
        )
    return site


def shell_lines(site: Site, *folders: Path, gpus: bool) -> list[str]:
    """Lines of bash that bring these settings into a script; `folders` are seen in a container."""
    refuse_control_characters([*site.modules, *site.environment.values()])
    runtime = site.container.runtime
    # What a container sees is decided here, before there is a TMPDIR to ask for.
    scratch = site.scratch or ("" if runtime == "none" else "/tmp")
    lines = [f"NODE_LOCAL={shlex.quote(scratch) if scratch else '${TMPDIR:-/tmp}'}"]
    if site.modules:
        # The function is the site's own, and seldom written for `set -u`.
        lines.append(f"set +u; module load {shlex.join(site.modules)} || exit 1; set -u")
    variables = dict(site.environment)
    if site.network_interface:
        names = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")
        variables |= dict.fromkeys(names, site.network_interface)
    lines += [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]
    mounts = ",".join(_mounts(site, *folders)) if runtime != "none" else ""
    options, command = [], []
    if runtime == "pyxis":
        options = [f"--container-image={site.container.image}", f"--container-mounts={mounts}"]
    elif runtime == "apptainer":
        nvidia = ["--nv"] if gpus else []
        command = ["apptainer", "exec", *nvidia, f"--bind={mounts}", site.container.image]
    return [*lines, f"CONTAINER=({_array(options)})", f"WITHIN=({_array(command)})"]


def _array(words: Sequence[str]) -> str:
    # A bare comma looks like a slip to shellcheck, and to people.
    return " ".join(f"'{w}'" if "," in w and shlex.quote(w) == w else shlex.quote(w) for w in words)


def _mounts(site: Site, *folders: Path) -> Iterator[str]:
    """Each once, those of the site first."""
    seen = set(site.container.mounts)
    yield from site.container.mounts
    for folder in (*folders, Path(site.scratch or "/tmp")):
        if set(":,") & set(str(folder)):
            raise SlurmUsageError(
                f"{folder} cannot be mounted in a container: its name holds a colon or a comma; "
                "choose another folder"
            )
        if (mount := f"{folder}:{folder}") not in seen:
            seen.add(mount)
            yield mount
