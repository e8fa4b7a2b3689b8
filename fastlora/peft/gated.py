"""Which modules are gated MLPs, y = down(act(gate(x)) · up(x)): read from the source of their class's forward.

What the linears are called does not matter, nor the order of the two factors, nor whether the steps have names of their own.
nn.Dropout between the product and down is seen (`between`), and a cast of the product to the dtype of down's weight is passed
over: it does nothing where the linears have one dtype, which is a condition of the fused call.
"""

import ast
import functools
import inspect
import textwrap
from collections.abc import Mapping
from types import FunctionType
from typing import Any, NamedTuple

from torch import nn

from fastlora.validation import is_altered

#: Type of a module, or function, that is an activation -> its name in `lora_mlp`.  Types are compared by name: transformers
#: moves and renames some between versions.
ACTIVATIONS = {
    "torch.nn.modules.activation.SiLU": "silu",
    "transformers.activations.SiLUActivation": "silu",
    "torch.nn.functional.silu": "silu",
    "transformers.activations.GELUActivation": "gelu",
    "transformers.activations.GELUTanh": "gelu_pytorch_tanh",
    "transformers.activations.PytorchGELUTanh": "gelu_pytorch_tanh",
    "transformers.activations.NewGELUActivation": "gelu_pytorch_tanh",
    "transformers.activations.FastGELUActivation": "gelu_pytorch_tanh",
}
GELU = {"none": "gelu", "tanh": "gelu_pytorch_tanh"}  # by nn.GELU's `approximate`


class Shape(NamedTuple):
    """What the forward of a class names: dotted expressions of the parts, "self.gate_proj" or "F.silu"."""

    activation: str
    gate: str
    up: str
    down: str
    between: tuple[str, ...]  # modules applied to the product


class Parts(NamedTuple):
    """The modules of one gated MLP."""

    activation: str
    gate: nn.Module
    up: nn.Module
    down: nn.Module
    between: tuple[nn.Module, ...]


def parts_of(module: nn.Module, kind: type[nn.Module]) -> Parts | str | None:
    """The parts of a gated MLP whose forward is that of `kind`, why it is not computed as one, or None for another module."""
    shape = getattr(module, "_fastlora_shape", None) or shape_of(kind.forward)  # torch.compile cannot trace the reading
    if shape is None:
        return None
    act, *linears = [_resolve(name, module, kind) for name in (shape.activation, shape.gate, shape.up, shape.down)]
    between = tuple(_resolve(name, module, kind) for name in shape.between)
    if not all(isinstance(linear, nn.Module) for linear in linears):
        return None
    if (activation := activation_of(act)) is None:
        return f"its activation is {_name(act if isinstance(act, FunctionType) else type(act))}"
    if isinstance(act, nn.Module) and is_altered(act):
        return "its activation has hooks, or a forward of its own"
    for other in between:
        if type(other) is not nn.Dropout or is_altered(other):
            return f"a {type(other).__name__} stands before its last linear"
    gate, up, down = linears
    return Parts(activation, gate, up, down, between)


def activation_of(act: Any) -> str | None:
    """The name in `lora_mlp` of an activation: a module or a function."""
    if type(act) is nn.GELU:
        return GELU[act.approximate]
    return ACTIVATIONS.get(_name(type(act) if isinstance(act, nn.Module) else act))


def _name(thing: Any) -> str:
    return f"{getattr(thing, '__module__', '')}.{getattr(thing, '__qualname__', repr(thing))}"


def _resolve(dotted: str, module: nn.Module, kind: Any) -> Any:
    """What a dotted name in the forward of `kind` stands for, None where there is no such thing."""
    first, *rest = dotted.split(".")
    found: Any = module if first == "self" else kind.forward.__globals__.get(first)
    for name in rest:
        found = getattr(found, name, None)
    return found


@functools.cache
def shape_of(forward: Any) -> Shape | None:
    """The shape of a gated MLP's forward, or None.  A decorated forward has none: what it runs is not what is read."""
    if not isinstance(forward, FunctionType):
        return None
    try:
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(forward))).body
    except (OSError, TypeError, SyntaxError, ValueError):  # no source, or none that stands alone
        return None
    if not isinstance(tree, ast.FunctionDef) or tree.decorator_list or len(tree.args.args) != 2 or _has_more(tree.args):
        return None
    x, result = tree.args.args[1].arg, _result(tree.body)
    return None if result is None else _match(result, x)


def _has_more(arguments: ast.arguments) -> bool:
    return bool(arguments.posonlyargs or arguments.kwonlyargs or arguments.vararg or arguments.kwarg or arguments.defaults)


def _result(body: list[ast.stmt]) -> ast.expr | None:
    """What straight-line code returns, with every name replaced by what it was assigned; None for other code."""
    values: dict[str, ast.expr] = {}
    for statement in body:
        if isinstance(statement, ast.Return) and statement.value is not None:
            return _Substitute(values).visit(statement.value)
        if isinstance(statement, ast.Assign) and len(statement.targets) == 1 and isinstance(statement.targets[0], ast.Name):
            values[statement.targets[0].id] = _Substitute(values).visit(statement.value)
        elif not _is_docstring(statement) and not _is_cast(statement):
            return None
    return None


class _Substitute(ast.NodeTransformer):
    def __init__(self, values: Mapping[str, ast.expr]) -> None:
        self.values = dict(values)

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return self.values.get(node.id, node)


def _is_docstring(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def _is_cast(statement: ast.stmt) -> bool:
    """`if …: h = h.to(….dtype)`, which changes nothing where h has that dtype."""
    if not isinstance(statement, ast.If) or statement.orelse or len(statement.body) != 1:
        return False
    match statement.body[0]:
        case ast.Assign(
            targets=[ast.Name(id=name)],
            value=ast.Call(
                func=ast.Attribute(value=ast.Name(id=same), attr="to"), args=[ast.Attribute(attr="dtype")], keywords=[]
            ),
        ):
            return name == same
    return False


def _match(result: ast.expr, x: str) -> Shape | None:
    applied: list[str] = []
    while (called := _call(result)) is not None:
        applied.append(called[0])
        result = called[1]
    if not applied or not isinstance(result, ast.BinOp) or not isinstance(result.op, ast.Mult):
        return None
    for first, second in ((result.left, result.right), (result.right, result.left)):
        act, up = _call(first), _call(second)
        gate = None if act is None else _call(act[1])
        if act and gate and up and all(isinstance(of, ast.Name) and of.id == x for of in (gate[1], up[1])):
            return Shape(act[0], gate[0], up[0], applied[0], tuple(applied[1:]))
    return None


def _call(node: ast.expr) -> tuple[str, ast.expr] | None:
    """(the dotted name of what is called, its one argument), or None."""
    if not isinstance(node, ast.Call) or len(node.args) != 1 or node.keywords:
        return None
    name = ast.unparse(node.func)
    return (name, node.args[0]) if all(part.isidentifier() for part in name.split(".")) else None
