"""The wheel: everything that the program needs is in it, and it runs from there alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("hatchling", reason="`make install` brings it")
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(folder), str(CHECKOUT))
    [built] = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel's content and nothing else of ours."""
    target = tmp_path_factory.mktemp("installed")
    pip("install", "--no-deps", "--no-index", "--no-compile", "--target", str(target), str(wheel))
    return target


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, timeout=60)


def run_installed(installed: Path, *arguments: str) -> str:
    """Python in another folder, to which only the installed copy is known (the checkout's is last on its path)."""
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(installed),
        "LLAMARUNNER_HOME": str(installed / "home"),
    }
    done = subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        cwd=installed,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_holds_what_the_checkout_holds(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    ours = {
        str(path.relative_to(CHECKOUT))
        for package in ("llamarunner", "tui")
        for pattern in ("*.py", "*.tcss")
        for path in (CHECKOUT / package).rglob(pattern)
    }
    themes = {f"tui/themes/{path.name}" for path in (CHECKOUT / "themes").glob("*.toml")}
    assert len(themes) >= 3
    wanted = ours | themes | {"llamarunner/config/config.toml.example"}
    assert not wanted - names
    extra = {name for name in names - wanted if ".dist-info/" not in name}
    assert not extra


def test_its_metadata_lead_to_the_program_and_the_license(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        [scripts] = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
        assert "llamarunner = llamarunner.cli:main" in archive.read(scripts).decode()
        assert any("/licenses/LICENSE" in name for name in archive.namelist())


def test_the_installed_program_says_its_version(installed: Path) -> None:
    where = run_installed(installed, "-c", "import llamarunner, tui; print(llamarunner.__file__, tui.__file__)")
    assert where.split() == [str(installed / name / "__init__.py") for name in ("llamarunner", "tui")]
    from llamarunner import __version__

    assert run_installed(installed, "-m", "llamarunner", "--version") == f"llamarunner {__version__}\n"
    program = installed / "bin" / "llamarunner"
    assert run_installed(installed, str(program), "--version") == f"llamarunner {__version__}\n"


def test_the_installed_control_center_finds_its_themes(installed: Path) -> None:
    script = (
        "from tui.theme import load_themes, shipped_themes\n"
        "found = load_themes([shipped_themes()])\n"
        "print(shipped_themes())\n"
        "print(*sorted(theme.name for theme in found.loaded))\n"
        "print(*found.failed)\n"
    )
    folder, names, failed = run_installed(installed, "-c", script).split("\n")[:3]
    assert Path(folder) == installed / "tui" / "themes"
    assert {"llamarunner", "llamarunner-light", "high-contrast"} <= set(names.split())
    assert not failed


def test_the_installed_example_is_a_good_configuration(installed: Path) -> None:
    example = installed / "llamarunner" / "config" / "config.toml.example"
    assert example.read_bytes() == (CHECKOUT / "config.toml.example").read_bytes()
    said = run_installed(installed, "-m", "llamarunner", "check", "--config", str(example))
    assert "the configuration is good" in said


class TestInstall:
    """`scripts/install` on machines that lack something: a clear word, a remedy, and nothing counted as done."""

    @pytest.fixture
    def copy(self, tmp_path: Path) -> Path:
        """What it reads of a checkout, on a machine with these few programs and no Python."""
        checkout, programs = tmp_path / "checkout", tmp_path / "bin"
        for name in ("scripts/install", "pyproject.toml", "requirements.lock", "demo/models.txt"):
            (checkout / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(CHECKOUT / name, checkout / name)
        (checkout / "llamarunner").mkdir()
        shutil.copy(CHECKOUT / "llamarunner" / "__init__.py", checkout / "llamarunner")
        programs.mkdir()
        for name in ("sh", "cat", "cksum", "dirname", "rm"):
            (programs / name).symlink_to(shutil.which(name) or name)
        return checkout

    @staticmethod
    def python(copy: Path, name: str, *, lacking: str) -> None:
        """A Python of that name that works, but for programs in which `lacking` occurs."""
        program = copy.parent / "bin" / name
        program.write_text(f'#!/bin/sh\ncase "$*" in *{lacking}*) exit 1;; esac\nexec {sys.executable} "$@"\n')
        program.chmod(0o755)

    @staticmethod
    def install(copy: Path) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": str(copy.parent / "bin"), "HOME": str(copy.parent), "PIP_NO_INDEX": "1"}
        return subprocess.run(
            ["sh", "scripts/install"],
            cwd=copy,
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def test_no_python_at_all(self, copy: Path) -> None:
        done = self.install(copy)
        assert done.returncode != 0
        assert "no Python 3.11 to 3.14 was found (python3 is missing)" in done.stderr
        assert "sudo apt install python3 python3-venv" in done.stderr
        assert not (copy / ".venv").exists()

    def test_a_python_that_is_too_old(self, copy: Path) -> None:
        self.python(copy, "python3", lacking="version_info")
        done = self.install(copy)
        assert done.returncode != 0
        assert "no Python 3.11 to 3.14 was found (python3 is Python 3." in done.stderr
        assert not (copy / ".venv").exists()

    def test_a_python_without_its_venv_module(self, copy: Path) -> None:
        self.python(copy, "python3.13", lacking="ensurepip")
        done = self.install(copy)
        assert done.returncode != 0
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        assert f"sudo apt install python{version}-venv" in done.stderr
        assert not (copy / ".venv").exists()

    def test_one_that_was_cut_short_does_not_count(self, copy: Path) -> None:
        """Here the dependencies cannot be fetched: each time it is tried again, in the environment made already."""
        self.python(copy, "python3", lacking="no-such-thing")
        first, second = self.install(copy), self.install(copy)
        assert "making .venv" in first.stdout
        assert "making .venv" not in second.stdout
        for done in (first, second):
            assert done.returncode != 0
            assert "installing the dependencies" in done.stdout
        assert not (copy / ".venv" / ".installed").exists()
