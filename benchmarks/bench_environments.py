"""Build the rivals' virtual environments from the pinned requirements in ``environments.toml``.

    python benchmarks/bench_environments.py --environments build/bench

An environment that already has these requirements is left alone; one that cannot be built is reported at the end.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
REQUIREMENTS = HERE / "environments.toml"
STAMP = "requirements.json"  # in an environment's folder: what it was built from


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """What a virtual environment holds.

    Attributes:
        requirements: pip's lines.
        removed: packages that they bring and that do harm.
    """

    requirements: tuple[str, ...]
    removed: tuple[str, ...] = ()

    @property
    def stamp(self) -> str:
        """Everything that a rebuild depends on."""
        return json.dumps([self.requirements, self.removed])


def python_of(environment: Path) -> Path:
    """Return where an environment's Python lies, be it there or not."""
    return environment / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def read_environments(path: Path = REQUIREMENTS) -> dict[str, Environment]:
    """Return the environments by name."""
    import tomllib  # from Python 3.11 on; only building needs it

    with path.open("rb") as file:
        tables = tomllib.load(file)
    return {name: Environment(**{key: tuple(lines) for key, lines in table.items()}) for name, table in tables.items()}


def build(folder: Path, environment: Environment) -> None:
    """Make an environment in ``folder`` unless it is there already.

    Raises:
        CalledProcessError: pip failed; what it said is on standard error.
    """
    stamp = folder / STAMP
    if stamp.exists() and stamp.read_text(encoding="utf-8") == environment.stamp:
        return
    venv.create(folder, with_pip=True)
    pip = [str(python_of(folder)), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", *environment.requirements], check=True)
    if environment.removed:
        subprocess.run([*pip, "uninstall", "--yes", *environment.removed], check=True)
    stamp.write_text(environment.stamp, encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environments", type=Path, default=Path("build/bench"), help="folder to build them in")
    parser.add_argument("names", nargs="*", help="which ones (default: all)")
    arguments = parser.parse_args()
    environments = read_environments()
    unknown = set(arguments.names) - set(environments)
    if unknown:
        parser.error(f"no environment {', '.join(sorted(unknown))}; there are {', '.join(environments)}")
    failed = []
    for name in arguments.names or environments:
        print(f"building {name}: {', '.join(environments[name].requirements)}", file=sys.stderr)
        try:
            build(arguments.environments / name, environments[name])
        except (subprocess.CalledProcessError, OSError) as error:
            failed.append(f"{name}: {error}")
    for line in failed:
        print(f"not built: {line}", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
