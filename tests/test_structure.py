"""The structure of the code: who may import whom, how long a line and a file may be, what stands at the top."""
import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TOP = {"kernels", "models", "train", "eval", "tests", "docs", ".ci", "run.py", "requirements.txt", "README.md",
       "LICENSE", ".gitignore", "pyproject.toml"}
ORDER = ("tests", "run", "eval", "train", "models", "kernels")  # each may import itself and what comes after it
OUTSIDE = {  # what a folder, or a file of it, may import beside the standard library
    "kernels": {"torch", "triton"},
    "models": {"torch", "torchvision", "numpy", "yaml", "safetensors"},
    "models.timm_models": {"torch", "timm"},  # optional: nothing of ours imports it
}
LATE = {  # what may be imported inside a function, and why
    "triton": "has no packages for macOS and Windows, where the CPU path works; so may our modules that import it",
    "matplotlib": "slow, and only plots need it",
    "faster_coco_eval": "only detection needs it",
    "resource": "not on Windows",
    "torchvision": "only detection needs it of the models",
    "datasets": "optional: only --data hf:... needs it",
    "timm": "optional: the bench of the input measures it where it is there",
    "safetensors": "optional, as its files are",
    "onnx": "optional: only `run.py export --format onnx` needs it and onnxruntime",
    "onnxruntime": "optional",
    "torch.utils.tensorboard": "needs tensorboard, which only --tensorboard needs",
}


def tracked(root):
    """Paths, relative to root, of the files that belong to the project."""
    if (root / ".git").exists():
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True, check=True).stdout
        return [Path(name) for name in listed.split("\0") if name and (root / name).exists()]
    return [path.relative_to(root) for path in root.rglob("*") if path.is_file() and "__pycache__" not in path.parts]


def imports(tree, package, modules):
    """Yields (module, whether inside a function) of a parsed file; package: its folder, ("eval",); modules: our own."""
    def visit(node, inside):
        if isinstance(node, ast.Import):
            yield from ((alias.name, inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[:len(package) + 1 - node.level] if node.level else ()
            base = ".".join([*above, *filter(None, [node.module])])
            for name in (f"{base}.{alias.name}" for alias in node.names):
                yield name if name in modules else base, inside
        inside = inside or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inside)

    return visit(tree, False)


def complaints(root):
    """[what is wrong with the imports of the project in this folder], each with file and module."""
    paths = [path for path in tracked(root) if path.suffix == ".py"]
    modules = {".".join(path.with_suffix("").parts).removesuffix(".__init__"): path for path in paths}
    graph = {name: list(imports(ast.parse((root / path).read_text()), path.parts[:-1], modules))
             for name, path in modules.items()}
    found = []
    for name, path in modules.items():
        folder = name.split(".")[0]
        outside = OUTSIDE.get(name, OUTSIDE.get(folder))
        for target, inside in graph[name]:
            top = target.split(".")[0]
            if folder in ORDER and top in ORDER and ORDER.index(top) < ORDER.index(folder):
                found.append(f"{path} imports {target}: an arrow that runs back")
            elif outside and top not in {*ORDER, *outside, *sys.stdlib_module_names}:
                found.append(f"{path} imports {target}: {folder} must do without")
            if name != target and target == "models.timm_models" and folder != "tests":
                found.append(f"{path} imports {target}, which needs timm")
            if inside and folder != "run" and not {top, target} & {*LATE} and not needs_triton(target, graph):
                found.append(f"{path} imports {target} inside a function")
    return [*dict.fromkeys(found), *(f"a cycle: {' -> '.join(cycle)}" for cycle in cycles(graph))]


def needs_triton(module, graph, seen=()):
    """Whether importing one of our modules imports triton."""
    return module not in seen and any(
        target.split(".")[0] == "triton" or needs_triton(target, graph, (*seen, module))
        for target, inside in graph.get(module, ()) if not inside)


def cycles(graph):
    """[[module, ..., the same module]], one for every import that closes a cycle."""
    found, finished = [], set()

    def visit(module, path):
        if module in path:
            found.append([*path[path.index(module):], module])
        elif module not in finished:
            for target in sorted({target for target, _ in graph.get(module, ())} - {module}):
                visit(target, [*path, module])
            finished.add(module)

    for module in sorted(graph):
        visit(module, [])
    return found


def test_imports_follow_the_plan():
    found = complaints(ROOT)
    assert not found, "\n".join(found)


@pytest.mark.parametrize("path, text, said", [
    ("models/a.py", "import eval.coco as c", ["models/a.py imports eval.coco: an arrow that runs back"]),
    ("models/a.py", "from train import x", ["models/a.py imports train: an arrow that runs back"]),
    ("models/a.py", "from train import loop as x", ["models/a.py imports train.loop: an arrow that runs back"]),
    ("models/a.py", "from ..train import loop", ["models/a.py imports train.loop: an arrow that runs back"]),
    ("eval/a.py", "import run", ["eval/a.py imports run: an arrow that runs back"]),
    ("train/a.py", "if True:\n    import tests.b", ["train/a.py imports tests.b: an arrow that runs back"]),
    ("train/a.py", "class A:\n    def f(self):\n        import eval", [
        "train/a.py imports eval: an arrow that runs back", "train/a.py imports eval inside a function"]),
    ("kernels/base.py", "from . import op", ["a cycle: kernels.base -> kernels.op -> kernels.base"]),
    ("kernels/a.py", "import numpy", ["kernels/a.py imports numpy: kernels must do without"]),
    ("models/a.py", "from timm.layers import Mlp", ["models/a.py imports timm.layers: models must do without"]),
    ("models/timm_models.py", "import numpy", ["models/timm_models.py imports numpy: models must do without"]),
    ("eval/a.py", "import models.timm_models", ["eval/a.py imports models.timm_models, which needs timm"]),
    ("train/loop.py", "from train import data", ["a cycle: train.data -> train.loop -> train.data"]),
    ("train/__init__.py", "import train.data", ["a cycle: train.data -> train -> train.data"]),
    ("eval/a.py", "def f():\n    import json", ["eval/a.py imports json inside a function"]),
    ("tests/a.py", "async def f():\n    from run import x", ["tests/a.py imports run inside a function"]),
])
def test_what_breaks_the_plan_is_named(tmp_path, path, text, said):
    fine = {
        "run.py": "def f():\n    from eval import coco",
        "eval/coco.py": "import numpy\nfrom train.data import x",
        "train/data.py": "import train\nfrom . import loop",
        "train/loop.py": "def f():\n    import kernels.tiles\n    import matplotlib.figure",
        "kernels/op.py": "from . import base\ndef f():\n    from triton import testing\n    from . import tiles",
        "kernels/base.py": "import torch",
        "kernels/tiles.py": "import torch, triton.language as tl",
        "tests/b.py": "import numpy\nimport run",
    }
    for name, content in fine.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    (tmp_path / "models").mkdir()
    assert complaints(tmp_path) == []
    (tmp_path / path).write_text(text)
    assert complaints(tmp_path) == said


def test_lines_and_files_have_a_length():
    texts = {path: (ROOT / path).read_text().splitlines() for path in tracked(ROOT) if path.suffix == ".py"}
    found = [f"{path}: {len(lines)} lines, at most 400" for path, lines in texts.items() if len(lines) > 400]
    found += [f"{path}:{number}: {len(line)} characters, at most 120" for path, lines in texts.items()
              for number, line in enumerate(lines, 1) if len(line) > 120]
    assert not found, "\n".join(found)


def test_ruff_passes():
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format=concise", ROOT]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="without git nobody knows which files belong to the project")
def test_nothing_else_stands_at_the_top():
    assert {path.parts[0] for path in tracked(ROOT)} <= TOP
