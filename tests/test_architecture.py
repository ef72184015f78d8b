"""Who may touch what: the table of the house, read from the imports by ``ast``."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "bayesmeta"

# Each room and the rooms it may import from; a room may always import from itself.
GROUND = {
    "randomness", "sampling", "packing", "episodes", "convolutions", "batch_norm", "networks", "likelihoods", "predictive", "posteriors",
}  # fmt: skip
MAY_IMPORT = {
    "randomness": set(),
    "sampling": set(),
    "packing": {"randomness"},
    "episodes": set(),
    "convolutions": set(),
    "batch_norm": {"inner_loop"},
    "networks": {"convolutions", "batch_norm"},
    "likelihoods": set(),
    "predictive": {"packing", "randomness"},
    "posteriors": {"packing", "predictive", "randomness"},
    "metrics": set(),
    "tasks": {"episodes", "randomness"},
    "handlers": {"episodes", "packing"},
    "survey": {"episodes", "handlers", "packing"},
    "network_program": {"episodes", "networks"},
    "parameters": {"handlers", "survey"},
    "reading": {"episodes", "handlers", "packing", "parameters", "survey"},
    "program_module": {"episodes", "handlers", "parameters", "reading", "survey"},
    "program_prior": {"episodes", "handlers", "program_module"},
    "guide_sites": {"handlers", "packing", "posteriors"},
    "model": {
        "batch_norm", "episodes", "guide_sites", "handlers", "likelihoods", "network_program", "networks", "parameters", "posteriors",
        "program_module", "program_prior", "randomness", "reading", "survey",
    },
    "inner_loop": set(),
    "learners": GROUND | {"inner_loop", "model", "network_program", "parameters", "program_module"},
    "full_bayes": {"episodes", "model", "randomness", "sampling"},
    "checkpoints": set(),
    "plots": {"metrics"},
    "report": {"metrics", "plots"},
    "adam": set(),
    "rewriting": set(),
    "light_buffers": set(),
    "short_compiling": set(),
    "graphs": set(),
    "saved_graphs": {"graphs"},
    "backends": {"graphs", "light_buffers", "rewriting", "saved_graphs", "short_compiling"},
    "costs": {"graphs", "saved_graphs"},
    "splitting": {"rewriting"},
    "sweep": {"episodes", "graphs", "inner_loop", "randomness", "splitting"},
    "agreement": {"episodes", "graphs"},
    "traced_step": {"adam", "agreement", "backends", "episodes", "graphs", "learners.base", "randomness", "rewriting", "sweep"},
    "compiling": {"adam", "agreement", "backends", "costs", "episodes", "graphs", "learners.base", "sweep", "traced_step"},
    "compiled": {"backends", "episodes", "graphs", "learners.base", "posteriors", "randomness"},
    "distributed": set(),
    "meta_gradient": {"adam", "agreement", "compiling", "distributed", "episodes", "learners.base"},
    "training_run": {
        "agreement", "checkpoints", "distributed", "episodes", "learners.base", "meta_gradient", "metrics", "plots", "randomness",
    },
    "training": {
        "adam", "compiling", "distributed", "episodes", "learners.base", "meta_gradient", "randomness", "tasks.base", "training_run",
    },
    "truth": {"episodes", "metrics", "posteriors", "predictive", "report.measures", "tasks.base"},
    "shown_tasks": {"episodes", "learners.base", "posteriors", "report", "tasks.base", "truth"},
    "evaluation": {
        "compiled", "distributed", "episodes", "learners.base", "metrics", "posteriors", "predictive", "report", "shown_tasks",
        "tasks.base", "truth", "__version__",
    },
    "robustness": {"evaluation", "learners.base", "metrics", "tasks"},
    "image_networks": set(),
    "recipes": {"episodes", "image_networks", "learners", "likelihoods", "model", "networks", "tasks"},
    "comparison": {"evaluation", "learners.base", "meta_gradient", "recipes", "report", "tasks", "training", "training_run"},
    "cli": {"comparison", "learners.base", "meta_gradient", "recipes", "survey", "tasks", "training", "__version__"},
    "__main__": {"cli"},
}
THIRD_PARTY = {
    "ground": {"torch", "pyro", "numpy", "scipy", "arviz"},  # arviz: inside to_arviz alone, an optional extra
    "metrics": {"torch", "scipy", "numpy", "pyro"},
    "tasks": {"torch", "numpy", "scipy", "matplotlib", "PIL"},  # matplotlib: its fonts alone
    "plots": {"numpy", "matplotlib", "torch", "scipy"},
    "report": {"numpy", "matplotlib", "torch"},
}
SHARED = {  # by learners
    "base", "steps", "noise", "objectives", "encoders", "factors", "flows", "layers", "per_class", "curvature", "blocks", "stein",
}  # fmt: skip
STANDARD_ONLY_TYPE_CHECKING = "TYPE_CHECKING"


def files():
    return sorted(PACKAGE.rglob("*.py"))


def module_of(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def room_of(path):
    module = module_of(path)
    return module[0] if module else "__init__"


def imports(path):
    """Every import of a file as (tuple of the module's parts inside the package, or None; top-level package name)."""
    here = path.relative_to(PACKAGE).with_suffix("").parts
    tree = ast.parse(path.read_text())
    skipped = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and STANDARD_ONLY_TYPE_CHECKING in ast.dump(block.test)
        for statement in block.body
        for node in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                top, *inside = alias.name.split(".")
                yield (tuple(inside) if top == "bayesmeta" else None), top
        elif isinstance(node, ast.ImportFrom):
            names = [alias.name for alias in node.names]
            if node.level:
                base = here[: len(here) - node.level]
                base += tuple(node.module.split(".")) if node.module else ()
            elif node.module and node.module.split(".")[0] == "bayesmeta":
                base = tuple(node.module.split("."))[1:]
            else:
                yield None, (node.module or "").split(".")[0]
                continue
            if base:
                yield base, "bayesmeta"
            else:
                for name in names:
                    yield (name,), "bayesmeta"


def allowed(room, target):
    rules = MAY_IMPORT[room]
    return target[0] == room or target[0] in rules or ".".join(target[:2]) in rules


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_keep_to_the_table(path):
    room = room_of(path)
    if room == "__init__":
        return
    assert room in MAY_IMPORT, f"{room} is no room of the house: say in the table what it may import"
    wrong = [".".join(target) for target, _ in imports(path) if target and not allowed(room, target)]
    assert not wrong, f"{path.name} imports {wrong}"


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_third_party_packages_stay_in_their_rooms(path):
    room = room_of(path)
    rules = THIRD_PARTY.get("ground" if room in GROUND else room)
    if rules is None:
        return
    import sys

    wrong = {top for target, top in imports(path) if target is None} - rules - set(sys.stdlib_module_names)
    assert not wrong, f"{path.name} imports {wrong}"


def test_learners_never_import_each_other_nor_a_family():
    for path in (PACKAGE / "learners").glob("*.py"):
        if path.stem == "__init__":
            continue
        for target, _ in imports(path):
            if target and target[0] == "learners":
                assert target[1] in SHARED, f"{path.name} imports {'.'.join(target)}"
            assert not (target and target[0] in ("tasks", "training", "evaluation", "report", "plots")), path.name


def test_there_are_no_circles():
    graph = {room: {t[0] for p in files() if room_of(p) == room for t, _ in imports(p) if t and t[0] != room} for room in MAY_IMPORT}
    done: set[str] = set()

    def visit(room, path):
        assert room not in path, f"circle: {' → '.join([*path, room])}"
        if room in done or room not in graph:
            return
        for target in graph[room]:
            visit(target, [*path, room])
        done.add(room)

    for room in graph:
        visit(room, [])


def test_classes_are_abstract_or_final():
    """No class of ours inherits from a class of ours that is not abstract (a Protocol or an ABC)."""
    classes = {}
    for path in files():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                classes[node.name] = [ast.unparse(base) for base in node.bases]
    abstract = {name for name, bases in classes.items() if "ABC" in bases or "Protocol" in bases or "AbstractAdapter" in bases}
    abstract = {name for name in abstract if name.startswith("Abstract") or "Protocol" in classes[name]}
    assert {"AbstractAdapter", "AbstractMetaLearner", "AbstractNetwork", "AbstractProgramModule"} <= abstract
    wrong = {name: [b for b in bases if b in classes and b not in abstract] for name, bases in classes.items()}
    assert not {name: bases for name, bases in wrong.items() if bases}


def test_every_learner_file_reads_in_the_same_order():
    """Docstring, class and fields, `adapt`, `meta_loss`, private helpers."""
    for path in (PACKAGE / "learners").glob("*.py"):
        if path.stem in SHARED | {"__init__"}:
            continue
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree), path.name
        (cls,) = [node for node in tree.body if isinstance(node, ast.ClassDef)]
        methods = [node.name for node in cls.body if isinstance(node, ast.FunctionDef)]
        public = [m for m in methods if not m.startswith("_")]
        assert methods[0] == "__init__" or methods[0] == "adapt", path.name
        assert public[0] == "adapt", path.name
        assert "meta_loss" not in public or public.index("meta_loss") in (1, 2), path.name
        privates = [i for i, m in enumerate(methods) if m.startswith("_") and m != "__init__"]
        publics = [i for i, m in enumerate(methods) if not m.startswith("_")]
        assert not privates or min(privates) > max(publics), f"{path.name}: helpers come last"


def test_nothing_of_ours_is_dangerous():
    """No pickle, no unsafe loading, no eval, no allow_pickle, no shell."""
    for path in files():
        text = path.read_text()
        for word in ("import pickle", "weights_only=False", "allow_pickle=True", "eval(", "exec(", "os.system", "shell=True", "plt.show"):
            hits = [line for line in text.splitlines() if word in line and ".eval()" not in line]
            assert not hits, f"{path.name}: {hits}"
