"""What the user writes: one file that says which model, for which device, how."""

from __future__ import annotations

import difflib
import re
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    WithJsonSchema,
    field_validator,
    model_serializer,
    model_validator,
)

from toolchain.errors import RecipeError
from toolchain.formats.pass_specs import Named, PassSpecs
from toolchain.formats.schedule import PRESETS, Leap, timesteps
from toolchain.validation import Bytes, explain

IMAGE_FPS = 120
GATE_DEFAULTS = {"float32": 1e-3, "float16": 2e-2}
"""Largest relative error of a block by precision: norm of the difference over norm of the reference."""


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class TargetSpec(Named):
    """A target: ``coreml``, or ``{name: coreml, precision: float32}``."""

    @model_serializer
    def _flat(self) -> str | dict[str, Any]:
        return {"name": self.name, **self.options} if self.options else self.name


def _target(value: Any) -> Any:
    if isinstance(value, str):
        return TargetSpec(name=value)
    if isinstance(value, dict) and isinstance(value.get("name"), str):
        return TargetSpec(name=value["name"], options={k: v for k, v in value.items() if k != "name"})
    if isinstance(value, TargetSpec):
        return value
    raise ValueError("expected a target's name, or 'name: coreml' with its options beside it")


Target = Annotated[
    TargetSpec,
    BeforeValidator(_target),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "object", "required": ["name"], "properties": {"name": {"type": "string"}}},
            ]
        }
    ),
]


class Video(Strict):
    """The video to make. Sizes are pixels; one geometry a bundle, since blocks have fixed shapes."""

    frames: int = Field(ge=1, description="Number of frames: 1, or 17 and more.")
    height: int = Field(ge=16, le=4096)
    width: int = Field(ge=16, le=4096)
    fps: int = Field(default=24, ge=1, le=240)

    @property
    def latent_frames(self) -> int:
        """Chunks of 17 frames become 5 latent frames; a rest of r becomes ⌈r/4⌉."""
        return self.frames // 17 * 5 + -(-(self.frames % 17) // 4)

    @property
    def latent_size(self) -> tuple[int, int]:
        """Latent height and width: an eighth, what does not fit being cropped."""
        return self.height // 8, self.width // 8


def _leap(value: Any) -> Any:
    """A preset's name, or the number of ordinary steps before a static leap, for short."""
    if isinstance(value, bool):
        return value
    if isinstance(value, int):
        return {"kind": "static", "after": value}
    if isinstance(value, str):
        if value not in PRESETS:
            raise ValueError(f"no leap rule is called '{value}'; known: {', '.join(PRESETS)}")
        return PRESETS[value].model_dump()
    return value


class _LeapShorthands:
    """Adds the short ways to write a leap to the JSON Schema."""

    def __get_pydantic_json_schema__(self, core_schema: Any, handler: Any) -> dict[str, Any]:
        return {"anyOf": [handler(core_schema), {"type": "integer", "minimum": 1}, {"enum": list(PRESETS)}]}


class SamplerRecipe(Strict):
    """How the video is denoised: rectified flow, with the two ways to do it in less time."""

    steps: int = Field(default=30, ge=1, le=1000)
    guidance: float = Field(default=7.0, ge=0, description="Scale of classifier-free guidance.")
    leap: Annotated[Leap | None, BeforeValidator(_leap), _LeapShorthands()] = Field(
        default=None,
        description="Linear Proportional Leap: ordinary steps before the leap, a preset's name, or a rule.",
    )
    merged_steps: int = Field(default=0, ge=0, description="How many of the first steps run with merged tokens.")
    discrete_timesteps: bool = Field(
        default=False, description="Round timesteps to whole numbers before the transform."
    )

    @model_validator(mode="after")
    def _fits(self) -> SamplerRecipe:
        if self.merged_steps > self.steps:
            raise ValueError(f"merged_steps {self.merged_steps} is more than steps {self.steps}")
        if self.leap is not None:
            try:
                self.leap.check(self.steps)
            except RecipeError as e:
                raise ValueError(str(e)) from e
        return self


class ComponentRecipe(Strict):
    """One component: where its weights are and what is done to its graph."""

    checkpoint: str = Field(description="Path, hf://owner/name[@revision][/folder] or shipped://name.")
    sha256: str | None = Field(default=None, description="Digest of a local checkpoint; refuse any other content.")
    config: dict[str, Any] | None = Field(
        default=None, description="The model's configuration; read beside the weights if absent."
    )
    precision: str | None = Field(default=None, description="The target's precision for this component alone.")
    passes: PassSpecs = Field(default_factory=list, description="Graph passes, in order; the one that partitions last.")


class TextEncoderRecipe(ComponentRecipe):
    tokenizer: str = Field(
        default="spiece.model", description="The sentencepiece model: a file beside the weights, or a path."
    )
    aesthetic_score: float | None = Field(
        default=6.5, description="Appended to every prompt, as the official code does."
    )


class VaeRecipe(ComponentRecipe):
    passes: PassSpecs = Field(
        default_factory=lambda: [Named(name="partition", options={"max_bytes": "200MB"})],
        description="Graph passes, in order; the one that partitions last.",
    )
    frames_per_call: int | None = Field(
        default=None,
        ge=1,
        description="Frames that the spatial decoder takes at once; a divisor of the frames up to 4 if absent.",
    )
    encoder: bool = Field(default=False, description="Lower the encoder too, for images given as condition.")


class TransformerRecipe(ComponentRecipe):
    frame_conditions: bool = Field(default=False, description="Accept frames given as condition (input x_mask).")


class GoldenRecipe(Strict):
    """A prompt whose video is made eagerly in float32, held against the bundle's, and stored with it."""

    prompt: str = Field(min_length=1)
    seed: int = Field(default=0, ge=0, lt=1 << 64)
    min_psnr_db: float = Field(default=40.0, description="Least peak signal-to-noise ratio of the bundle's video.")


class GateRecipe(Strict):
    """The accuracy gate: every artifact is executed and held against eager float32."""

    max_relative_error: dict[str, float] = Field(
        default_factory=lambda: dict(GATE_DEFAULTS), description="Largest relative error of a block, by precision."
    )
    mode: Literal["every", "structure", "none"] = Field(
        default="every",
        description="Execute every artifact; or one of each structure, checking the others' weights; or nothing.",
    )
    inputs: int = Field(default=2, ge=2, le=64, description="Number of inputs that each function is executed on.")
    seed: int = Field(default=0, ge=0, description="Seed of the inputs.")
    golden: GoldenRecipe | None = Field(
        default=None, description="Also hold a whole video against the eager pipeline's; loads whole components."
    )

    @field_validator("max_relative_error")
    @classmethod
    def _known(cls, limits: dict[str, float]) -> dict[str, float]:
        for name in limits:
            if name not in GATE_DEFAULTS:
                close = difflib.get_close_matches(name, GATE_DEFAULTS, n=1)
                hint = f"did you mean '{close[0]}'?" if close else f"known: {', '.join(GATE_DEFAULTS)}"
                raise ValueError(f"no precision is called '{name}'; {hint}")
        return limits


class Recipe(Strict):
    """A whole build. See ``sora-compile schema recipe``."""

    version: Literal[1] = 1
    name: str = Field(min_length=1, description="Name of the bundle, for people.")
    model: Literal["open-sora-v1.2"]
    video: Video
    sampler: SamplerRecipe = SamplerRecipe()
    text_encoder: TextEncoderRecipe | None = None
    transformer: TransformerRecipe
    vae: VaeRecipe | None = None
    target: Target
    memory_budget: Bytes | None = Field(
        default=None, description="Memory for weights on the device, as '2.5GB'; decides which blocks stay loaded."
    )
    gate: GateRecipe = GateRecipe()

    @model_validator(mode="after")
    def _fits(self) -> Recipe:
        try:
            self.timesteps()
        except RecipeError as e:
            raise ValueError(f"video: {e}") from e
        return self

    def components(self) -> dict[str, ComponentRecipe]:
        """The components that the recipe has, in the order in which they run."""
        parts: dict[str, ComponentRecipe | None] = {
            "text_encoder": self.text_encoder,
            "transformer": self.transformer,
            "vae": self.vae,
        }
        return {name: part for name, part in parts.items() if part is not None}

    @property
    def model_fps(self) -> float:
        """What the model is told as frames per second: a single frame counts as 120, as in its training."""
        return float(IMAGE_FPS if self.video.frames == 1 else self.video.fps)

    def timesteps(self) -> tuple[float, ...]:
        """The denoising timesteps, 1000 … 0, before any leap."""
        video, sampler = self.video, self.sampler
        return timesteps(
            sampler.steps,
            height=video.height,
            width=video.width,
            frames=video.frames,
            discrete=sampler.discrete_timesteps,
        )

    def to_yaml(self) -> str:
        """The recipe with every default written out."""
        data = self.model_dump(mode="json")
        text: str = yaml.dump(data, Dumper=_Quoting, sort_keys=False, allow_unicode=True, width=100)
        return text


def shipped() -> dict[str, Path]:
    """The recipes that come with this package, by name."""
    import recipes

    folder = Path(next(iter(recipes.__path__)))
    return {p.stem: p for p in sorted(folder.glob("*.yaml"))}


def find_recipe(name: str | Path) -> Path:
    """The recipe file that a path or a shipped name means.

    Raises:
        RecipeError: there is none.
    """
    path = Path(name)
    known = shipped()
    if path.is_file():
        return path
    stem = path.name.removesuffix(".yaml") if len(path.parts) == 1 else ""
    if stem in known:
        return known[stem]
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    hint = f"did you mean '{close[0]}'?" if close else f"shipped recipes: {', '.join(known)}"
    raise RecipeError(f"recipe '{name}' is neither a file nor a shipped recipe; {hint}")


def load_recipe(name: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Load a recipe by path or shipped name, with ``a.b=value`` overrides applied.

    Raises:
        RecipeError: names the key, what is wrong with it, and the key that was meant where one is close.
    """
    path = find_recipe(name)
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeys)
    except yaml.MarkedYAMLError as e:
        line = f":{e.problem_mark.line + 1}" if e.problem_mark else ""
        raise RecipeError(f"{path}{line}: not YAML: {e.problem}") from e
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
        raise RecipeError(f"{path}: cannot be read: {e}") from e
    if not isinstance(data, dict):
        raise RecipeError(f"{path}: expected keys and values; see 'sora-compile schema recipe'")
    for override in overrides:
        _override(data, override)
    return parse_recipe(data)


def parse_recipe(data: Mapping[str, Any]) -> Recipe:
    """A recipe from plain data, as YAML gives it.

    Raises:
        RecipeError: as :func:`load_recipe`.
    """
    try:
        return Recipe.model_validate(data)
    except ValidationError as e:
        raise RecipeError(explain(e, Recipe)) from e


class _UniqueKeys(yaml.SafeLoader):
    """YAML in which a key given twice is an error, not the last one's victory, and 1e-3 is a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node)
            if not isinstance(key, Hashable):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a name", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key '{key}' is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Quoting(yaml.SafeDumper):
    """Puts text that looks like a number in quotes, by the same rule."""


# YAML 1.1 wants a dot in every float; JSON, YAML 1.2 and people do not
for _yaml in (_UniqueKeys, _Quoting):
    _yaml.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+[eE][-+]?\d+$"), list("-+0123456789"))


def _names_passes(key: str, text: str) -> bool:
    """Whether a value is a text of passes, which YAML could take for something else: ``a{x={b: 1}}``."""
    return key.split(".")[1:2] == ["passes"] and len(key.split(".")) <= 3 and text[:1] not in tuple("[{'\"")


def _override(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"--set {override}: expected key=value, such as sampler.steps=20")
    *parents, last = key.split(".")
    try:
        value = text if _names_passes(key, text) else yaml.load(text, Loader=_UniqueKeys)
    except yaml.YAMLError as e:
        raise RecipeError(f"--set {override}: the value is not YAML") from e
    place: Any = data
    for i, part in enumerate(parents):
        if isinstance(place, list):
            if not part.isdigit() or int(part) >= len(place):
                raise RecipeError(f"--set {override}: '{part}' is not an index into a list of {len(place)}")
            place = place[int(part)]
        elif isinstance(place, dict):
            if isinstance(place.get(part), str) and part == "target":
                place[part] = {"name": place[part]}
            place = place.setdefault(part, {})
        if not isinstance(place, (dict, list)):
            raise RecipeError(f"--set {override}: '{'.'.join(parents[: i + 1])}' has no keys in it")
    if isinstance(place, dict):
        place[last] = value
    elif last.isdigit() and int(last) < len(place):
        place[int(last)] = value
    else:
        raise RecipeError(f"--set {override}: '{last}' is not an index into a list of {len(place)}")
