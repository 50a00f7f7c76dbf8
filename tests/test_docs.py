"""README and docs: commands compose, links lead somewhere, names and texts exist."""

import ast
import dataclasses
import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import yaml

import launch
from cogvx import compose as composing
from cogvx import config as configuration
from cogvx.config import GROUPS, SECTIONS
from cogvx.options.other_names import DIFFUSERS
from cogvx.records import record
from cogvx.runs import grid, translate
from cogvx.start import STARTS_BY_TASK

PROJECT = Path(__file__).parent.parent
DOCS = sorted((PROJECT / "docs").glob("*.md"))
PAGES = [PROJECT / "README.md", *DOCS, PROJECT / "cogvx" / "model" / "weights" / "README.md"]
TEXTS = {str(page.relative_to(PROJECT)): page.read_text(encoding="utf-8") for page in PAGES}

# Commands that no test composes or runs, by their first words, and why.
NOT_TRIED = {
    "pip install": "it changes the environment",
    "uv pip compile": "it asks a package registry",
    "pip-audit": "it asks for lists of known faults",
    "cp -r": "it copies weights that a day of training made",
    ".ci/run": "it runs all of this",
    "eval": "it changes the shell",
    "python launch.py -sc": "Hydra prints a shell's completion script",
}
# What README and docs name as missing. Whoever adds one of these rewrites the sentences about it.
MISSING = {
    "parallel=fsdp",
    "parallel=deepspeed_zero2",
}  # fmt: skip
# Plugins that README's command does not install.
ENGINES = {"slurm": "submitit", "submitit_slurm": "submitit", "ray": "ray", "ray_cluster": "ray"}


# -- reading the pages -----------------------------------------------------------------------------


def parts(text: str) -> tuple[list[str], list[str]]:
    """The lines of code blocks without a language, and the lines outside of all code blocks."""
    code, prose, inside, language = [], [], False, ""
    for line in text.splitlines():
        if line.startswith("```"):
            inside, language = not inside, line[3:].strip()
        elif not inside:
            prose.append(line)
        elif not language:
            code.append(line)
    return code, prose


def inline(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", "\n".join(parts(text)[1]))


def commands(text: str) -> list[str]:
    """What a reader may type: lines of code blocks, and inline code that begins like a command."""
    starts = ("python ", *(words for words in NOT_TRIED if not words.startswith("python")))
    lines = [part for line in parts(text)[0] for part in line.split(" && ")]
    return [line.strip() for line in [*lines, *inline(text)] if line.strip().startswith(starts)]


COMMANDS = {command: page for page, text in reversed(TEXTS.items()) for command in commands(text)}


def is_tried(command: str) -> bool:
    return not command.startswith(tuple(NOT_TRIED))


LAUNCHES = [c for c in COMMANDS if c.startswith("python launch.py") and is_tried(c)]
OTHERS = [c for c in COMMANDS if not c.startswith("python launch.py") and is_tried(c)]


# -- commands --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with the runs and the sweep that the pages speak of."""
    place = tmp_path_factory.mktemp("docs")
    for name in ("RUN", "bunny", "A", "B", "sweeps/NAME"):
        record.open_folder(composing.compose_config([f"output_dir='{place}/outputs/{name}'"]))
    return place


def test_the_pages_have_commands():
    assert len(PAGES) >= 12 and len(LAUNCHES) >= 60 and len(OTHERS) >= 8
    unused = [words for words in NOT_TRIED if not any(c.startswith(words) for c in COMMANDS)]
    assert unused == []


@pytest.mark.slow
@pytest.mark.parametrize("command", LAUNCHES)
def test_a_command_composes(command, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    arguments = without_missing_plugins(shlex.split(command, comments=True)[2:])
    for option in ("--help", "--cfg", "job", "hydra", "--package", "hydra.launcher"):
        if option in arguments:
            arguments.remove(option)
    translated = translate.translated(arguments, tmp_path)
    if translated.sweeping:
        compose_a_sweep(translated.overrides(), translated.composer)
    else:
        composing.checked(translated.composer.compose(translated.overrides()))


def compose_a_sweep(overrides: list[str], composer: grid.Composer) -> None:
    """Its first and its last job; tests/runs/ composes all jobs of the sweeps with a name."""
    for each in grid.grids_of(overrides, composer):
        assert each.swept
        for end in (0, -1):
            if any(
                o.is_sweep_override() and not o.is_discrete_sweep() for o in each.swept.values()
            ):
                values = grid.examples(each.swept, next(iter(each.swept)))
            else:
                values = each.values()
            grid.composed_jobs(
                [(each.fixed, {key: [v[end]] for key, v in values.items()})], composer
            )


@pytest.mark.slow
def test_tasks_that_only_read_start(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    assert set(STARTS_BY_TASK) == set(GROUPS["task"].values())
    for arguments in (["task=list"], ["task=compare", "task.runs=[outputs/A,outputs/B]"]):
        assert launch.entry(arguments) == 0
    printed = capsys.readouterr().out
    assert "RUN" in printed and "outputs/compare_A_B.html" in printed


def without_missing_plugins(arguments: list[str]) -> list[str]:
    """Without the settings of an engine whose package is not installed."""
    chosen = [a.partition("=")[2] for a in arguments if a.startswith("hydra/launcher=")]
    if not chosen or importlib.util.find_spec(ENGINES.get(chosen[0], "cogvx")):
        return arguments
    return [
        a for a in arguments if not a.lstrip("+").startswith(("hydra/launcher", "hydra.launcher"))
    ]


@pytest.mark.parametrize("command", OTHERS)
def test_a_command_names_files_that_exist(command):
    words = shlex.split(command, comments=True)
    assert words[0] == "python"
    if words[1] == "-m" and words[2] != "pytest":
        assert importlib.util.find_spec(words[2]) is not None
    files = [word for word in words[1:] if word.startswith(("tests/", "cogvx/"))]
    assert all((PROJECT / file).exists() for file in files)
    assert files or (words[1] == "-m" and words[2] in ("pytest", "http.server"))


def test_the_first_two_commands_are_those_of_ci():
    first = TEXTS["README.md"].split("```")[1].split("\n")[1:3]
    assert first == [
        "pip install -r requirements.txt && python launch.py",
        "python -m pytest",
    ]


# -- names -----------------------------------------------------------------------------------------


def keys() -> set[str]:
    sections = [(group, c) for group, options in GROUPS.items() for c in options.values()]
    sections += SECTIONS.items()
    found = {f"{name}.{field.name}" for name, c in sections for field in dataclasses.fields(c)}
    for name in ("launcher", "sweeper"):
        for path in (configuration.CONF / "hydra" / name).glob("*.yaml"):
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
            found |= {f"hydra.{name}.{key}" for key in values}
    return found


KEYS = keys()
SECTION_NAMES = "|".join([*GROUPS, *SECTIONS, "hydra.launcher", "hydra.sweeper"])


@pytest.mark.parametrize("page", TEXTS)
def test_every_setting_that_a_page_names_exists(page):
    code = [*parts(TEXTS[page])[0], *inline(TEXTS[page])]
    named = {
        match
        for line in code
        for match in re.findall(rf"(?<![\w./-])((?:{SECTION_NAMES})\.[a-z_0-9]+)\b(?![(/])", line)
        if not match.endswith((".py", ".yaml"))
    }
    of_plugins = {"hydra.launcher.partition", "hydra.launcher.ray"}
    assert named - KEYS - of_plugins == set()


@pytest.mark.parametrize("page", TEXTS)
def test_every_option_that_a_page_names_exists_or_is_named_as_missing(page):
    groups = "|".join([*GROUPS, "experiment", "sweep"])
    for line in [*parts(TEXTS[page])[0], *inline(TEXTS[page])]:
        for group, option in re.findall(rf"(?<![\w./-])({groups})=([a-z0-9][a-z_0-9]*)", line):
            assert option in options_of(group) or f"{group}={option}" in MISSING, line


def options_of(group: str) -> list[str]:
    if group in GROUPS:
        return list(GROUPS[group])
    folder = PROJECT / "sweeps" if group == "sweep" else configuration.CONF / group
    return [path.stem for path in folder.glob("*.yaml")]


def test_what_is_named_as_missing_is_missing_and_named():
    there = {f"{group}={option}" for group, options in GROUPS.items() for option in options}
    assert there & MISSING == set()
    assert [name for name in MISSING if f"`{name}`" not in TEXTS["README.md"]] == []


def test_every_option_stands_on_the_page_of_settings():
    rows = {
        row.split("`")[1]: row
        for row in parts(TEXTS["docs/settings.md"])[1]
        if row.startswith("| `")
    }
    absent = []
    for path in sorted(configuration.CONF.glob("*/**/*.yaml")):
        group = str(path.parent.relative_to(configuration.CONF))
        if f"`{path.stem}`" not in rows[group]:
            absent.append(f"{group}={path.stem}")
    assert absent == []
    for path in (PROJECT / "sweeps").glob("*.yaml"):
        assert f"`{path.stem}`" in TEXTS["docs/sweeps.md"]


def test_every_key_of_the_main_yaml_is_explained_beside_it_or_on_the_page_of_settings():
    lines = (configuration.CONF / "config.yaml").read_text(encoding="utf-8").splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("seed:"))
    end = next(number for number, line in enumerate(lines) if line.startswith("hydra:"))
    section, unexplained = "", []
    for before, line in zip(lines[start - 1 : end], lines[start:end], strict=False):
        key = re.match(r"( *)(\w+):", line)
        if key is None:
            continue
        section = key[2] if not key[1] else section
        name = f"{section}.{key[2]}" if key[1] else key[2]
        explained = "#" in line or before.strip().startswith("#")
        if not explained and name not in SECTIONS and f"`{name}`" not in TEXTS["docs/settings.md"]:
            unexplained.append(name)
    assert unexplained == []


# -- links and form --------------------------------------------------------------------------------


def slug(heading: str) -> str:
    """As GitHub makes anchors of headings."""
    plain = re.sub(r"[^\w\- ]", "", heading.lower())
    return plain.strip().replace(" ", "-")


def links(page: Path) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", [*PAGES, PROJECT / "sweeps" / "README.md"], ids=str)
def test_every_link_leads_somewhere(page):
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = page if not path else page.parent / path
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in map(slug, headings), link


def test_the_readme_is_short_and_leads_to_every_page():
    assert len(TEXTS["README.md"].splitlines()) <= 120
    linked = {link.partition("#")[0] for link in links(PROJECT / "README.md")}
    assert {f"docs/{page.name}" for page in DOCS} - linked == set()


@pytest.mark.parametrize("page", TEXTS)
def test_lines_of_prose_are_at_most_100_columns(page):
    long = [line for line in parts(TEXTS[page])[1] if len(line) > 100]
    assert [line for line in long if not line.startswith(("|", "!["))] == []


# -- pages beside the code -------------------------------------------------------------------------


def rows_of_table(page: str) -> list[list[str]]:
    lines = [line for line in parts(TEXTS[page])[1] if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_page_of_flags_is_the_table_that_answers_them():
    """The flags of both scripts in examples/cogvideo of diffusers 0.39.0.dev0 are 64 and 3 more."""
    page = [row for row in rows_of_table("docs/from_diffusers.md") if row[0].startswith("`--")]
    table = [
        [f"`--{flag}`", "none" if other.ours is None else f"`{other.ours}`", other.note]
        for flag, other in DIFFUSERS.items()
    ]
    assert len(table) >= 67 and page == table
    for flag, other in DIFFUSERS.items():
        ours = (other.ours or "seed").partition("=")[0]
        assert ours in {*KEYS, *GROUPS, "seed", "output_dir"}, flag
        assert other.ours is not None or other.note, flag


def templates() -> list[str]:
    """Every text of the program, with one mark for each value that is put into it."""
    files = [PROJECT / "launch.py", *sorted((PROJECT / "cogvx").rglob("*.py"))]
    found = []
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                pieces = [v.value if isinstance(v, ast.Constant) else "\0" for v in node.values]
                found.append("".join(pieces))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


@pytest.mark.parametrize("page", TEXTS)
def test_every_file_of_the_program_that_a_page_names_exists(page):
    named = re.findall(r"(?<![\w./])([a-z_]+(?:/[a-z0-9_]+)+\.(?:py|yaml|sh|txt))\b", TEXTS[page])
    named = [name for name in named if not name.startswith(("outputs/", "videos/"))]
    absent = [
        name
        for name in named
        if not ((PROJECT / name).exists() or (PROJECT / "cogvx" / name).exists())
    ]
    assert absent == []


def test_every_function_that_a_page_names_exists():
    defined = {
        node.name
        for path in (PROJECT / "cogvx").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }
    named = set(re.findall(r"\b([a-z_]+)\(", TEXTS["docs/how_it_works.md"]))
    assert len(named) >= 8
    assert named - defined - {"backward", "step", "build"} == set()


@pytest.mark.slow
def test_the_texts_on_the_page_of_errors_are_the_programs():
    """`...` stands for a value that differs from case to case."""
    quoted = [row[0].strip("`") for row in rows_of_table("docs/errors.md") if "`" in row[0]]
    known = templates()
    absent = [
        text
        for text in quoted
        if not any(all(p.strip() in k for p in text.split("...") if p.strip()) for k in known)
    ]
    assert len(quoted) >= 25 and absent == []
