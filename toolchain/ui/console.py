"""What people see: answers on stdout, progress and errors on stderr, an exit code for scripts."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from toolchain.errors import RecipeError, ResourceError, SoraCompileError, interrupted
from toolchain.listener import Listener

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.progress import Progress, TaskID

    from toolchain.formats.manifest import Accuracy
    from toolchain.formats.recipe import Recipe
    from toolchain.ir.graph import Graph
    from toolchain.system.events import Event

INTERRUPTED = 130


class Console:
    """Runs the body of a command: turns errors into one line and an exit code.

    Args:
        kept: what stays of a command that is interrupted, if anything does.
    """

    def __init__(self, as_json: bool, verbose: bool, kept: str | None = None) -> None:
        self.as_json, self.verbose, self.kept = as_json, verbose, kept
        # lowering redirects the process's streams to silence converters; these stay what they were
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        self._err = os.fdopen(os.dup(2), "w", encoding="utf-8")

    def __enter__(self) -> Console:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        code, line = explained(error)
        if code == INTERRUPTED and self.kept:
            line = f"interrupted; {self.kept}"
        if line:
            if self.verbose and trace is not None:
                self._err.write("".join(traceback.format_exception(error)))
            self._err.write(f"sora-compile: {line}\n")
            if self.as_json:
                self._out.write(json.dumps({"error": line, "exit_code": code}) + "\n")
        for stream in (self._out, self._err):
            with contextlib.suppress(BrokenPipeError):
                stream.flush()
        if error is not None and not isinstance(error, SystemExit):
            sys.exit(code)

    def answer(self, data: Any, text: RenderableType | None) -> None:
        """Print the answer: ``data`` as JSON, or ``text`` for people."""
        if self.as_json or text is None:
            self._out.write(json.dumps(data, indent=1) + "\n")
            return
        from rich.console import Console as RichConsole

        width = None if self._out.isatty() else 140
        RichConsole(file=self._out, width=width, highlight=False, soft_wrap=not self._out.isatty()).print(text)

    def note(self, text: RenderableType) -> None:
        """Say on stderr what people may like to know; with ``--json`` the answer says it."""
        if not self.as_json:
            from rich.console import Console as RichConsole

            RichConsole(file=self._err, highlight=False, soft_wrap=not self._err.isatty()).print(text)

    def warn(self, text: str) -> None:
        """Say something on stderr that does not stop the command."""
        self._err.write(f"sora-compile: warning: {text}\n")

    @contextlib.contextmanager
    def stages(self) -> Iterator[Callable[[str, int, int], None]]:
        """Progress bars for stages, by name, done and total; drawn on a terminal only."""
        with self._bar() as bar:
            tasks: dict[str, TaskID] = {}

            def update(stage: str, done: int, total: int) -> None:
                if stage not in tasks:
                    tasks[stage] = bar.add_task("", total=total, component=stage)
                bar.update(tasks[stage], completed=done, total=total)

            yield update

    @contextlib.contextmanager
    def progress(self, print_after: str | None, also: Sequence[Listener] = ()) -> Iterator[ConsoleListener]:
        """A listener that draws a progress bar (on a terminal), or writes a line a block with ``-v``.

        Args:
            also: are told of events.
        """
        with self._bar() as bar:
            yield ConsoleListener(bar, self.verbose, print_after, also)

    def _bar(self) -> Progress:
        from rich.console import Console as RichConsole
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        console = RichConsole(file=self._err, highlight=False)
        columns = (TextColumn("{task.fields[component]}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        text = TextColumn("{task.description}")
        return Progress(*columns, text, console=console, transient=True, disable=not console.is_terminal)


def explained(error: BaseException | None) -> tuple[int, str | None]:
    """A command's exit code, and the line about what it ended with; None if there is nothing to say."""
    if error is None or isinstance(error, SystemExit):
        return 0, None
    if interrupted(error):
        return INTERRUPTED, "interrupted; nothing was written"
    if isinstance(error, SoraCompileError):
        return error.exit_code, " ".join(str(error).split())
    if isinstance(error, MemoryError):
        return ResourceError.exit_code, "out of memory; cut smaller blocks (partition: {max_bytes: …})"
    if isinstance(error, OSError) and error.filename is not None:
        return ResourceError.exit_code, f"{error.filename}: {error.strerror}"
    reason = " ".join(str(error).split()) or type(error).__name__
    return 1, f"internal error ({type(error).__name__}): {reason}; run again with -v and report it"


class ConsoleListener(Listener):
    """Draws progress; prints graphs after the passes that were asked for; hands events on to ``also``."""

    def __init__(self, bar: Progress, verbose: bool, print_after: str | None, also: Sequence[Listener] = ()) -> None:
        self._bar, self._verbose, self._print_after, self._also = bar, verbose, print_after, also
        self._tasks: dict[str, TaskID] = {}
        self._builds: TaskID | None = None
        self._pool: TaskID | None = None
        self._remarks: set[str] = set()

    def check_print_after(self, recipe: Recipe) -> None:
        """Refuse a pass that this recipe does not run, before anything is built."""
        if self._print_after in (None, "all"):
            return
        from toolchain.models.family import find_family
        from toolchain.planning.pipelines import load_pipeline
        from toolchain.planning.plan import PRINTED

        family = find_family(recipe.model)
        passes = (load_pipeline(recipe, name, family) for name in recipe.components())
        known = {*PRINTED, *(p.name for pipeline in passes for p in pipeline)}
        if self._print_after not in known:
            raise RecipeError(
                f"--print-after {self._print_after}: no such pass in this recipe; it runs {', '.join(sorted(known))}"
            )

    def graph(self, component: str, after: str, graph: Graph) -> None:
        if self._print_after in ("all", after.partition("{")[0]):
            from toolchain.ir.graph_text import graph_text

            self._write(f"// after {after} ({component})\n{graph_text(graph)}")

    def event(self, event: Event) -> None:
        for listener in self._also:
            listener.event(event)

    def build(self, name: str, number: int, builds: int) -> None:
        if self._builds is None:
            self._builds = self._bar.add_task("", total=builds, component="builds")
        self._bar.update(self._builds, completed=number - 1, description=name)

    def built(self, name: str, error: BaseException | None) -> None:
        for task in self._tasks.values():
            self._bar.remove_task(task)
        self._tasks.clear()
        if error is not None:
            self._write(f"failed: {explained(error)[1]}")
        elif self._verbose:
            self._write(f"{name}: done")

    def lined_up(self, tasks: int, cached: int) -> None:
        if tasks:
            self._pool = self._bar.add_task(f"{cached} in the cache", total=tasks, component="tasks")

    def task_done(self, done: int, tasks: int) -> None:
        if self._pool is not None:
            self._bar.update(self._pool, completed=done)

    def start(self, component: str, blocks: list[str]) -> None:
        self._tasks[component] = self._bar.add_task("", total=len(blocks), component=component)

    def working(self, component: str, block: str, what: str) -> None:
        self._bar.update(self._tasks[component], description=f"{block}: {what}")

    def finished(self, component: str, block: str, accuracy: Mapping[str, Accuracy] | None) -> None:
        self._bar.advance(self._tasks[component])
        if self._verbose:
            figures = ", ".join(f"{f} {a.relative_error:.2g}" for f, a in (accuracy or {}).items())
            self._write(f"{component}/{block}: done" + (f"; relative error {figures}" if figures else ""))

    def remark(self, text: str) -> None:
        if text not in self._remarks:
            self._remarks.add(text)
            self._write(text)

    def _write(self, text: str) -> None:
        self._bar.console.print(text, markup=False, soft_wrap=True)
