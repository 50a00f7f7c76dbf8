"""What the project says about itself: its dependencies, and its benchmarks."""

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import warm
from settings import LONG_FILES

PROJECT = Path(__file__).parent.parent
BENCHMARKS = PROJECT / "tests" / "benchmarks"
BATTERY = PROJECT / "tests" / "gpu"
SOURCES = [
    PROJECT / "launch.py",
    *sorted((PROJECT / "cogvx").rglob("*.py")),
    *sorted((PROJECT / "tests").rglob("*.py")),
]
PROGRAMS = [
    path.stem
    for path in [*sorted(BENCHMARKS.glob("*.py")), *sorted(BATTERY.glob("*.py"))]
    if not path.stem.startswith("test_")
]
# Packages whose absence a message names with what installs them.
OPTIONAL = {"trackio", "vbench"}
# Needed without an import of ours.
NOT_IMPORTED = {"protobuf", "pytest-xdist", "ruff"}
sys.path += [str(BENCHMARKS), str(BATTERY)]

import mutations  # noqa: E402


def normal(name: str) -> str:
    """The name of a package without version, extras and spelling (PEP 503)."""
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", name)[0]).lower()


def named() -> set[str]:
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return {normal(n) for n in project["dependencies"] + project["optional-dependencies"]["dev"]}


def imported(path: Path) -> set[str]:
    """The top-level modules that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.partition(".")[0])
    return found


@pytest.mark.slow
def test_every_package_that_is_imported_is_named_in_pyproject():
    assert len(SOURCES) >= 100
    ours = {path.stem for path in SOURCES} | {"cogvx"}
    modules = set().union(*map(imported, SOURCES)) - sys.stdlib_module_names - ours - OPTIONAL
    provided = metadata.packages_distributions()
    installed = {normal(name) for names in provided.values() for name in names}
    if missing := named() - installed - NOT_IMPORTED:
        pytest.skip(f"not installed: {', '.join(sorted(missing))}")
    packages = {module: {normal(name) for name in provided[module]} for module in modules}
    assert len(packages) >= 25
    # imageio[ffmpeg] brings imageio_ffmpeg.
    known = named() | {"imageio-ffmpeg"}
    assert {m: names for m, names in packages.items() if not names & known} == {}
    assert named() - set().union(*packages.values()) == NOT_IMPORTED


def test_the_files_that_run_first_exist():
    assert LONG_FILES
    assert all((PROJECT / "tests" / path).is_file() for path in LONG_FILES)


def test_requirements_pin_what_pyproject_names():
    lines = (PROJECT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert "uv pip compile pyproject.toml --extra dev -o requirements.txt" in lines[1]
    pinned = {normal(line) for line in lines if not line.startswith("#")}
    assert len(pinned) >= 100 and named() - pinned == set()


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_beside_the_tests_can_be_imported(program):
    """It is not run here, but every name that it takes from cogvx exists."""
    assert len(PROGRAMS) >= 15
    importlib.import_module(program)


@pytest.mark.parametrize("mistake", mutations.MISTAKES[1:], ids=lambda mistake: mistake.what)
def test_a_mutation_finds_its_code_once(mistake):
    assert len(mutations.MISTAKES) >= 5
    text = (PROJECT / mistake.file).read_text(encoding="utf-8")
    assert text.count(mistake.right) == 1, f"{mistake.file} has changed: {mistake.right}"
    assert mistake.wrong != mistake.right


def test_a_forked_launch_writes_its_log_to_no_open_file(tmp_path):
    # A forked process has a logger of pytest whose descriptor may be any new file's.
    code = (
        "import logging\n"
        f"files = [open(rf'{tmp_path}/{{number}}', 'w') for number in range(60)]\n"
        "logging.getLogger('of a library').warning('a word')\n"
        "[file.close() for file in files]\n"
    )
    process = warm.python("-c", code, stderr=subprocess.PIPE, text=True)
    assert process.communicate()[1] == "a word\n" and process.returncode == 0
    assert {path.read_text() for path in tmp_path.iterdir()} == {""}
