"""What the device reads: everything about a bundle that a player has to know.

Paths are relative to the bundle and stay inside it. Shapes are concrete: a bundle is for one geometry.
"""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from toolchain.formats.schedule import Leap

FORMAT_VERSION = 1
FILE_NAME = "manifest.json"


class Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _inside(path: str) -> str:
    parts = PurePosixPath(path)
    if not path or parts.is_absolute() or ".." in parts.parts or "\\" in path or ":" in path:
        raise ValueError(f"path '{path}' leaves the bundle")
    return path


BundlePath = Annotated[str, AfterValidator(_inside)]


class File(Entry):
    """A file of the bundle, by its path, size and digest."""

    path: BundlePath
    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class TensorSpec(Entry):
    """A tensor that crosses a border: of a component, or of a block."""

    name: str
    dtype: Literal["float16", "float32", "int32"]
    shape: list[int]


class InputSpec(TensorSpec):
    """An input of a block. ``source`` is ``inputs.NAME``, ``tables.NAME`` or ``BLOCK.OUTPUT``."""

    source: str


Rate = Literal["prompt", "step", "chunk", "frames", "encode_chunk", "encode_frames"]
"""How often something runs or changes: once for a prompt; at every denoising step; in the VAE for every micro
chunk of latents and for every group of frames (``encode_…`` for the encoder's)."""


class ComponentInput(TensorSpec):
    """An input of a component, and how often it changes."""

    rate: Rate
    meaning: str


class Accuracy(Entry):
    """A function of a block, executed and held against eager float32; the worst of its runs and outputs.

    ``relative_error`` is the norm of the difference over the norm of the reference; ``sqnr_db`` the same as a
    signal-to-noise ratio, 200 where there is no difference; ``max_abs`` the largest difference of a number.
    """

    relative_error: float
    cosine: float
    sqnr_db: float
    max_abs: float
    limit: float


class Activations(Entry):
    """The range of a function's activations in eager runs, as the artifact scales them.

    ``step`` is the step of the block's graph that gave the number farthest from zero. Over 65504 float16 overflows.
    """

    low: float
    high: float
    step: str


class BlockEntry(Entry):
    """One block. ``artifact`` is what an engine opens: a file, or a folder whose files are ``files``."""

    name: str
    artifact: BundlePath
    files: list[File]
    rate: Rate
    functions: list[str]
    inputs: list[InputSpec]
    outputs: list[TensorSpec]
    other_shapes: dict[str, dict[str, list[int]]] = Field(
        default_factory=dict, description="Shapes of ports, by function and port, where they differ from base."
    )
    parameters: int
    structure: str = Field(description="Digest shared by blocks that differ in their weights alone.")
    accuracy: dict[str, Accuracy] | None = Field(
        description="By function; null where the artifact was not executed (see gate)."
    )
    activations: dict[str, Activations] | None = Field(description="By function; null where accuracy is.")
    goldens: File | None = Field(description="Inputs and outputs to run the artifact on; null where accuracy is.")

    @model_validator(mode="after")
    def _own_files(self) -> BlockEntry:
        for file in self.files:
            if file.path != self.artifact and not file.path.startswith(f"{self.artifact}/"):
                raise ValueError(f"block '{self.name}': '{file.path}' is no file of '{self.artifact}'")
        return self


class Table(Entry):
    """A value known when the bundle was built, stored under its name in the component's tables file."""

    name: str
    dtype: Literal["float32"] = "float32"
    shape: list[int]


class Component(Entry):
    """A component of the model: run the blocks of a rate in their order, wiring inputs by ``source``.

    A block that lacks the function asked for runs ``base``.
    """

    precision: Literal["float16", "float32"]
    dims: dict[str, int]
    config: dict[str, Any]
    passes: list[str]
    inputs: list[ComponentInput]
    outputs: dict[Rate, list[str]] = Field(description="By rate, where the results come from: BLOCK.OUTPUT.")
    tables_file: File | None
    tables: list[Table]
    blocks: list[BlockEntry]
    load_order: dict[Rate, list[str]] = Field(description="By rate, blocks in the order in which they run.")
    resident: list[str] = Field(description="Blocks to keep loaded between runs; the others are freed after each.")


class StepEntry(Entry):
    """One call of the denoiser: at ``timestep``, with ``function``; then z += velocity · ``dt``."""

    timestep: float
    dt: float
    function: str
    leap: bool


class SamplerEntry(Entry):
    """Rectified flow. The velocity is the first half of the output's channels.

    The batch is the conditional half, then the unconditional one; v = u + guidance · (c - u).
    ``steps`` is the whole plan with a static leap taken; with a dynamic rule it is the plan without the
    leap, which the rule takes when it says so: then dt is timestep / 1000.
    """

    kind: Literal["rectified-flow"] = "rectified-flow"
    noise: Literal["philox4x32-10"] = Field(
        default="philox4x32-10", description="Initial latents: Philox counter, Box-Muller; see docs/manifest.md."
    )
    model_fps: float = Field(description="Value of the transformer's input fps.")
    guidance: float
    leap: Leap | None
    merged_steps: int
    timesteps: list[float] = Field(description="The whole schedule, before any leap.")
    steps: list[StepEntry]


class Geometry(Entry):
    """The video, in frames and pixels, and its latents."""

    frames: int
    height: int
    width: int
    fps: int
    latent_channels: int
    latent_frames: int
    latent_height: int
    latent_width: int


class TextEntry(Entry):
    """From a prompt to the text encoder's input: append, clean, tokenise, pad."""

    tokenizer: File
    kind: Literal["sentencepiece"] = "sentencepiece"
    max_tokens: int
    cleaning: Literal["open-sora-v1.2"] = "open-sora-v1.2"
    aesthetic_score: float | None


class ChunkEntry(Entry):
    """A micro chunk: ``latents`` latent frames become ``frames`` frames with the temporal decoder's ``function``."""

    latents: int
    frames: int
    function: str


class DecodingEntry(Entry):
    """From latents to frames: chunk by chunk in time, then ``frames_per_call`` frames at once in space.

    A last group with too few frames is filled up with any; frames do not influence one another.
    """

    chunks: list[ChunkEntry]
    frames_per_call: int


GateMode = Literal["every", "structure", "none", "interface"]


class GoldenVideo(Entry):
    """A video of the eager float32 pipeline: ``pixels`` uint8 ``[F, H, W, 3]`` in ``file``.

    ``psnr_db`` is what the bundle's own video had against it when it was built; ``limit_db`` what it must have.
    """

    file: File
    prompt: str
    seed: int
    psnr_db: float
    limit_db: float


class Gate(Entry):
    """What was done before this manifest was written.

    - ``every``: each artifact was executed.
    - ``structure``: one artifact of each structure was executed, for this checkpoint or an earlier one; every weight
      that was stamped was read back and held against its source by digest. No figures, no goldens.
    - ``none``: nothing was executed, as was asked for.
    - ``interface``: artifacts were read back; this machine could not execute them.
    """

    mode: GateMode
    seed: int
    inputs: int = Field(description="Number of inputs that each function was executed on.")
    limits: dict[str, float]


class TargetEntry(Entry):
    name: str
    options: dict[str, Any]


class Manifest(Entry):
    """The whole bundle."""

    format_version: int = FORMAT_VERSION
    name: str
    model: str
    target: TargetEntry
    geometry: Geometry
    memory_budget_bytes: int | None = Field(description="What residency was planned for; null: keep everything.")
    text: TextEntry | None
    sampler: SamplerEntry
    decoding: DecodingEntry | None
    components: dict[str, Component]
    gate: Gate
    golden: GoldenVideo | None = Field(description="Of the whole pipeline; null where none was made.")
    tools: dict[str, str]
    recipe: File
