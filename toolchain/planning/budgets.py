"""The budgets that a recipe has: weights to be kept as small, or as well, as they ask."""

from __future__ import annotations

from toolchain.errors import RecipeError
from toolchain.formats.budget import Budget, read_budget
from toolchain.formats.recipe import Recipe

PASS = "quantize"
"""The pass that sets how weights are kept."""
DEFAULT = (
    "float int8 int4{block=32 symmetric=false clip=error} int4{block=64 symmetric=false clip=error} "
    "palette{bits=8} palette{bits=6} palette{bits=6 group=32} palette{bits=6 group=16} palette{bits=4} "
    "palette{bits=4 group=16} palette{bits=3} palette{bits=3 group=16} palette{bits=2}"
)
"""What is looked at unless a user says otherwise; what a target cannot keep is left out."""


def budgets_of(recipe: Recipe) -> dict[str, tuple[Budget, str]]:
    """The budgets that a recipe's passes have, with their candidates, by component.

    Raises:
        RecipeError: a budget is wrong, or something stands beside it.
    """
    found = {}
    for name, part in recipe.components().items():
        for number, spec in enumerate(part.passes):
            if spec.name == PASS and "budget" in spec.options:
                key = f"{name}.passes.{number}.{PASS}"
                if others := spec.options.keys() - {"budget", "candidates"}:
                    raise RecipeError(f"{key}: '{min(others)}' has no place beside a budget, which takes 'candidates'")
                ways = spec.options.get("candidates", DEFAULT)
                if not isinstance(ways, str):
                    raise RecipeError(f"{key}.candidates: expected one text, such as '{DEFAULT[:26]}…'")
                found[name] = read_budget(spec.options["budget"], f"{key}.budget"), ways
    return found
