"""The packages depend on each other in one direction; what each may import, of the package and of the world."""

import ast
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest

import mistral_hf

SOURCE = Path(mistral_hf.__file__).parent

# What a package, or a module at the root, may import of the other ones.
RULES: dict[str, set[str]] = {
    "bundled": set(),
    "configuration_mistral": set(),
    "configuration_ministral": {"configuration_mistral"},
    "configuration_ministral3": {"configuration_mistral"},
    "compatibility": set(),
    "rope": {"configuration_mistral"},
    "generation_options": set(),
    "checkpoints": {"compatibility", "configuration_mistral"},
    "torch": set(),
    "chat": {"torch"},
    "convert": {"checkpoints", "chat", "compatibility"},
    "flax": {"checkpoints", "compatibility", "configuration_mistral", "generation_options", "rope"},
    "tf": {"checkpoints", "compatibility", "configuration_mistral", "generation_options", "rope"},
    "modeling_mistral": {"compatibility", "configuration_mistral", "torch"},
    "modeling_flax_mistral": {"checkpoints", "compatibility", "configuration_mistral", "flax", "generation_options"},
    "modeling_tf_mistral": {"checkpoints", "compatibility", "configuration_mistral", "generation_options", "tf"},
    "modeling_ministral": {"configuration_ministral", "modeling_mistral", "torch"},
    "modeling_ministral3": {"configuration_ministral3", "modeling_mistral", "torch"},
    "registration": {
        *("configuration_ministral", "configuration_ministral3", "configuration_mistral"),
        *("modeling_ministral", "modeling_ministral3", "modeling_mistral"),
    },
    "axolotl": {"registration"},
    "launch": set(),
    "startup": set(),
    "cli": {
        *("bundled", "chat", "compatibility", "configuration_mistral", "convert", "launch", "modeling_mistral"),
        *("registration", "torch"),
    },
    "__main__": {"cli"},
    "__init__": {
        *("bundled", "chat", "convert", "registration", "torch"),
        *("configuration_ministral", "configuration_ministral3", "configuration_mistral"),
        *("modeling_flax_mistral", "modeling_ministral", "modeling_ministral3", "modeling_mistral"),
        "modeling_tf_mistral",
    },
}
FRAMEWORKS = {"torch", "jax", "flax", "tensorflow", "keras"}
FILES_AND_FORMATS = {"os", "io", "pathlib", "json", "safetensors"}

# What a package, or a single file, must not import of the world.
FORBIDDEN: dict[str, set[str]] = {
    **dict.fromkeys(("bundled", "configuration_mistral", "compatibility", "rope", "generation_options"), FRAMEWORKS),
    **dict.fromkeys(("launch", "startup"), FRAMEWORKS | {"transformers"}),
    "checkpoints": FRAMEWORKS - {"torch"},
    "checkpoints/pretrained.py": FRAMEWORKS,
    "checkpoints/writer.py": FRAMEWORKS,
    "chat": FRAMEWORKS - {"torch"},
    "chat/template.py": FRAMEWORKS,
    "chat/encoding.py": FRAMEWORKS,
    "convert": FRAMEWORKS - {"torch"},
    "convert/tensors.py": FRAMEWORKS | FILES_AND_FORMATS | {"numpy", "transformers"},
    "convert/params.py": FRAMEWORKS | FILES_AND_FORMATS | {"numpy", "transformers"},
    "torch": FRAMEWORKS - {"torch"},
    "torch/attention.py": {"transformers.configuration_utils", "transformers.cache_utils"},
    "flax": {"torch", "tensorflow", "keras"},
    "tf": {"torch", "jax", "flax"},
    "modeling_mistral": FRAMEWORKS - {"torch"} | FILES_AND_FORMATS | {"flash_attn"},
    "modeling_flax_mistral": {"torch", "tensorflow", "keras"},
    "modeling_tf_mistral": {"torch", "jax", "flax"},
}
FILES = sorted(path.relative_to(SOURCE) for path in SOURCE.rglob("*.py"))


def imported(path: Path, root: Path) -> set[str]:
    """Dotted names of all that a file imports, wherever in it; those of the package begin with ``mistral_hf.``."""
    package = ("mistral_hf", *path.relative_to(root).parent.parts)
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else ()
            base = ".".join([*above, *([node.module] if node.module else [])])
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def unit_of(path: Path) -> str:
    """The package that a file belongs to, or the module that it is at the root."""
    return path.parts[0].removesuffix(".py")


def module_of(path: Path) -> str:
    """The dotted name of a file; that of its package for an ``__init__.py``."""
    parts = path.with_suffix("").parts
    return ".".join(("mistral_hf", *parts[: -1 if parts[-1] == "__init__" else None]))


def neighbours(names: set[str], rules: set[str]) -> set[str]:
    """Packages and root modules of this package among imported names."""
    return {name.split(".")[1] for name in names if name.startswith("mistral_hf.")} & rules


def is_within(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_file_imports_what_the_rule_of_its_package_allows(path: Path) -> None:
    unit, names = unit_of(path), imported(SOURCE / path, SOURCE)
    assert neighbours(names, set(RULES)) - {unit} <= RULES[unit]
    forbidden = FORBIDDEN.get(unit, set()) | FORBIDDEN.get(path.as_posix(), set())
    forbidden |= {"conversion", "examples", "benchmarks", "tests"}
    assert {name for name in names if any(is_within(name, module) for module in forbidden)} == set()


def test_the_conversion_needs_no_extra() -> None:
    """Every package that it imports is among ``install_requires``."""
    setup = ConfigParser()
    setup.read(Path(__file__).parents[1] / "setup.cfg")
    required = {line.split()[0] for line in setup["options"]["install_requires"].strip().splitlines()}
    for path in (path for path in FILES if unit_of(path) in ("checkpoints", "convert", "chat", "compatibility")):
        names = {name.split(".")[0] for name in imported(SOURCE / path, SOURCE)}
        assert names - sys.stdlib_module_names - {"mistral_hf", "mistral_common"} <= required, path


def test_every_package_has_a_rule_and_every_rule_a_package() -> None:
    assert {unit_of(path) for path in FILES} == set(RULES)


def order_of(needs: dict[str, set[str]]) -> list[set[str]]:
    """Sets that need only those before them; raises `AssertionError` for a circle."""
    left, order = dict(needs), []
    while left:
        ready = {unit for unit, wanted in left.items() if not (wanted - {unit}) & left.keys()}
        assert ready, f"a circle among {sorted(left)}"
        order.append(ready)
        left = {unit: wanted for unit, wanted in left.items() if unit not in ready}
    return order


def test_the_rules_hold_no_circle() -> None:
    assert order_of(RULES)[-1] == {"__main__"}
    with pytest.raises(AssertionError, match="a circle among"):
        order_of({**RULES, "torch": {"cli"}})


def test_no_file_depends_on_itself_through_others() -> None:
    modules = {module_of(path): path for path in FILES}
    needs = {}
    for module, path in modules.items():
        inner = [name for name in imported(SOURCE / path, SOURCE) if is_within(name, "mistral_hf")]
        needs[module] = {max((m for m in modules if is_within(name, m)), key=len) for name in inner}
    order_of(needs)


@pytest.mark.parametrize("path", FILES, ids=str)
def test_only_registration_changes_the_auto_classes(path: Path) -> None:
    if path.stem == "registration":
        return
    assert not any(name.startswith("transformers.models.auto") for name in imported(SOURCE / path, SOURCE))
    calls = (node.func for node in ast.walk(ast.parse((SOURCE / path).read_text())) if isinstance(node, ast.Call))
    registering = [call for call in calls if isinstance(call, ast.Attribute) and call.attr == "register"]
    assert not [c for c in registering if isinstance(c.value, ast.Name) and c.value.id.startswith("Auto")]


def test_the_walk_finds_imports_of_all_forms(tmp_path: Path) -> None:
    path = tmp_path / "torch" / "sample.py"
    path.parent.mkdir()
    lines = ["import a.b", "from c import d", "from . import e", "from .f import g", "from ..h import i"]
    path.write_text("\n".join([*lines, "def j():", " import k"]))
    inner = {"mistral_hf.torch.e", "mistral_hf.torch.f.g", "mistral_hf.h.i"}
    assert imported(path, tmp_path) == {"a.b", "c.d", "k"} | inner


SPECIAL_CASES = {"is_cpu", "is_cuda", "is_grad_enabled", "is_compiling", "is_exporting", "is_autocast_enabled"}
CONDITIONS = {"shape", "size", "numel", "dtype", "device"}


def special_cases(source: str) -> set[str]:
    """Names in a program that ask for a device, gradients or compilation, or branch on a dtype, a device or a shape."""
    nodes = list(ast.walk(ast.parse(source)))
    tests = [node.test for node in nodes if isinstance(node, ast.If | ast.IfExp | ast.While)]
    asked = {node.attr for node in nodes if isinstance(node, ast.Attribute)} & SPECIAL_CASES
    inner = [node for test in tests for node in ast.walk(test)]
    return asked | {node.attr for node in inner if isinstance(node, ast.Attribute)} & CONDITIONS


def test_the_model_has_no_branch_on_a_device_dtype_length_gradient_or_compilation() -> None:
    assert special_cases((SOURCE / "modeling_mistral.py").read_text(encoding="utf-8")) == set()
    for line in ("if x.is_cpu: pass", "y = x if x.shape[1] == 1 else z", "a = torch.is_grad_enabled() and b"):
        assert special_cases(line)


def test_contributing_shows_the_rules() -> None:
    """The table under "Architecture" has a row for every package, with what it may import."""
    text = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| `")]
    shown = {row[0].strip().strip("`"): set(row[1].replace("`", "").replace(",", " ").split()) - {"-"} for row in rows}
    assert shown == RULES
