"""A network as a single file of code: its identity, the contract it must meet, and what can be read off it."""

from __future__ import annotations

import ast
import hashlib
import inspect
import re
import textwrap
from collections import Counter
from collections.abc import Callable
from importlib import resources
from types import ModuleType
from typing import Any

from pomona.errors import PomonaError

PREAMBLE = "import torch\nfrom torch import nn\nfrom torch.nn import functional as F\n\n\n"

# what turns a network without a training procedure into one that meets the contract
TRAINING = '''

def supported_hyperparameters():
    return {names}


class Net(torch.nn.Module):
    """The network above, trained by SGD with momentum and clipped gradients."""

    def __init__(self, in_shape, out_shape, prm, device):
        super().__init__()
        self.body = {call}.to(device)

    def forward(self, x):
        return self.body(x)

    def train_setup(self, prm):
        self.optimizer = torch.optim.SGD(self.parameters(), lr=prm["lr"], momentum=prm["momentum"])

    def learn(self, train_data):
        for x, y in train_data:
            output = self(x)
            if y.is_floating_point():
                loss = torch.nn.functional.mse_loss(output, y)
            else:
                loss = torch.nn.functional.cross_entropy(output, y)
            self.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.parameters(), 3.0)
            self.optimizer.step()
'''


def parse(code: str) -> ast.Module:
    """The syntax tree of ``code``.

    Raises:
        PomonaError: with the line, if it is not Python.
    """
    try:
        return ast.parse(code)
    except SyntaxError as error:
        raise PomonaError(f"code is not valid Python: {error.msg} in line {error.lineno}") from error


def identity(code: str) -> str:
    """First 12 hexadecimal digits of the hash of the tree without docstrings; layout and comments play no part."""
    return hashlib.sha256(_dump(parse(code)).encode()).hexdigest()[:12]


def _dump(node: Any) -> str:
    # as ast.dump, but without empty fields: which of those there are differs between versions of Python
    if isinstance(node, list):
        return f"[{','.join(map(_dump, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = dict(ast.iter_fields(node))
    body = fields.get("body")
    if isinstance(body, list) and body and isinstance(body[0], ast.Expr) and _is_text(body[0].value):
        fields["body"] = body[1:]
    kept = (f"{name}={_dump(value)}" for name, value in fields.items() if value is not None and value != [])
    return f"{type(node).__name__}({','.join(kept)})"


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def source(code: str | ModuleType | Callable[..., Any]) -> tuple[str, str]:
    """Source and a name for it, of a module, a factory ``(in_shape, out_shape[, prm])`` or a text."""
    if isinstance(code, str):
        return code, ""
    text = textwrap.dedent(inspect.getsource(code))
    if isinstance(code, ModuleType):
        return text, code.__name__.rpartition(".")[2]
    return PREAMBLE + text, code.__name__


def contract(code: str) -> str:
    """``code`` as a file that meets the contract of :class:`pomona.zoo.Corpus`.

    A class ``Net`` without ``learn``, or a single factory function or module class, is given the standard training.

    Raises:
        PomonaError: if there is no network in it, or only a part of the contract.
    """
    tree = parse(code)
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    if "Net" in classes:
        methods = {node.name for node in classes["Net"].body if isinstance(node, ast.FunctionDef)}
        lacking = sorted({"train_setup", "learn"} - methods)
        if not lacking:
            if "supported_hyperparameters" not in functions:
                raise PomonaError("code lacks a function supported_hyperparameters() -> set of names; add it")
            return code
        if len(lacking) == 1:
            raise PomonaError(
                f"Net lacks {lacking[0]}(); define both train_setup(prm) and learn(train_data), or neither"
            )
        builder = "Net"
        takes_prm = "prm" in _parameters(classes["Net"])
        code = re.sub(r"\bNet\b", "Body", code)  # the class appended below takes the name
    else:
        candidates = [name for name in (*functions, *classes) if not name.startswith("_")]
        if len(candidates) != 1:
            raise PomonaError("code has no class Net; name the network Net, or give a single factory function")
        builder = candidates[0]
        takes_prm = "prm" in _parameters(functions.get(builder) or classes[builder])
    names = ", ".join(f'"{name}"' for name in sorted({"lr", "momentum"} | prm_names(tree)))
    call = f"{'Body' if builder == 'Net' else builder}(in_shape, out_shape{', prm' * takes_prm})"
    # an import may stand last: nothing above needs it, and "from __future__" must come first
    imports = "" if re.search(r"^import torch$", code, re.MULTILINE) else "\n\nimport torch"
    return f"{code.rstrip()}{imports}\n{TRAINING.format(names='{' + names + '}', call=call)}"


def _parameters(node: ast.AST) -> set[str]:
    if isinstance(node, ast.ClassDef):
        inits = [item for item in node.body if isinstance(item, ast.FunctionDef) and item.name == "__init__"]
        return _parameters(inits[0]) if inits else set()
    assert isinstance(node, ast.FunctionDef)
    return {argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)}


def prm_names(tree: ast.AST) -> set[str]:
    """The names that the code reads as ``prm["name"]``."""
    return {
        node.slice.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Subscript)
        and isinstance(node.value, ast.Name)
        and node.value.id == "prm"
        and isinstance(node.slice, ast.Constant)
        and isinstance(node.slice.value, str)
    }


def op_counts(code: str) -> dict[str, int]:
    """How often each name is called or used as an operator (``Linear``, ``relu``, ``MatMult``, ...)."""
    counts: Counter[str] = Counter()
    for node in ast.walk(parse(code)):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            counts[name] += bool(name)
        elif isinstance(node, ast.BinOp):
            counts[type(node.op).__name__] += 1
    return dict(+counts)


def quality(code: str) -> float:
    """Share, in [0, 1], of what a reviewer would ask for: documented, short, simple, no wildcard or bare except."""
    tree = parse(code)
    nodes = list(ast.walk(tree))
    named = [node for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
    branches = (ast.If, ast.For, ast.While, ast.IfExp, ast.BoolOp, ast.ExceptHandler, ast.comprehension)
    lines = code.splitlines()
    used = {node.id for node in nodes if isinstance(node, ast.Name)}
    imported = [
        (alias.asname or alias.name).partition(".")[0]
        for node in nodes
        if isinstance(node, (ast.Import, ast.ImportFrom)) and getattr(node, "module", "") != "__future__"
        for alias in node.names
    ]
    checks = [
        [
            ast.get_docstring(tree) is not None
            or any(isinstance(n, ast.ClassDef) and ast.get_docstring(n) for n in nodes)
        ],
        [len(line) <= 110 for line in lines],
        [sum(isinstance(part, branches) for part in ast.walk(node)) <= 10 for node in functions],
        [(node.end_lineno or node.lineno) - node.lineno < 60 for node in named],
        [name in used for name in imported],
        [node.type is not None for node in nodes if isinstance(node, ast.ExceptHandler)],
    ]
    return sum(sum(map(bool, check)) / len(check) if check else 1.0 for check in checks) / len(checks)


def shipped() -> dict[str, str]:
    """Name and code of every architecture that comes with Pomona."""
    folder = resources.files("pomona.zoo") / "architectures"
    files = (entry for entry in folder.iterdir() if entry.name.endswith(".py") and entry.name != "__init__.py")
    return {entry.name[:-3]: entry.read_text(encoding="utf-8") for entry in sorted(files, key=lambda e: e.name)}
