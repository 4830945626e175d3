"""Who may import whom: no circle, no folder that needs a command, no room that is too large."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
COMMANDS = {"train", "predict", "evaluate", "prepare", "explore"}
FOLDERS = ("training", "evaluation", "exploration", "scans", "participants")
MAX_LINES = 650


def rooms() -> dict[str, Path]:
    """Every module of the product by its dotted name."""
    paths = [p for name in ("", *FOLDERS, "assets") for p in (ROOT / name).glob("*.py")]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in paths}


def imports() -> dict[str, set[str]]:
    """The modules of the product that each of them imports, anywhere in its text."""
    found: dict[str, set[str]] = {}
    for name, path in rooms().items():
        wanted = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                wanted |= {alias.name for alias in node.names}
            if isinstance(node, ast.ImportFrom) and node.module:
                wanted |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        found[name] = wanted & rooms().keys()
    return found


def test_no_file_is_part_of_a_circle():
    TopologicalSorter(imports()).prepare()


def folder_of(name: str) -> str:
    """The folder of a module, or the module itself; each script in assets/ is a command."""
    folder, _, _ = name.partition(".")
    return folder if folder in FOLDERS else name


def test_no_folder_is_part_of_a_circle():
    arrows: dict[str, set[str]] = {}
    for name, wanted in imports().items():
        others = {folder_of(other) for other in wanted} - {folder_of(name)}
        arrows.setdefault(folder_of(name), set()).update(others)
    TopologicalSorter(arrows).prepare()


def test_nothing_imports_a_command():
    assert not {name: wanted & COMMANDS for name, wanted in imports().items() if wanted & COMMANDS}


def test_no_room_is_too_large():
    assert max(len(path.read_text().splitlines()) for path in rooms().values()) <= MAX_LINES


# What takes long to import is imported where it is used: --help answers within 2.5 seconds
HEAVY = ("torchvision", "sklearn", "umap", "tensorboard", "scipy.signal", "scipy.stats")
HEAVY += ("matplotlib", "torch._dynamo", "torch.utils.tensorboard", "torchmetrics", "timm")
LISTED = """
import sys
import train, predict, evaluate, explore
print([name for name in {heavy} if name in sys.modules])
import prepare
print([name for name in {heavy} if name in sys.modules])
"""


def test_no_command_imports_what_is_slow_to_import_before_it_needs_it():
    """One process looks at the first four commands, then at prepare, which may have nibabel."""
    script = LISTED.format(heavy=(*HEAVY, "nibabel"))
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[0] == "[]"
    assert done.stdout.splitlines()[1] in ("[]", "['nibabel']")
