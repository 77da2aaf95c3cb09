"""What the user writes: one file that says which model, for which device, how."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, Protocol

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
    field_validator,
    model_serializer,
    model_validator,
)

from toolchain import plugins
from toolchain.errors import RecipeError
from toolchain.formats.environment import escaped
from toolchain.formats.pass_specs import Named, PassSpecs
from toolchain.formats.reuse import Conditional, Difference, Reuse, check_reuse
from toolchain.formats.schedule import PRESETS, Leap, plan_steps
from toolchain.formats.yaml_text import QuotingDumper
from toolchain.ir.dtypes import DTYPES, INT8_ACTIVATIONS
from toolchain.validation import Bytes

GATE_DEFAULTS = {"float32": 1e-3, "float16": 2e-2, INT8_ACTIVATIONS: 1e-1}
"""Largest relative error of a block by precision: norm of the difference over norm of the reference."""
COMPONENTS = ("text_encoder", "transformer", "vae")
QUANTIZATION_DEFAULT = 0.1
"""Largest relative error of a block that storing its weights in few bits may cost."""


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

    frames: int = Field(ge=1, description="Number of frames; which there can be is up to the model.")
    height: int = Field(ge=16, le=4096, description="Rows of a frame.")
    width: int = Field(ge=16, le=4096, description="Columns of a frame.")
    fps: int = Field(default=24, ge=1, le=240, description="Frames per second; the model is told, too.")


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


def _listed(value: Any) -> Any:
    """One entry stands for a list of one."""
    return [value] if isinstance(value, dict | Reuse) else value


class SamplerRecipe(Strict):
    """How the video is denoised: rectified flow, with the ways to do it in less time."""

    steps: int = Field(default=30, ge=1, le=1000, description="Denoising steps of the full schedule.")
    guidance: float = Field(default=7.0, ge=0, description="Scale of classifier-free guidance.")
    leap: Annotated[Leap | None, BeforeValidator(_leap), _LeapShorthands()] = Field(
        default=None,
        description="Linear Proportional Leap: ordinary steps before the leap, a preset's name, or a rule.",
    )
    merged_steps: int = Field(default=0, ge=0, description="How many of the first steps run with merged tokens.")
    reuse: Annotated[list[Reuse], BeforeValidator(_listed)] = Field(
        default=[], description="Steps that leave out blocks, and take what these added at an earlier step."
    )
    conditional: Conditional | None = Field(
        default=None, description="Steps that compute the conditional half of guidance alone."
    )
    discrete_timesteps: bool = Field(
        default=False, description="Round timesteps to whole numbers before the transform."
    )
    transform_scale: float = Field(
        default=1.0,
        gt=0,
        le=1000,
        description="Scale of the transform of timesteps: more than 1 spends more steps at high noise.",
    )

    @property
    def conditional_steps(self) -> list[int]:
        """Places of the steps that compute the conditional half alone."""
        return self.conditional.steps if self.conditional is not None else []

    @property
    def difference(self) -> Difference:
        """What stands for the difference of the halves at these steps."""
        return self.conditional.difference if self.conditional is not None else "none"

    @model_validator(mode="after")
    def _fits(self) -> SamplerRecipe:
        if self.merged_steps > self.steps:
            raise ValueError(f"merged_steps {self.merged_steps} is more than steps {self.steps}")
        try:
            if self.leap is not None:
                self.leap.check(self.steps)
            self._check_reuse()
        except RecipeError as e:
            raise ValueError(str(e)) from e
        return self

    def _check_reuse(self) -> None:
        """As far as it can be without knowing which blocks there are: ranges are told apart by what they are called."""
        ruled = [r.rule for r in self.reuse if r.rule is not None]
        if ruled and len(self.reuse) > 1:
            raise RecipeError("reuse: a rule chooses the steps of one range; list no other entry beside it")
        names = [f"blocks {' to '.join(r.blocks)}" if r.blocks else "the longest range" for r in self.reuse]
        if len(set(names)) < len(names):
            raise RecipeError("reuse: two entries are for the same blocks; list their steps in one")
        steps = plan_steps(
            [float(self.steps - i) for i in range(self.steps)],
            self.leap,
            conditional_steps=self.conditional_steps,
            reuse={name: own.steps or () for name, own in zip(names, self.reuse, strict=True)},
        )
        for rule in ruled:
            rule.check(steps)
        check_reuse(steps, {name: {name} for name in names}, self.difference)


class LoraRecipe(Strict):
    """A LoRA adapter that is merged into a component's weights while they are stamped."""

    checkpoint: str = Field(description="Path, hf://owner/name[@revision][/folder or /file.safetensors].")
    weight: float = Field(default=1.0, ge=-100, le=100, description="How much of it is added.")
    sha256: str | None = Field(default=None, description="Digest of a local adapter; refuse any other content.")


def _lora(value: Any) -> Any:
    return {"checkpoint": value} if isinstance(value, str) else value


class ComponentRecipe(Strict):
    """One component: where its weights are and what is done to its graph."""

    checkpoint: str = Field(
        description="Path, hf://owner/name[@revision][/folder] or shipped://name; #KEY chooses one of several "
        "state_dicts in a file of torch.save."
    )
    sha256: str | None = Field(default=None, description="Digest of a local checkpoint; refuse any other content.")
    loras: list[Annotated[LoraRecipe, BeforeValidator(_lora)]] = Field(
        default=[], description="LoRA adapters to merge into the weights, in order; a location alone will do."
    )
    config: dict[str, Any] | None = Field(
        default=None, description="The model's configuration; read beside the weights if absent."
    )
    precision: str | None = Field(default=None, description="The target's precision for this component alone.")
    license: str | None = Field(
        default=None,
        min_length=1,
        max_length=200,
        description="SPDX expression of the weights' licence, for artifacts.",
    )
    passes: PassSpecs = Field(default=[], description="Graph passes, in order; the one that partitions last.")


class TextEncoderRecipe(ComponentRecipe):
    """The text encoder: a component, and how prompts become its tokens."""

    tokenizer: str = Field(
        default="spiece.model", description="The sentencepiece model: a file beside the weights, or a path."
    )
    aesthetic_score: float | None = Field(
        default=6.5, description="Appended to every prompt, as the official code does."
    )


class TilesRecipe(Strict):
    """Tiles in space, in pixels: multiples of what one latent stands for, at most a frame."""

    height: int = Field(ge=1, description="Rows of a tile.")
    width: int = Field(ge=1, description="Columns of a tile.")
    overlap: int = Field(ge=0, description="Of neighbouring tiles, over which one fades into the other.")


class VaeRecipe(ComponentRecipe):
    """The VAE: a component, and how much of a video it takes at once."""

    frames_per_call: int | None = Field(
        default=None,
        ge=1,
        description="Frames that the spatial decoder takes at once; a divisor of the frames up to 4 if absent.",
    )
    tiles: TilesRecipe | None = Field(
        default=None, description="What the spatial decoder takes of each frame at once; whole frames if absent."
    )
    encoder: bool = Field(default=False, description="Lower the encoder too, for images given as condition.")


class TransformerRecipe(ComponentRecipe):
    """The denoiser: a component, and what it takes beside latents and a prompt."""

    frame_conditions: bool = Field(default=False, description="Accept frames given as condition (input x_mask).")


class GoldenRecipe(Strict):
    """A prompt whose video is made eagerly in float32, held against the bundle's, and stored with it."""

    prompt: str = Field(min_length=1, description="What the video shows.")
    seed: int = Field(default=0, ge=0, lt=1 << 64, description="Decides the initial noise.")
    min_psnr_db: float = Field(default=40.0, description="Least peak signal-to-noise ratio of the bundle's video.")


class GateRecipe(Strict):
    """The accuracy gate: every artifact is executed and held against eager float32."""

    max_relative_error: dict[str, float] = Field(
        default=dict(GATE_DEFAULTS), description="Largest relative error of a block, by precision."
    )
    max_quantization_error: dict[str, float] = Field(
        default={},
        description=f"Largest relative error that quantized weights may cost a block, by component; "
        f"{QUANTIZATION_DEFAULT} if absent.",
    )
    mode: Literal["release", "every", "structure", "none"] = Field(
        default="every",
        description="Execute every function of every artifact on all inputs; every artifact, and on all that of one "
        "of each structure; one of each structure, checking the others' weights; or nothing.",
    )
    inputs: int = Field(
        default=2, ge=2, le=64, description="Number of inputs that a function is executed on; 1 with gate structure."
    )
    seed: int = Field(default=0, ge=0, description="Seed of the inputs.")
    golden: GoldenRecipe | None = Field(
        default=None, description="Also hold a whole video against the eager pipeline's; loads whole components."
    )

    @field_validator("max_relative_error")
    @classmethod
    def _known(cls, limits: dict[str, float]) -> dict[str, float]:
        return _all_known(limits, [*(d.name for d in DTYPES.values() if d.is_float), INT8_ACTIVATIONS], "precision")

    @field_validator("max_quantization_error")
    @classmethod
    def _components(cls, limits: dict[str, float]) -> dict[str, float]:
        return _all_known(limits, COMPONENTS, "component")


def _all_known(limits: dict[str, float], known: Sequence[str], what: str) -> dict[str, float]:
    for name in limits:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean '{close[0]}'?" if close else f"known: {', '.join(known)}"
            raise ValueError(f"no {what} is called '{name}'; {hint}")
    return limits


class _Family(Protocol):
    """What is asked of a model family here: to refuse what none of its checkpoints can do."""

    def check(self, recipe: Recipe) -> None: ...


class Recipe(Strict):
    """A whole build. See ``sora-compile schema recipe``."""

    version: Literal[1] = 1
    name: str = Field(min_length=1, description="Name of the bundle, for people.")
    model: str = Field(description="The model family, such as open-sora-v1.2.")
    video: Video
    sampler: SamplerRecipe = SamplerRecipe()
    text_encoder: TextEncoderRecipe | None = None
    transformer: TransformerRecipe
    vae: VaeRecipe | None = None
    target: Target = Field(description="By name, or a mapping with its name and its options, such as precision.")
    device: str | None = Field(
        default=None,
        min_length=1,
        description="The device, by the name of a shipped profile or the path of one: how fast it loads and computes.",
    )
    memory_budget: Bytes | None = Field(
        default=None,
        description="Memory for weights and activations, as '2.5GB'; what the device gives an app if absent, and "
        "without a device as much as keeps everything.",
    )
    gate: GateRecipe = GateRecipe()

    @model_validator(mode="after")
    def _fits(self) -> Recipe:
        try:
            family: _Family = plugins.find(plugins.MODELS, self.model, "model", "model")()
            family.check(self)
        except RecipeError as e:
            raise ValueError(str(e)) from e
        return self

    def components(self) -> dict[str, ComponentRecipe]:
        """The components that the recipe has, in the order in which they run."""
        parts: dict[str, ComponentRecipe | None] = {
            "text_encoder": self.text_encoder,
            "transformer": self.transformer,
            "vae": self.vae,
        }
        return {name: part for name, part in parts.items() if part is not None}

    def located(self, place: Callable[[str], str]) -> Recipe:
        """The recipe with every location of weights as ``place`` gives it."""
        data = self.model_dump(mode="json")
        for name in self.components():
            for part in (data[name], *data[name]["loras"]):
                part["checkpoint"] = place(part["checkpoint"])
        return Recipe.model_validate(data)

    def to_yaml(self) -> str:
        """The recipe with every default written out, as a file that reads nothing from the environment."""
        data = escaped(self.model_dump(mode="json"))
        text: str = yaml.dump(data, Dumper=QuotingDumper, sort_keys=False, allow_unicode=True, width=100)
        return text
