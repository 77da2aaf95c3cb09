"""Lowering a block to a Core ML package."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
import torch
from coremltools.converters.mil import Builder

from targets.coreml.canonical import canonicalise
from targets.coreml.float16 import with_own_float16
from targets.coreml.quantized import Plan, Quantized, StandIns, with_quantized
from targets.coreml.validation import validated_at_the_ends
from targets.exporting import export, reason
from targets.streams import quiet
from toolchain.errors import LoweringError
from toolchain.ir.activations import rounded_layers
from toolchain.ir.blocks import Block, Port
from toolchain.ir.target import Artifact, distinct_functions, port_dtype
from toolchain.system.disk import full_disk_named
from toolchain.system.memory import release

PRECISIONS = {"float16": ct.precision.FLOAT16, "float32": ct.precision.FLOAT32}


def lower(block: Block, weights: Mapping[str, torch.Tensor], out: Path, precision: str) -> Artifact:
    """One package with a function per function; their equal weights are stored once, quantized ones as they are kept.

    A block with one function gets a plain package, whose function Core ML calls ``main``.
    """
    functions = distinct_functions(block)
    quantized = Quantized(block.weights, weights)
    own = tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.stem}-")
    named = full_disk_named(out.parent, next_bytes=block.weight_bytes)
    with quiet(), validated_at_the_ends(), own as tmp, named:
        packages = {}
        for f in functions:
            packages[f] = _convert(block, f, weights, precision, Path(tmp) / f"{f}.mlpackage", quantized)
            release()
        merged = ct.utils.MultiFunctionDescriptor()
        for function, path in packages.items():
            merged.add_function(str(path), src_function_name="main", target_function_name=function)
        merged.default_function_name = "base"
        ct.utils.save_multifunction(merged, str(out))
    canonicalise(out)
    return Artifact(out, functions)


def _convert(
    block: Block,
    function: str,
    weights: Mapping[str, torch.Tensor],
    precision: str,
    path: Path,
    quantized: Quantized,
) -> Path:
    compute = PRECISIONS[precision]
    program = export(block.unrounded(), function, StandIns(quantized, weights))
    pipeline = ct.PassPipeline.DEFAULT
    if precision == "float16":
        pipeline = with_own_float16(pipeline)
    if quantized.weights:
        scales = {name: weights[scale] for name, scale in rounded_layers(block.functions[function]).items()}
        pipeline = with_quantized(pipeline, Plan(quantized, program, scales))
    signature = block.signatures[function]
    # operators without a name are counted, and only the end of a conversion sets the count back: what else this
    # process built of MIL would change our bytes
    Builder.name_count.clear()
    try:
        model = ct.convert(
            program,
            convert_to="mlprogram",
            inputs=[
                ct.TensorType(name=p.name, shape=p.shape, dtype=numpy_dtype(p, precision)) for p in signature.inputs
            ],
            outputs=[ct.TensorType(name=p.name, dtype=numpy_dtype(p, precision)) for p in signature.outputs],
            minimum_deployment_target=ct.target.iOS18,
            compute_precision=compute,
            pass_pipeline=pipeline,
            skip_model_load=True,
        )
        model.save(str(path))
    except LoweringError as e:
        raise LoweringError(f"block '{block.name}', function '{function}': {e}") from e
    except Exception as e:  # the converter raises whatever it likes
        raise LoweringError(f"block '{block.name}', function '{function}': Core ML cannot lower it: {reason(e)}") from e
    return path


def numpy_dtype(port: Port, precision: str) -> Any:
    """The numpy type of a port in the package."""
    return getattr(np, port_dtype(port, precision).name)
