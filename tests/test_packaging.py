"""What is installed, what importing costs, and which way imports run.

pyproject.toml maps the three top-level folders to one import name, `sparse_layouts`.
Each checker here also has a test that shows it red.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {  # folder -> import name
    "sparse_layouts": "sparse_layouts",
    "dispatch": "sparse_layouts.dispatch",
    "kernels": "sparse_layouts.kernels",
}
IMPORT_LIMIT_MS = 150.0


def run_python(
    code: str, *arguments: str, path: list[Path], cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `code` in a new process that sees `path` first and neither this checkout nor a GPU."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, path)),
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONSAFEPATH": "1",  # `-c` would put the current folder first (Python 3.11 on)
    }
    environment.pop("TRITON_INTERPRET", None)
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed library has its bytecode
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=cwd or path[0],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def output_of(code: str, *arguments: str, path: list[Path], cwd: Path | None = None) -> str:
    done = run_python(code, *arguments, path=path, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# The list of packages


def project_table() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def packages_in_folders(root: Path) -> set[str]:
    """Import names of all folders that hold Python files, and of the three roots."""
    found = set(FOLDERS.values())
    for folder, package in FOLDERS.items():
        for file in (root / folder).rglob("*.py"):
            parts = file.parent.relative_to(root / folder).parts
            found.add(".".join([package, *parts]))
    return found


def test_pyproject_lists_every_package() -> None:
    listed = project_table()["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(packages_in_folders(ROOT)), (
        "a sub-package must be listed by hand under [tool.setuptools] packages in pyproject.toml"
    )


def test_a_forgotten_package_is_found(tmp_path: Path) -> None:
    new_op = tmp_path / "kernels" / "new_op"
    new_op.mkdir(parents=True)
    (new_op / "cpu.py").touch()
    assert "sparse_layouts.kernels.new_op" in packages_in_folders(tmp_path)


def test_kernels_folder_is_no_regular_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists(), (
        "with it, and the checkout on sys.path, `import kernels` is ours and not Hugging Face's"
    )


# The wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy: building in the checkout would reuse a stale build/lib."""
    if not has_distribution("pip"):  # finding its spec would replace distutils in this process
        pytest.skip("needs pip")
    version = importlib.metadata.version("setuptools") if has_distribution("setuptools") else "0"
    if int(version.split(".")[0]) < 77:
        pytest.skip(f"needs setuptools>=77 (found {version}): the wheel is built without network")
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    target = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-build-isolation", "--no-deps", "-w", str(target), str(source), cwd=target)
    (built,) = target.glob("sparse_layouts-*.whl")
    return built


def has_distribution(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def pip(*arguments: str, cwd: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--no-input", "--disable-pip-version-check", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A site folder with Hugging Face's `kernels` (a stand-in) and our wheel beside it."""
    site = tmp_path_factory.mktemp("site")
    (site / "kernels").mkdir()
    (site / "kernels" / "__init__.py").write_text('OWNER = "Hugging Face"\n')
    pip("install", "--no-deps", "--no-index", "--target", str(site), str(wheel), cwd=site)
    return site


def test_wheel_holds_our_name_only(wheel: Path) -> None:
    names = [name for name in zipfile.ZipFile(wheel).namelist() if not name.endswith("/")]
    tops = {name.split("/")[0] for name in names}
    assert "sparse_layouts" in tops
    assert all(top == "sparse_layouts" or top.endswith(".dist-info") for top in tops), tops


def test_wheel_holds_every_file(wheel: Path) -> None:
    expected = {"sparse_layouts/py.typed"}
    for folder, package in FOLDERS.items():
        for file in (ROOT / folder).rglob("*.py"):
            below = file.relative_to(ROOT / folder).as_posix()
            expected.add(f"{package.replace('.', '/')}/{below}")
    in_wheel = set(zipfile.ZipFile(wheel).namelist())
    assert expected == {name for name in in_wheel if name.startswith("sparse_layouts/")}


def test_installed_beside_hugging_face_kernels(installed: Path, tmp_path: Path) -> None:
    code = """
import kernels, sparse_layouts, sparse_layouts.dispatch, sparse_layouts.kernels
print(kernels.OWNER)
print(sparse_layouts.__file__)
print(sparse_layouts.dispatch.__file__)
print(list(sparse_layouts.kernels.__path__)[0])
"""
    owner, *files = output_of(code, path=[installed], cwd=tmp_path).splitlines()
    assert owner == "Hugging Face"
    assert [Path(file) for file in files] == [
        installed / "sparse_layouts" / "__init__.py",
        installed / "sparse_layouts" / "dispatch" / "__init__.py",
        installed / "sparse_layouts" / "kernels",
    ]


def test_version_is_the_installed_one(installed: Path, tmp_path: Path) -> None:
    code = """
import importlib.metadata, sparse_layouts
print(importlib.metadata.version("sparse_layouts") == sparse_layouts.__version__)
"""
    assert output_of(code, path=[installed], cwd=tmp_path) == "True"


def test_hugging_face_kernels_win_over_the_checkout(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text('OWNER = "Hugging Face"\n')
    code = "import kernels; print(getattr(kernels, 'OWNER', None), kernels.__file__ is None)"
    assert output_of(code, path=[ROOT, tmp_path]) == "Hugging Face False"


def test_checkout_imports_under_our_name(tmp_path: Path) -> None:
    code = """
import sparse_layouts, sparse_layouts.dispatch, sparse_layouts.kernels
print(sparse_layouts.dispatch.__file__)
print(list(sparse_layouts.kernels.__path__)[0])
"""
    files = output_of(code, path=[ROOT], cwd=tmp_path).splitlines()
    assert [Path(file) for file in files] == [ROOT / "dispatch" / "__init__.py", ROOT / "kernels"]


# What importing needs and costs

HEAVY = ["triton", "scipy", "matplotlib", "transformers", "IPython", "ipywidgets", "rich", "tqdm"]

IMPORT_WITHOUT = """
import importlib, importlib.abc, sys
name, heavy = sys.argv[1], set(sys.argv[2:])
import torch  # what torch itself brings is not ours
brought_by_torch = set(sys.modules)

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if fullname.split(".")[0] in heavy:
            raise ModuleNotFoundError(f"{fullname} is blocked by this test", name=fullname)

sys.meta_path.insert(0, Blocker())
importlib.import_module(name)
loaded = {module.split(".")[0] for module in set(sys.modules) - brought_by_torch} & heavy
assert not loaded, f"importing {name} brought {sorted(loaded)}"
assert not torch.cuda.is_initialized(), f"importing {name} started CUDA"
"""

IMPORT_MS = """
import importlib, sys, time
import torch
start = time.perf_counter()
importlib.import_module(sys.argv[1])
print((time.perf_counter() - start) * 1e3)
"""


def import_ms(module: str, path: Path, repeats: int = 7) -> float:
    """Milliseconds that importing `module` takes once torch is imported, the least of `repeats`.

    The least, because a loaded machine only ever adds; it stops at the first one under the limit.
    """
    least = float("inf")
    for _ in range(repeats):
        least = min(least, float(output_of(IMPORT_MS, module, path=[path])))
        if least < IMPORT_LIMIT_MS:
            break
    return least


@pytest.fixture
def other_library(tmp_path: Path) -> Path:
    """A folder with `heavy_library`, which imports matplotlib and takes its time."""
    (tmp_path / "matplotlib.py").touch()
    (tmp_path / "heavy_library.py").write_text("import matplotlib\n")
    (tmp_path / "slow_library.py").write_text("import time; time.sleep(0.2)\n")
    return tmp_path


def test_import_needs_nothing_heavy() -> None:
    done = run_python(IMPORT_WITHOUT, "sparse_layouts", *HEAVY, path=[ROOT])
    assert done.returncode == 0, done.stderr


def test_what_people_look_at_is_imported_when_asked_for() -> None:
    code = """
import sys, sparse_layouts as sl
assert not [name for name in sys.modules if name.startswith("sparse_layouts.viewing")]
from sparse_layouts import compare
assert sl.compare is compare and {"compare", "explore", "roofline"} <= set(sl.__all__)
try:
    sl.no_such_name
except AttributeError as error:
    print(error)
"""
    found = output_of(code, path=[ROOT])
    assert found == "module 'sparse_layouts' has no attribute 'no_such_name'"


def test_a_heavy_import_is_found(other_library: Path) -> None:
    done = run_python(IMPORT_WITHOUT, "heavy_library", *HEAVY, path=[other_library])
    assert done.returncode != 0
    assert "matplotlib is blocked by this test" in done.stderr


def test_import_is_fast() -> None:
    assert import_ms("sparse_layouts", ROOT) < IMPORT_LIMIT_MS


def test_a_slow_import_is_found(other_library: Path) -> None:
    assert import_ms("slow_library", other_library, repeats=2) >= IMPORT_LIMIT_MS


# Which way imports run: dispatch <- sparse_layouts/<layout>_tensor.py <- kernels/<op>/


def imported_names(source: str) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything that `source` imports, wherever the statement stands."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            start = "." * node.level + (node.module or "")
            for alias in node.names:
                yield node.lineno, start if alias.name == "*" else f"{start}.{alias.name}"


def is_below(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def is_implementation(base: str) -> bool:
    """Whether a file of an op computes: what checks operands or describes may know layouts."""
    return base.startswith(("reference", "cpu", "triton_", "hopper_", "tile_schedule"))


def wrong_imports(file: str, source: str) -> list[str]:
    """What `source`, at the path `file` below the root, may not import, and why."""
    folder, base = file.split("/")[0], file.split("/")[-1]
    errors = []
    for line, name in imported_names(source):
        ours = is_below(name, "sparse_layouts")
        why = None
        if name.startswith("."):
            why = "imports are absolute: two of the three folders are mapped"
        elif is_below(name, "kernels") or is_below(name, "dispatch"):
            why = f"the import name is sparse_layouts.{name}"
        elif folder == "dispatch" and ours and not is_below(name, "sparse_layouts.dispatch"):
            why = "dispatch knows torch and nothing of this library"
        elif (
            folder == "sparse_layouts"
            and base.endswith("_tensor.py")
            and (name == "sparse_layouts" or is_below(name, "sparse_layouts.kernels"))
        ):
            why = "a layout does not know the kernels; the op's folder imports the layout"
        elif folder == "kernels" and is_implementation(base) and ours and not is_module(name):
            why = "a kernel takes plain tensors; only what checks operands knows layouts"
        if why:
            errors.append(f"{file}:{line}: {name}: {why}")
    return errors


def is_module(name: str) -> bool:
    """Whether a kernel's file may import `name`: it lies in a module that is no layout.

    Names that `sparse_layouts` itself exports are layouts and their factories.
    """
    parts = name.split(".")
    if len(parts) < 2 or any(part.endswith("_tensor") for part in parts):
        return False
    return parts[1] in FOLDERS or (ROOT / "sparse_layouts" / f"{parts[1]}.py").is_file()


def python_files() -> list[str]:
    files = []
    for folder in [*FOLDERS, "tests", "benchmarks"]:
        files += [file.relative_to(ROOT).as_posix() for file in (ROOT / folder).rglob("*.py")]
    return sorted(files)


def test_imports_run_one_way() -> None:
    errors = []
    for file in python_files():
        errors += wrong_imports(file, (ROOT / file).read_text(encoding="utf-8"))
    assert not errors, "\n".join(errors)


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("dispatch/routes.py", "import sparse_layouts"),
        ("dispatch/routes.py", "from sparse_layouts import BSRTensor"),
        ("dispatch/routes.py", "def f():\n    from sparse_layouts.bsr_tensor import BSRTensor"),
        ("dispatch/routes.py", "import sparse_layouts.kernels.sddmm"),
        ("sparse_layouts/bsr_tensor.py", "import sparse_layouts.kernels.block_matmul as op"),
        ("sparse_layouts/bsr_tensor.py", "from sparse_layouts.kernels import block_matmul"),
        ("sparse_layouts/bsr_tensor.py", "from sparse_layouts import kernels"),
        ("sparse_layouts/bsr_tensor.py", "import sparse_layouts"),
        ("kernels/sddmm/cpu.py", "from sparse_layouts.bsr_tensor import BSRTensor"),
        ("kernels/sddmm/triton_sddmm.py", "import sparse_layouts.layout_tensor"),
        ("kernels/sddmm/reference.py", "from sparse_layouts import BSRTensor"),
        ("kernels/sddmm/reference.py", "import sparse_layouts as sl"),
        ("kernels/sddmm/__init__.py", "from kernels.sddmm import cpu"),
        ("sparse_layouts/info.py", "import dispatch"),
        ("tests/test_routes.py", "from dispatch.routes import route"),
        ("kernels/sddmm/__init__.py", "from . import cpu"),
        ("kernels/sddmm/__init__.py", "from .cpu import sddmm_cpu"),
    ],
)
def test_an_import_the_wrong_way_is_found(file: str, source: str) -> None:
    assert len(wrong_imports(file, source)) == 1


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("dispatch/routes.py", "import torch\nfrom sparse_layouts.dispatch import trace"),
        ("dispatch/routes.py", "from sparse_layouts import dispatch"),
        ("sparse_layouts/bsr_tensor.py", "from sparse_layouts.dispatch import route"),
        ("sparse_layouts/__init__.py", "import sparse_layouts.kernels.sddmm"),
        ("kernels/sddmm/__init__.py", "from sparse_layouts.bsr_tensor import BSRTensor"),
        ("kernels/sddmm/cpu.py", "from sparse_layouts.kernels.sddmm.reference import sddmm"),
        ("kernels/sddmm/cpu.py", "import kernels_elsewhere"),
    ],
)
def test_an_import_the_right_way_passes(file: str, source: str) -> None:
    assert wrong_imports(file, source) == []
