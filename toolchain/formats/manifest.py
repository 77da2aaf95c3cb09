"""What the device reads: everything about a bundle that a player has to know.

Paths are relative to the bundle and stay inside it. Shapes are concrete: a bundle is for one geometry. Names (of ports,
tables, functions, blocks) mean nothing by themselves: whatever they are, the manifest says what each of them is for.
The format's history and what readers may expect of it are in docs/manifest.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Annotated, Any, Final, Literal, cast

from pydantic import AfterValidator, Field, model_validator

from toolchain.formats.calls import Rate, rounds, step_calls
from toolchain.formats.loading import Entry, Loading, check_plan
from toolchain.formats.sampling import SamplerEntry, check_conditional, check_ranges
from toolchain.formats.schedule import BASE
from toolchain.formats.tiles import Tiles
from toolchain.ir.dtypes import PortType
from toolchain.ir.feeds import Feed, Given

FORMAT_VERSION: Final = 7
FILE_NAME = "manifest.json"


def _inside(path: str) -> str:
    parts = PurePosixPath(path)
    if not path or parts.is_absolute() or ".." in parts.parts or "\\" in path or ":" in path:
        raise ValueError(f"path '{path}' leaves the bundle")
    return path


BundlePath = Annotated[str, AfterValidator(_inside)]


class File(Entry):
    """A file of the bundle, by its path, size and digest."""

    path: BundlePath = Field(description="Relative to the bundle.")
    bytes: int = Field(ge=0, description="Its size.")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="Of its bytes.")


class TensorSpec(Entry):
    """A tensor that crosses a border: of a component, or of a block."""

    name: str = Field(description="Means nothing by itself.")
    dtype: PortType = Field(description="Type of its numbers.")
    shape: list[int] = Field(description="Concrete sizes.")


class InputSpec(TensorSpec):
    """An input of a block. ``source`` is ``inputs.NAME``, ``tables.NAME`` or ``BLOCK.OUTPUT``."""

    source: str = Field(description="What it is given.")


class ComponentInput(TensorSpec):
    """An input of a component, what feeds it, and how often it changes."""

    rate: Rate = Field(description="How often it changes.")
    feed: Feed = Field(description="What it is given.")


class ComponentOutput(Entry):
    """A result of a component: ``source`` is ``BLOCK.OUTPUT``; ``gives`` says what it is."""

    source: str = Field(description="BLOCK.OUTPUT.")
    rate: Rate = Field(description="How often it is computed.")
    gives: Given = Field(description="What it is.")


class Accuracy(Entry):
    """A function of a block, executed and held against eager float32 on the weights that the artifact stores; the worst
    of its runs and outputs.

    ``relative_error`` is the norm of the difference over the norm of the reference; ``sqnr_db`` the same as a
    signal-to-noise ratio, 200 where there is no difference; ``max_abs`` the largest difference of a number.
    """

    relative_error: float = Field(description="Norm of the difference over norm of the reference.")
    cosine: float = Field(description="Between result and reference.")
    sqnr_db: float = Field(description="Signal to noise, in dB.")
    max_abs: float = Field(description="Largest difference of a number.")
    limit: float = Field(description="What relative_error may be.")


class Activations(Entry):
    """The range of a function's activations in eager runs, as the artifact scales them.

    ``step`` is the step of the block's graph that gave the number farthest from zero. Over 65504 float16 overflows.
    """

    low: float = Field(description="The least number.")
    high: float = Field(description="The greatest number.")
    step: str = Field(description="Which step of the graph gave the extreme.")


class Memory(Entry):
    """What a function is predicted to need at most: ``weights`` bytes, and beside them ``activations``.

    ``ports``, what it takes and gives, is part of the activations; ``waiting`` is not: values of other blocks that
    stay meanwhile, because they are needed later.
    """

    weights: int = Field(ge=0, description="Bytes of weights.")
    activations: int = Field(ge=0, description="Bytes beside them, ports included.")
    ports: int = Field(ge=0, description="Bytes that it takes and gives.")
    waiting: int = Field(ge=0, description="Bytes that other blocks' values take meanwhile.")


class BlockEntry(Entry):
    """One block. ``artifact`` is what an engine opens: a file, or a folder whose files are ``files``."""

    name: str = Field(description="Means nothing by itself.")
    artifact: BundlePath = Field(description="What an engine opens.")
    files: list[File] = Field(description="All files of the artifact.")
    rate: Rate = Field(description="How often it runs.")
    functions: list[str] = Field(description="What it can be asked for.")
    inputs: list[InputSpec] = Field(description="In order.")
    outputs: list[TensorSpec] = Field(description="In order.")
    other_shapes: dict[str, dict[str, list[int]]] = Field(
        default_factory=dict,
        description="Shapes of ports, by function and port, where they differ from the default function's.",
    )
    parameters: int = Field(description="How many numbers its weights have.")
    weight_bytes: dict[str, int] = Field(description="Bytes of its weights by how they are stored, such as float16.")
    quantized: dict[str, str] = Field(description="How weights are stored that are no plain numbers, by their names.")
    int8_inputs: list[str] = Field(
        default_factory=list,
        description="Names of the quantized weights whose linear layers round what comes in to int8, with a fixed "
        "scale for each function that they are in.",
    )
    structure: str = Field(description="Digest shared by blocks that differ in their weights alone.")
    accuracy: dict[str, Accuracy] | None = Field(
        description="By function; null where the artifact was not executed (see gate)."
    )
    quantization: dict[str, Accuracy] | None = Field(
        description="What storing weights so costs: eager float32 on the stored weights against eager float32 on the "
        "checkpoint's, by function; null where accuracy is, or nothing is quantized."
    )
    memory: dict[str, Memory] | None = Field(
        default=None, description="Bytes it is predicted to need, by function; null in bundles of before it was known."
    )
    activations: dict[str, Activations] | None = Field(description="By function; null where accuracy is.")
    goldens: File | None = Field(description="Inputs and outputs to run the artifact on; null where accuracy is.")

    @model_validator(mode="after")
    def _own_files(self) -> BlockEntry:
        for file in self.files:
            if file.path != self.artifact and not file.path.startswith(f"{self.artifact}/"):
                raise ValueError(f"block '{self.name}': '{file.path}' is no file of '{self.artifact}'")
        if unknown := set(self.int8_inputs) - self.quantized.keys():
            raise ValueError(f"block '{self.name}': int8_inputs: '{min(unknown)}' is no quantized weight")
        return self


class Table(Entry):
    """A value known when the bundle was built, stored under its name in the component's tables file."""

    name: str
    dtype: Literal["float32"] = "float32"
    shape: list[int]


class Component(Entry):
    """A component of the model: run the blocks of a rate in their order, wiring inputs by ``source``."""

    precision: PortType = Field(description="What it is computed in.")
    dims: dict[str, int] = Field(description="Sizes by the letters of its shapes.")
    config: dict[str, Any] = Field(description="The model's configuration.")
    passes: str = Field(description="The graph passes that ran, as text that a recipe accepts.")
    inputs: list[ComponentInput] = Field(description="What it takes.")
    outputs: list[ComponentOutput] = Field(description="What it gives.")
    default_function: str = Field(default=BASE, description="What a block runs that lacks the function asked for.")
    tables_file: File | None = Field(description="Where tables are; null: there are none.")
    tables: list[Table] = Field(description="Values that are known beforehand.")
    blocks: list[BlockEntry] = Field(description="What it consists of.")
    load_order: dict[Rate, list[str]] = Field(description="By rate, blocks in the order in which they run.")

    def own_function(self, block: BlockEntry, function: str) -> str:
        """The function that ``block`` runs when ``function`` is asked for."""
        return function if function in block.functions else self.default_function

    def results(self, gives: Given) -> list[ComponentOutput]:
        """The outputs that are what ``gives`` says."""
        return [o for o in self.outputs if o.gives == gives]

    def frame_sizes(self, rate: Rate) -> tuple[list[int], list[int]]:
        """Rows and columns of the frames that the blocks of a rate of decoding take and give; ``[]`` for none."""
        results = {o.source for o in self.outputs if o.rate == rate}
        taken = (i.shape for i in self.inputs if i.rate == rate and i.feed.kind == "frames")
        given = (o.shape for b in self.blocks for o in b.outputs if f"{b.name}.{o.name}" in results)
        return next(taken, [])[-2:], next(given, [])[-2:]

    @model_validator(mode="after")
    def _names_agree(self) -> Component:
        blocks = {b.name: b for b in self.blocks}
        ports = {f"{b.name}.{o.name}" for b in self.blocks for o in b.outputs}
        tables = {t.name for t in self.tables}
        known = ports | {f"tables.{t}" for t in tables} | {f"inputs.{i.name}" for i in self.inputs}
        for block in self.blocks:
            if self.default_function not in block.functions:
                raise ValueError(f"block '{block.name}' lacks the default function '{self.default_function}'")
            unknown = [i.source for i in block.inputs if i.source not in known]
            if unknown:
                raise ValueError(f"block '{block.name}' takes '{unknown[0]}', which nothing gives")
        ordered = [name for names in self.load_order.values() for name in names]
        if sorted(ordered) != sorted(blocks) or len(blocks) != len(self.blocks):
            raise ValueError("load_order does not name every block once")
        for rate, names in self.load_order.items():
            if any(blocks[name].rate != rate for name in names):
                raise ValueError(f"load_order.{rate} names a block of another rate")
        for what, names, among in (
            ("outputs", [o.source for o in self.outputs], ports),
            ("inputs", [i.feed.unconditional for i in self.inputs if i.feed.kind == "text_embedding"], tables),
        ):
            missing = [name for name in names if name not in among]
            if missing:
                raise ValueError(f"{what}: there is no '{missing[0]}'")
        return self


class Geometry(Entry):
    """The video, in frames and pixels, and its latents."""

    frames: int = Field(description="Frames of the video.")
    height: int = Field(description="Rows of a frame.")
    width: int = Field(description="Columns of a frame.")
    fps: int = Field(description="Frames per second.")
    latent_channels: int = Field(description="Channels of latents.")
    latent_frames: int = Field(description="Frames of latents.")
    latent_height: int = Field(description="Rows of latents.")
    latent_width: int = Field(description="Columns of latents.")


class Suffix(Entry):
    """``text`` is appended to a prompt that does not contain ``label``."""

    label: str
    text: str


class TextEntry(Entry):
    """From a prompt to the text encoder's input: append, clean, tokenise, pad.

    ``cleaning`` names a list of rules: those that web captions were cleaned with, or none.
    """

    tokenizer: File
    kind: Literal["sentencepiece"] = "sentencepiece"
    max_tokens: int
    suffixes: list[Suffix] = Field(default_factory=list)
    cleaning: Literal["web-captions", "none"]
    rate: Rate = Field(default="prompt", description="Rate of the text encoder's blocks.")


class Piece(Entry):
    """One call of a stage: it ``takes`` so many frames and ``gives`` so many, with ``function``."""

    takes: int = Field(ge=1)
    gives: int = Field(ge=1)
    function: str


class Stage(Entry):
    """One loop over time from latents to pixels: the blocks of ``rate``, piece by piece; results are joined in time.

    ``layout`` says how a stage takes and gives frames: ``clip`` is ``[1, C, T, H, W]``, ``frames`` is ``[T, C, H, W]``.
    A last piece with fewer frames than the input has is filled up with any; frames do not influence one another.
    With ``tiles``, the blocks run once for each tile of a piece.
    """

    rate: Rate
    layout: Literal["clip", "frames"]
    pieces: list[Piece]
    tiles: Tiles | None = Field(default=None, description="Tiles in space that are computed one by one; null: none.")


class DecodingEntry(Entry):
    """From latents to frames: the stages one after the other; the last gives pixels."""

    stages: list[Stage] = Field(min_length=1)


GateMode = Literal["release", "every", "structure", "none", "interface"]


class GoldenVideo(Entry):
    """A video of the eager float32 pipeline: ``pixels`` uint8 ``[F, H, W, 3]`` in ``file``.

    ``psnr_db`` is what the bundle's own video had against it when it was built; ``limit_db`` what it must have.
    """

    file: File = Field(description="Its pixels.")
    prompt: str = Field(description="What it shows.")
    seed: int = Field(description="Decides its noise.")
    psnr_db: float = Field(description="Of the bundle's own video against it.")
    limit_db: float = Field(description="The least that it may be.")


class Gate(Entry):
    """What was done before this manifest was written.

    - ``release``: every function of each artifact was executed, on all inputs and on its goldens.
    - ``every``: so was the first artifact of each structure; of the others ``base``, on one input. Blocks have figures
      and goldens of the functions that were executed.
    - ``structure``: one artifact of each structure was executed, for this checkpoint or an earlier one; every weight
      that was stamped was read back and held against its source by digest. No figures, no goldens.
    - ``none``: nothing was executed, as was asked for.
    - ``interface``: artifacts were read back; this machine could not execute them.
    """

    mode: GateMode = Field(description="What was executed.")
    seed: int = Field(description="Of the inputs.")
    inputs: int = Field(description="Number of inputs that a function was executed on, at most.")
    limits: dict[str, float] = Field(description="Largest relative error, by precision.")


class TargetEntry(Entry):
    """The target and its options."""

    name: str = Field(description="Such as coreml.")
    options: dict[str, Any] = Field(description="Its options, as a recipe has them.")


class Manifest(Entry):
    """The whole bundle."""

    format_version: Literal[7]
    name: str = Field(description="The bundle's name, for people.")
    model: str = Field(description="The model family.")
    target: TargetEntry = Field(description="What artifacts are for.")
    geometry: Geometry
    memory_budget_bytes: int | None = Field(
        description="Memory for weights and activations that loading was planned for; null: everything is kept."
    )
    text: TextEntry | None
    sampler: SamplerEntry
    decoding: DecodingEntry | None
    components: dict[str, Component] = Field(description="By name, such as transformer.")
    gate: Gate
    golden: GoldenVideo | None = Field(description="Of the whole pipeline; null where none was made.")
    tools: dict[str, str] = Field(description="Versions that built it, by package.")
    recipe: File = Field(description="The recipe that gives the same bundle again.")
    loading: Loading = Field(
        description="What to load, run and free, in order, for a whole video; blocks are COMPONENT/BLOCK."
    )

    @model_validator(mode="after")
    def _functions_exist(self) -> Manifest:
        loops = [("transformer", self.sampler.each, [s.function for s in self.sampler.steps])]
        loops += [
            ("vae", s.rate, [p.function for p in s.pieces]) for s in (self.decoding.stages if self.decoding else [])
        ]
        for name, rate, asked in loops:
            if name not in self.components:
                continue
            component = self.components[name]
            have = {f for b in component.blocks if b.rate == rate for f in b.functions}
            missing = [f for f in asked if f not in have]
            if missing:
                raise ValueError(f"{name}: no block of rate '{rate}' has the function '{missing[0]}'")
        return self

    @model_validator(mode="after")
    def _steps_agree(self) -> Manifest:
        if "transformer" in self.components:
            check_ranges(self.sampler, self.components["transformer"])
            check_conditional(self.sampler, self.components["transformer"])
        return self

    @model_validator(mode="after")
    def _tiles_agree(self) -> Manifest:
        frame = [self.geometry.latent_height, self.geometry.latent_width]
        for stage in self.decoding.stages if self.decoding and "vae" in self.components else []:
            taken, given = self.components["vae"].frame_sizes(stage.rate)
            if stage.tiles is not None:
                stage.tiles.check(taken, given, frame)
            frame = given if stage.tiles is None else [n * stage.tiles.scale for n in frame]
        return self

    @model_validator(mode="after")
    def _loading_agrees(self) -> Manifest:
        check_plan(self.loading.plan, self.calls())
        return self

    def calls(self) -> Iterator[tuple[str, str]]:
        """``COMPONENT/BLOCK`` and function of every call of a whole video, in order."""
        for calls in self.rounds():
            yield from calls

    def rounds(self) -> Iterator[tuple[tuple[str, str], ...]]:
        """The same, by round: the calls of a component's rate, once."""
        s = self.sampler
        steps, stages = step_calls(s.steps, s.ranges, s.rule), self.decoding.stages if self.decoding else []
        text = self.text.rate if self.text else "prompt"
        for round_ in rounds(self.components, steps, stages, text=text, once=s.once, each=s.each):
            component = self.components[round_.component]
            blocks = {b.name: b for b in component.blocks}
            asked = round_.function or component.default_function
            yield tuple(
                (f"{round_.component}/{name}", component.own_function(blocks[name], asked))
                for name in component.load_order.get(cast(Rate, round_.rate), [])
                if name not in round_.skipped
            )
