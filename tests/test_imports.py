"""Each room (top-level module or package) of hftlight imports only earlier rooms, inside functions too."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src"
GROUND = [
    "errors",
    "files",
    "folders",
    "take",
    "provenance",
    "cache",
    "builtin_models",
    "model_files",
    "config",
    "console",
    "registry",
]
ROOMS = [
    *[[name] for name in GROUND],
    *(["engine"], ["data"], ["models"], ["evaluation"], ["defenses", "attacks"], ["search", "report"]),
    *(["runs"], ["analysis", "comparison", "tuning"], ["cli"], ["__main__"]),
]


def graph():
    """Return module -> modules that it imports. A package's name stands for its ``__init__``."""
    files = {".".join(p.relative_to(SOURCE).with_suffix("").parts): p for p in SOURCE.rglob("*.py")}
    files = {name.removesuffix(".__init__"): path for name, path in files.items()}
    imports = {}
    for name, path in files.items():
        targets = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                # ``from package import name`` imports ``package.name`` if that is a module, else ``package``.
                inner = {f"{node.module}.{alias.name}" for alias in node.names}
                targets |= (inner & set(files)) or {node.module}
            elif isinstance(node, ast.Import):
                targets |= {alias.name for alias in node.names}
        imports[name] = targets & set(files) - {name, "hftlight"}
    return imports


def test_no_circle():
    TopologicalSorter(graph()).prepare()


def test_rooms_import_rooms_before_their_own():
    place = {room: number for number, rooms in enumerate(ROOMS) for room in rooms}
    room = {name: name.split(".")[1] for name in graph() if "." in name}
    wrong = [
        f"{name} imports {other}"
        for name, targets in graph().items()
        for other in targets
        if name in room and room[name] != room[other] and place[room[name]] <= place[room[other]]
    ]
    assert not wrong, wrong


def test_a_name_is_imported_from_the_module_that_defines_it():
    """Only a package may re-export names that other modules define."""
    wrong = []
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            file = SOURCE.joinpath(*(getattr(node, "module", None) or "-").split(".")).with_suffix(".py")
            if isinstance(node, ast.ImportFrom) and file.is_file():
                borrowed = {
                    alias.asname or alias.name
                    for statement in ast.parse(file.read_text(encoding="utf-8")).body
                    if isinstance(statement, ast.ImportFrom)
                    for alias in statement.names
                }
                wrong += [f"{path.name} takes {a.name} from {node.module}" for a in node.names if a.name in borrowed]
    assert not wrong, wrong
