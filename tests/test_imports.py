"""The house rules: who may import whom, and what must not be anywhere."""

import ast
import subprocess
import sys

import pytest

COMMANDS = {"train", "preflight", "demo", "probe", "bench", "report", "export", "embed", "replay"}
LEAVES = {
    "order",
    "decode",
    "pixels",
    "masks",
    "objectives",
    "optim",
    "teacher",
    "teacher_weights",
    "student",
    "image_vit",
    "checkpoint",
    "budget",
    "shared",
    "profiling",
    "ema",
    "growing_file",
    "patches",
    "attentive",
    "neighbours",
}
PARTS = {"teacher": {"teacher_weights"}, "student": {"image_vit"}}  # leaves in two files


def modules(repository, package):
    return sorted((repository / package).glob("*.py"))


def imports(path):
    """Modules a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_shard_tools_never_loads_torch(repository):
    names = [f"shard_tools.{p.stem}" for p in modules(repository, "shard_tools") if p.stem != "__init__"]
    code = f"import importlib, sys; [importlib.import_module(n) for n in {names}]; print(sorted(sys.modules))"
    loaded = subprocess.run(
        [sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=True
    ).stdout
    assert "'shard_tools.pack'" in loaded
    assert not {"torch", "salt_wds", "timm", "transformers"} & set(ast.literal_eval(loaded))


def test_packing_loads_decoders_and_arrow_only_in_its_workers(repository):
    code = "import sys; import shard_tools.pack, shard_tools.packing; print(sorted(sys.modules))"
    loaded = subprocess.run(
        [sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=True
    ).stdout
    assert not {"av", "cv2", "numpy", "pyarrow", "ray"} & set(ast.literal_eval(loaded))


def test_salt_wds_takes_only_the_contract_from_shard_tools(repository):
    allowed = {"format", "shard_index", "ledger", "command", "container", "webm", "worker_process"}
    packing = {"video_files": {"sources", "frames", "executors"}}  # it finds and looks at files as packing does
    for path in modules(repository, "salt_wds"):
        for name in imports(path):
            if name.startswith("shard_tools."):
                assert name.split(".")[1] in allowed | packing.get(path.stem, set()), f"{path.name} imports {name}"


def test_leaves_know_only_the_configuration(repository):
    for path in modules(repository, "salt_wds"):
        if path.stem in LEAVES:
            ours = {n.split(".")[1] for n in imports(path) if n.startswith("salt_wds.")}
            assert ours <= {"config"} | PARTS.get(path.stem, set()), f"{path.name} imports {ours}"


@pytest.mark.parametrize("package", ["salt_wds", "shard_tools"])
def test_nobody_imports_a_command(repository, package):
    commands = COMMANDS | {"pack", "verify", "repair", "index", "describe", "synth", "failures"}
    for path in modules(repository, package):
        used = {n.split(".")[1] for n in imports(path) if n.startswith(f"{package}.")} & commands
        assert not used, f"{path.name} imports {used}"


def test_nothing_is_unpickled_or_run_from_data(repository):
    forbidden = ("import pickle", "pickle.load", "trust_remote_code=True", "shell=True", "eval(", "exec(", "os.system")
    for package in ("salt_wds", "shard_tools"):
        for path in modules(repository, package):
            text = path.read_text()
            calls = [line for line in text.splitlines() if any(word in line for word in forbidden)]
            assert not [line for line in calls if ".eval()" not in line], f"{path.name}: {calls}"
            loads = [line for line in text.splitlines() if "torch.load(" in line]
            assert all("weights_only=True" in line for line in loads), f"{path.name}: {loads}"


def test_importing_does_nothing(repository):
    """No device query, no seeding, no logging set-up, no output."""
    names = [f"salt_wds.{p.stem}" for p in modules(repository, "salt_wds") if p.stem != "__init__"]
    code = (
        "import importlib, logging, torch; before = torch.initial_seed(); handlers = list(logging.root.handlers)\n"
        f"[importlib.import_module(n) for n in {names}]\n"
        "assert torch.initial_seed() == before and logging.root.handlers == handlers\n"
        "assert not torch.cuda.is_initialized()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
