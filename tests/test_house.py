"""The house: settings below, doing above. Read from the files' own imports, lazy ones included."""

import ast
from pathlib import Path

PROJECT = Path(__file__).parent.parent
# From top to bottom. A file may import from its own room and from the rooms below it.
ROOMS = [
    "runs",
    "start",
    "evaluation",
    "plan",
    "training",
    "inference",
    "export",
    "records",
    "command_line",
    "compose",
    "config",
    "wording",
    "rules",
    "groups",
    "model",
    "data",
    "options",
    "hub_upload",
    "hub_client",
    "hub_digests",
    "files",
    "errors",
    "progress",
    "libraries",
    "leaving",
]
WITHOUT_TORCH = {
    *("records", "command_line", "compose", "config", "wording", "rules", "groups", "options"),
    *(
        "hub_upload",
        "hub_client",
        "hub_digests",
        "files",
        "errors",
        "start",
        "libraries",
        "leaving",
    ),
}
KNOW_HYDRA = {"compose", "config", "runs.grid", "runs.engines"}
FILES = {
    ".".join(path.relative_to(PROJECT).with_suffix("").parts): path
    for path in sorted((PROJECT / "cogvx").rglob("*.py"))
}


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else module


def imports(tree: ast.AST) -> list[str]:
    """Every module that is named after `import` or `from`, wherever in the file it stands."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [name if name in FILES else node.module for name in names]
    return found


TREES = {module: ast.parse(path.read_text(encoding="utf-8")) for module, path in FILES.items()}
ARROWS = {
    module: sorted({name for name in imports(tree) if name in FILES and name != module})
    for module, tree in TREES.items()
}


def test_every_room_is_on_the_list():
    assert len(FILES) >= 60 and sum(map(len, ARROWS.values())) >= 150
    assert {room_of(module) for module in FILES} - {"cogvx", "__init__"} == set(ROOMS)


def test_no_import_points_up():
    up = [
        f"{module} imports {other}"
        for module, others in ARROWS.items()
        for other in others
        if room_of(other) in ROOMS
        and room_of(module) in ROOMS
        and ROOMS.index(room_of(other)) < ROOMS.index(room_of(module))
    ]
    assert up == []


def test_no_files_import_each_other_in_a_circle():
    assert circles(ARROWS) == []
    assert circles({"a": ["b"], "b": ["c"], "c": ["a"]}) == ["a -> b -> c -> a"]


def circles(arrows: dict[str, list[str]]) -> list[str]:
    found, done = [], set()

    def follow(module: str, way: list[str]) -> None:
        for other in arrows.get(module, []):
            if other in way:
                found.append(" -> ".join([*way[way.index(other) :], other]))
            elif other not in done:
                done.add(other)
                follow(other, [*way, other])

    for module in arrows:
        if module not in done:
            done.add(module)
            follow(module, [module])
    return found


def test_settings_and_records_do_not_import_torch_when_they_are_loaded():
    wrong = []
    for module, tree in TREES.items():
        if room_of(module) not in WITHOUT_TORCH:
            continue
        for name in imports(ast.Module([each for each in tree.body if not is_lazy(each)], [])):
            if name.partition(".")[0] in ("torch", "diffusers", "transformers", "accelerate"):
                wrong.append(f"{module} imports {name}")
    assert wrong == []


def is_lazy(node: ast.stmt) -> bool:
    """A function's body is run later; `if TYPE_CHECKING:` never."""
    if isinstance(node, ast.If):
        return ast.unparse(node.test) == "TYPE_CHECKING"
    return isinstance(node, ast.FunctionDef | ast.ClassDef)


def test_few_files_know_hydra():
    know = {
        module.removeprefix("cogvx.")
        for module, tree in TREES.items()
        if any(name.partition(".")[0] in ("hydra", "omegaconf") for name in imports(tree))
    }
    assert know == KNOW_HYDRA


def test_one_place_chooses_between_lora_and_full_weights():
    """Others ask an object of model/trained_weights.py. The rules speak of the setting itself."""
    asking = {module for module, tree in TREES.items() if asks_whether_lora_is_none(tree)}
    assert asking <= {"cogvx.config", "cogvx.rules", "cogvx.compose"}
    for line in ("config.lora is None", "composed.lora is not None", "not config.lora"):
        assert asks_whether_lora_is_none(ast.parse(line))


def asks_whether_lora_is_none(tree: ast.AST) -> bool:
    for node in ast.walk(tree):
        asked = None
        if isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.Is | ast.IsNot):
            asked = node.left
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            asked = node.operand
        elif isinstance(node, ast.If | ast.IfExp):
            asked = node.test
        if isinstance(asked, ast.Attribute) and asked.attr == "lora":
            return True
    return False


def test_one_place_says_which_process_acts_for_all():
    asking = {
        module
        for module, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr == "is_main_process"
    }
    assert asking == {"cogvx.training.ranks"}


def test_one_name_means_one_thing():
    """No two files, and no two top-level classes, functions or constants, have the same name."""
    places = {}
    for module, tree in TREES.items():
        if module.endswith("__init__"):
            continue
        for name in [f"{module.rpartition('.')[2]}.py", *top_level_names(tree)]:
            places.setdefault(name, []).append(module)
    assert len(places) >= 600
    assert {name: where for name, where in places.items() if len(where) > 1} == {}


def top_level_names(tree: ast.Module) -> list[str]:
    found = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.append(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found += [target.id for target in targets if isinstance(target, ast.Name)]
    return found
