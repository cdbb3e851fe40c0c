"""The rules of the house: which folder may import which, and what must not be anywhere."""

import ast
import subprocess
import sys

import pytest

# Each folder or single-file command may import the ones to its right, never one to its left.
LAYERS = {
    "shard_tools": "repair verify index pack describe bench failures synth video format common",
    "salt_wds": "demo report bench preflight evaluate replay export embed latents train probe models runs data config",
}
FROM_SHARD_TOOLS = {"common", "format", "video"}  # all that salt_wds may import of shard_tools
LATENTS_ALSO = {"pack", "verify"}  # stored latents are a data set like others, written by the same machinery


def modules(repository, package):
    """Dotted name -> path of every module of a package."""
    found = {}
    for path in sorted((repository / package).rglob("*.py")):
        parts = path.relative_to(repository).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path):
    """Modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def folders(names):
    """The (package, folder) pairs among dotted names of our modules."""
    return {tuple(name.split(".")[:2]) for name in names if "." in name and name.split(".")[0] in LAYERS}


@pytest.mark.parametrize("package", LAYERS)
def test_every_arrow_points_down(repository, package):
    order = LAYERS[package].split()
    for name, path in modules(repository, package).items():
        if name in (package, f"{package}.__main__"):
            continue
        own = order.index(name.split(".")[1])
        for other, folder in folders(imports(path)):
            if other == package and folder in order:
                assert order.index(folder) >= own, f"{name} imports {other}.{folder}"
            elif other != package:
                assert package == "salt_wds", f"{name} imports {other}"
                allowed = FROM_SHARD_TOOLS | (LATENTS_ALSO if name.startswith("salt_wds.latents.") else set())
                assert folder in allowed | {"__version__"}, f"{name} imports {other}.{folder}"


@pytest.mark.parametrize("package", LAYERS)
def test_no_module_imports_itself_in_a_circle(repository, package):
    ours = modules(repository, package)
    needs = {name: {n for n in imports(path) if n in ours and n != name} for name, path in ours.items()}
    del needs[package]  # its public names are imported late
    while needs:
        leaves = [name for name, others in needs.items() if not others & needs.keys()]
        assert leaves, f"these import each other: {sorted(needs)}"
        for name in leaves:
            del needs[name]


@pytest.mark.parametrize("package", LAYERS)
def test_nobody_imports_a_command_line(repository, package):
    for name, path in modules(repository, package).items():
        used = [n for n in imports(path) if n.endswith(".__main__") and n.split(".")[0] in LAYERS]
        assert not used, f"{name} imports {used}"


def test_shard_tools_never_loads_torch(repository):
    names = [name for name in modules(repository, "shard_tools") if name != "shard_tools"]
    code = f"import importlib, sys; [importlib.import_module(n) for n in {names}]; print(sorted(sys.modules))"
    loaded = subprocess.run(
        [sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=True
    ).stdout
    assert "'shard_tools.pack.packing'" in loaded
    assert not {"torch", "salt_wds", "timm", "transformers"} & set(ast.literal_eval(loaded))


@pytest.mark.parametrize("package", LAYERS)
def test_nothing_is_unpickled_or_run_from_data(repository, package):
    forbidden = ("import pickle", "pickle.load", "trust_remote_code=True", "shell=True", "eval(", "exec(", "os.system")
    for name, path in modules(repository, package).items():
        text = path.read_text()
        calls = [line for line in text.splitlines() if any(word in line for word in forbidden)]
        harmless = (".eval()", 'exec("")')  # the second runs nothing
        assert not [line for line in calls if not any(word in line for word in harmless)], f"{name}: {calls}"
        loads = [line for line in text.splitlines() if "torch.load(" in line]
        assert all("weights_only=True" in line for line in loads), f"{name}: {loads}"


def test_importing_does_nothing(repository):
    """No device query, no seeding, no logging set-up, no output."""
    names = [name for name in modules(repository, "salt_wds") if name != "salt_wds"]
    code = (
        "import importlib, logging, torch; before = torch.initial_seed(); handlers = list(logging.root.handlers)\n"
        f"[importlib.import_module(n) for n in {names}]\n"
        "assert torch.initial_seed() == before and logging.root.handlers == handlers\n"
        "assert not torch.cuda.is_initialized()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
