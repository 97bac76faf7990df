"""The shape of the project: layout, what an import does, names, and the budgets of the style guide."""

import ast
import json
import re
import statistics
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import pytest

import hf_longattn
from hf_longattn import requirements

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hf_longattn"
COMMANDS = ROOT / "hf_longattn_cli.py"
MODULES = [*sorted(PACKAGE.rglob("*.py")), COMMANDS]
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
BLOCKS = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith, ast.Try, ast.Match)


def tracked_files():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


def python(code, path=()):
    """Runs code in a fresh interpreter and returns what it printed, read as JSON."""
    setup = f"import json, sys; sys.path[:0] = {[str(p) for p in path]!r}\n"
    result = subprocess.run([sys.executable, "-c", setup + code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


# Layout


@pytest.mark.parametrize("name", ["kernels", "modeling"])
def test_root_links(name):
    link, folder = ROOT / name, PACKAGE / name
    assert link.is_symlink() and link.resolve() == folder.resolve()
    assert not link.readlink().is_absolute()
    assert not (folder / "__init__.py").exists(), "it would hide the package of that name from transformers"


def imported_names(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module


def test_nothing_is_imported_through_the_root_links():
    sources = [path for path in tracked_files() if path.suffix == ".py"] + MODULES
    through = {
        (str(p), name)
        for p in sources
        for name in imported_names(p)
        if name.split(".")[0] in ("kernels", "modeling")
    }
    assert not through


LAYERS = ["kernels", "masking|cache", "parallel", "attention",
          "instance|fusion|branches|generation|training|modeling", "registration|cli"]  # fmt: skip


def layer(module):
    part = module.split(".")[1] if "." in module else ""
    return next((i for i, names in enumerate(LAYERS) if re.fullmatch(names, part)), None)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path):
    own = layer(".".join(path.relative_to(ROOT).with_suffix("").parts))
    names = set(imported_names(path))
    if own is not None:
        upward = {name for name in names if name.startswith("hf_longattn.") and (layer(name) or 0) > own}
        assert not upward
    if own == 0:
        assert not {name for name in names if name.split(".")[0] == "transformers"}


# What an import does


def test_transformers_does_not_take_our_folder_for_the_kernels_package():
    code = "from transformers.utils import is_kernels_available as f; print(json.dumps(bool(f())))"
    assert python(code, [ROOT]) == python(code)


def test_import_touches_nothing_but_the_registries():
    code = """
import os, inspect
import torch, transformers
from transformers import PreTrainedModel, GenerationMixin, cache_utils, masking_utils, modeling_utils
owners = [PreTrainedModel, GenerationMixin, masking_utils, modeling_utils, torch.nn.Module]
owners += [c for _, c in inspect.getmembers(cache_utils, inspect.isclass)]
def state():
    return {(str(o), n): id(v) for o in owners for n, v in vars(o).items() if callable(v)}
environment, before, had_triton = dict(os.environ), state(), 'triton' in sys.modules
import hf_longattn
after = state()
names = ('tree_attention', 'blockwise_attention')
print(json.dumps({
    'environment': dict(os.environ) == environment,
    'patched': [str(k) for k in before if after.get(k) != before[k]],
    'triton': 'triton' in sys.modules and not had_triton,
    'cuda': torch.cuda.is_initialized(),
    'attention': [n in transformers.AttentionInterface().valid_keys() for n in names],
    'mask': [n in transformers.AttentionMaskInterface().valid_keys() for n in names],
}))
"""
    found = python(code)
    assert found == {
        "environment": True, "patched": [], "triton": False, "cuda": False, "attention": [True, True],
        "mask": [True, True],
    }  # fmt: skip


@pytest.mark.parametrize("version", ["4.57.1", "5.2", "5.16.3"])
def test_a_transformers_that_is_too_old_is_named(version):
    code = f"""
import transformers
transformers.__version__ = {version!r}
try:
    import hf_longattn
except ImportError as error:
    print(json.dumps([error.name, str(error), 'hf_longattn.cache' in sys.modules]))
"""
    name, message, went_on = python(code, [ROOT])
    assert name == "transformers" and f"got {version}: `pip install" in message and not went_on


@pytest.mark.parametrize("version", ["5.17.0.dev0", "5.17.0", "5.20", "6.0.1", "unknown"])
def test_other_versions_of_transformers_are_taken(version):
    requirements.check_transformers(version)


def test_the_oldest_transformers_is_that_of_the_metadata():
    oldest = ".".join(map(str, requirements.OLDEST_TRANSFORMERS))
    assert f'"transformers>={oldest},<6"' in (ROOT / "pyproject.toml").read_text()
    with pytest.raises(ImportError, match=rf"transformers>={oldest},<6"):
        requirements.check_transformers("5.0")


def test_public_names():
    promised = {"prepare_generation", "prepare_training", "restore", "GenerationSetup", "TrainingSetup"}
    promised |= {f"BlockTransformer{kind}" for kind in ("Config", "Model", "ForCausalLM")}
    promised |= {f"Lightning{kind}" for kind in ("Config", "Model", "ForCausalLM")}
    promised |= {"LongContextCache", "merge_partials", "attention_energy", "lightning_attention"}
    assert promised <= set(hf_longattn.__all__)
    assert all(hasattr(hf_longattn, name) for name in hf_longattn.__all__)
    assert re.search(f'^version = "{hf_longattn.__version__}"$', (ROOT / "pyproject.toml").read_text(), re.M)


# Style budgets


def decorators(node):
    heads = [d.func if isinstance(d, ast.Call) else d for d in node.decorator_list]
    return {ast.unparse(head).split(".")[-1] for head in heads}


def is_kernel(node):
    annotations = [ast.unparse(p.annotation) for p in parameters(node) if p.annotation]
    return "jit" in decorators(node) or any(a.endswith("constexpr") for a in annotations)


def parameters(node):
    return [
        p
        for p in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        if p.arg not in ("self", "cls")
    ]


def functions(tree, path=(), inside=False):
    """(name, node, whether it is public) of every function, nested ones too."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, FUNCTIONS):
            public = not inside and not any(part.startswith("_") for part in (*path, node.name))
            yield ".".join((*path, node.name)), node, public and not is_kernel(node)
            yield from functions(node, (*path, node.name), True)
        elif isinstance(node, ast.ClassDef):
            yield from functions(node, (*path, node.name), inside)
        else:
            yield from functions(node, path, inside)


def depth(node, level=0):
    deepest = level
    for field, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not isinstance(child, (*FUNCTIONS, ast.ClassDef, ast.Lambda)):
                is_elif = isinstance(node, ast.If) and field == "orelse" and isinstance(child, ast.If)
                deepest = max(deepest, depth(child, level + (isinstance(child, BLOCKS) and not is_elif)))
    return deepest


def length(node):
    return node.end_lineno - node.lineno + 1


ALL = [
    (path.relative_to(ROOT), *entry) for path in MODULES for entry in functions(ast.parse(path.read_text()))
]


def offenders(test):
    return [f"{path}:{node.lineno} {name}" for path, name, node, public in ALL if test(node, public)]


def test_files_are_short():
    assert not [p for p in MODULES if len(p.read_text().splitlines()) > 500]


def test_functions_are_short():
    lengths = sorted(length(node) for _, _, node, _ in ALL if not is_kernel(node))
    assert statistics.median(lengths) <= 15
    assert lengths[round(0.95 * (len(lengths) - 1))] <= 60
    assert not offenders(lambda node, public: is_kernel(node) and length(node) > 120)


def test_nesting_is_shallow():
    assert not offenders(lambda node, public: depth(node) > 3)


def test_public_functions_take_few_parameters():
    # Functions that transformers or torch calls have the signature that it calls them with.
    called_by_others = {"lazy_mask", "blockwise_attention", "decode_attention", "lightning_attention"}
    # A command has a parameter an option.
    called_by_others |= {"plan", "evaluate"}
    many = offenders(
        lambda node, public: public and len(parameters(node)) > 10 and node.name not in called_by_others
    )
    assert not many


def test_public_functions_are_documented_and_all_functions_annotated():
    assert not offenders(lambda node, public: public and ast.get_docstring(node) is None)
    in_triton = {p.relative_to(ROOT) for p in MODULES if p.name.startswith("triton") or p.name == "common.py"}
    bare = [
        f"{path}:{node.lineno} {name}"
        for path, name, node, _ in ALL
        if not is_kernel(node) and path not in in_triton
        and not (all(p.annotation for p in parameters(node)) and (node.returns or node.name == "__init__"))
    ]  # fmt: skip
    assert not bare


def test_modules_have_docstrings_and_no_print_or_star_import():
    for path in MODULES:
        tree = ast.parse(path.read_text())
        assert not tree.body or ast.get_docstring(tree), path
        for node in ast.walk(tree):
            assert not (isinstance(node, ast.Call) and ast.unparse(node.func) == "print"), path
            assert not (isinstance(node, ast.ImportFrom) and node.names[0].name == "*"), path
            assert not (
                isinstance(node, ast.ExceptHandler) and ast.unparse(node.type or node) == "Exception"
            ), path


FORBIDDEN = r"/work/|/tmp/|/home/\w+/|/root/|file:///|index-url|\bAI-generated\b"


def test_tracked_files_speak_of_the_project_alone():
    found = []
    for path in tracked_files():
        if path != Path(__file__):
            text = path.read_text(errors="replace")
            found += [f"{path.relative_to(ROOT)}: {match[0]}" for match in re.finditer(FORBIDDEN, text)]
    assert not found


def test_benchmark_results_say_where_they_come_from():
    for path in (ROOT / "benchmarks").glob("results/*.json"):
        content = json.loads(path.read_text())
        context = content if isinstance(content, dict) else {}
        rows = context.get("rows", []) if context else content
        for row in rows or [context]:
            keys = {**context, **row}.keys()
            assert {"gpu", "torch", "triton", "commit", "date", "command"} <= keys, path.name


# What is built


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_a_build_holds_the_package_once(kind, tmp_path):
    pytest.importorskip("hatchling")
    command = [sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (built,) = tmp_path.iterdir()
    if kind == "wheel":
        names = zipfile.ZipFile(built).namelist()
        assert {name.split("/")[0] for name in names} == {
            "hf_longattn",
            COMMANDS.name,
            f"{built.name.split('-py3')[0]}.dist-info",
        }
    else:
        with tarfile.open(built) as archive:
            names = [member.name.split("/", 1)[1] for member in archive.getmembers() if member.isfile()]
        # Of the tests and the figures, a clone has all.
        assert not {
            name for name in names if name.split("/")[0] in ("tests", "benchmarks", "docs", "recipes")
        }
        assert {"LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml", "constraints.txt"} <= set(names)
    sources = Counter(
        name
        for name in names
        if name.startswith(("hf_longattn/", "hf_longattn_cli")) and name.endswith(".py")
    )
    assert set(sources) == {str(p.relative_to(ROOT)) for p in MODULES} and set(sources.values()) == {1}
    assert "hf_longattn/py.typed" in names
