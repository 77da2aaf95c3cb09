"""From a program's functions to steps that can be run: operators found, arguments bound, lifetimes known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches

from targets.coreml.integers import with_integer_products
from targets.coreml.ops import OPERATORS, Operator
from targets.coreml.program import Argument, Function, Operation, Tensor
from targets.coreml.steps import Bound, Step
from targets.coreml.values import Constant, MalformedError


@dataclass(frozen=True)
class Linked:
    """A function that can be run."""

    inputs: tuple[Tensor, ...]
    outputs: tuple[str, ...]
    constants: Mapping[str, Constant]
    steps: tuple[Step, ...]


def link(name: str, function: Function) -> Linked:
    """Bind a function's operations.

    Raises:
        MalformedError: names an operator that this engine does not know, and a parameter or a value that
            there is none of.
    """
    bound = []
    known = {t.name for t in function.inputs} | function.constants.keys()
    for operation in function.operations:
        try:
            bound.append((operation, *_bind(operation, function.constants, known)))
        except MalformedError as e:
            raise MalformedError(f"function '{name}', operator '{operation.name}' ({operation.type}): {e}") from e
        known |= {t.name for t in operation.outputs}
    missing = [o for o in function.outputs if o not in known]
    if missing:
        raise MalformedError(f"function '{name}': nothing computes its output '{missing[0]}'")
    steps = [Step(operation, operator, arguments, ()) for operation, operator, arguments in bound]
    steps = with_integer_products(steps, function)
    return Linked(function.inputs, function.outputs, function.constants, _with_lifetimes(_late(steps), function))


def _bind(
    operation: Operation, constants: Mapping[str, Constant], known: set[str]
) -> tuple[Operator, dict[str, Bound | tuple[Bound, ...]]]:
    if operation.nests:
        raise MalformedError("this engine has no control flow; unroll it before converting")
    operator = OPERATORS.get(operation.type)
    if operator is None:
        close = get_close_matches(operation.type, OPERATORS, 1)
        hint = f" (the nearest that it knows is '{close[0]}')" if close else ""
        raise MalformedError(f"this engine does not know the operator{hint}; write the model without it")
    unknown = sorted(operation.arguments.keys() - operator.parameters.keys())
    if unknown:
        raise MalformedError(f"this engine does not know the parameter '{unknown[0]}'; leave it at its default")
    arguments: dict[str, Bound | tuple[Bound, ...]] = {}
    for name, parameter in operator.parameters.items():
        argument = operation.arguments.get(name)
        if argument is None:
            if parameter.required:
                raise MalformedError(f"its parameter '{name}' is not given")
            continue
        arguments[name] = _resolve(argument, constants, known)
        if parameter.several and not isinstance(arguments[name], tuple):
            arguments[name] = (arguments[name],)  # type: ignore[assignment]
    return operator, arguments


def _resolve(argument: Argument, constants: Mapping[str, Constant], known: set[str]) -> Bound | tuple[Bound, ...]:
    if isinstance(argument, tuple):
        return tuple(_resolve(a, constants, known) for a in argument)  # type: ignore[misc]
    if isinstance(argument, Constant):
        return argument
    if argument.name not in known:
        raise MalformedError(f"nothing computes its operand '{argument.name}' before it")
    return argument


def _late(steps: list[Step]) -> list[Step]:
    """Weights are decompressed right before their first use: converters put them all in front."""
    waiting: dict[str, Step] = {}
    order: list[Step] = []

    def place(step: Step) -> None:
        for name in step.reads:
            if name in waiting:
                earlier = waiting[name]
                for output in earlier.operation.outputs:
                    del waiting[output.name]
                place(earlier)
        order.append(step)

    for step in steps:
        if step.operation.type.startswith("constexpr_"):
            waiting |= {t.name: step for t in step.operation.outputs}
        else:
            place(step)
    for step in {id(s): s for s in waiting.values()}.values():  # what the function returns as it is, or nobody uses
        place(step)
    return order


def _with_lifetimes(steps: list[Step], function: Function) -> tuple[Step, ...]:
    kept = {*function.outputs, *function.constants}
    last: dict[str, int] = {}
    for i, step in enumerate(steps):
        last |= dict.fromkeys((*(t.name for t in step.operation.outputs), *step.reads), i)
    done: list[list[str]] = [[] for _ in steps]
    for name, i in last.items():
        if name not in kept:
            done[i].append(name)
    return tuple(Step(s.operation, s.operator, s.arguments, tuple(d)) for s, d in zip(steps, done, strict=True))
