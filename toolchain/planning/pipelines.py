"""A component's passes, imported and configured. They work on graphs, so they come with torch."""

from __future__ import annotations

from toolchain.errors import RecipeError
from toolchain.formats.recipe import Recipe
from toolchain.formats.schedule import BASE, MERGED
from toolchain.ir.functions import conditional
from toolchain.ir.passes import Pipeline, find_pass, passes_providing
from toolchain.ir.pipeline_text import parse_pipeline
from toolchain.models.family import ModelFamily


def load_pipeline(recipe: Recipe, component: str, family: ModelFamily) -> Pipeline:
    """A component's passes; where none of them partitions, the family's default partition is added.

    Raises:
        RecipeError: a pass is unknown, its options are wrong, a partition is not the last, or a function that the
            sampler asks for is provided by none.
    """
    key = f"{component}.passes"
    specs = recipe.components()[component].passes
    passes = [find_pass(s.name, s.options, f"{key}.{i}") for i, s in enumerate(specs)]
    cuts = [p for p in passes if p.phase == "partition"]
    if len(cuts) > 1 or (cuts and passes[-1] is not cuts[0]):
        raise RecipeError(f"{key}: '{cuts[0].name}' must be the last pass, and be listed once")
    if not cuts:
        ((name, options),) = parse_pipeline(family.default_partition(component))
        cuts = [find_pass(name, options, key)]
    pipeline = Pipeline(tuple(p for p in passes if p.phase == "rewrite"), cuts[0])
    for at, grouping in enumerate(passes):
        late = [p for p in passes[at:] if p.provides and p is not grouping and grouping.groups is not None]
        if late:
            raise RecipeError(
                f"{key}: '{late[0].name}' adds a function that '{grouping.name}' would know nothing of; list it before"
            )
    wanted = {"merged_steps": MERGED} if recipe.sampler.merged_steps else {}
    wanted |= {"conditional": conditional(BASE)} if recipe.sampler.conditional_steps else {}
    for asking, function in wanted.items() if component == "transformer" else ():
        if function not in pipeline.provides:
            known = ", ".join(passes_providing(function)) or "none"
            raise RecipeError(f"sampler.{asking}: needs a pass in {key} that provides '{function}'; installed: {known}")
    return pipeline
