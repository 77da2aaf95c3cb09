"""Makes the tiny checkpoint, stage by stage; every stage resumes where it was stopped.

    python -m training.train all
    python -m training.train transformer --steps 12000

The stages, in order, are tokenizer, text, vae-spatial, vae-temporal, latents, transformer, vae-decoders, check,
evaluate and export.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import torch

from training import autoencoder, diffusion, evaluate, export, language
from training.loop import Plan


def stages(args: argparse.Namespace, device: str) -> dict[str, Callable[[], object]]:
    """What each stage runs, in order."""
    out, seed = args.out, args.seed

    def plan(own: Plan) -> Plan:
        return dataclasses.replace(own, steps=args.steps) if args.steps else own

    return {
        "tokenizer": lambda: language.train_tokenizer(out, seed),
        "text": lambda: language.train_text(out, seed, plan(language.TEXT), device),
        "vae-spatial": lambda: autoencoder.train_spatial(out, seed, plan(autoencoder.SPATIAL), device),
        "vae-temporal": lambda: autoencoder.train_temporal(out, seed, plan(autoencoder.TEMPORAL), device),
        "latents": lambda: diffusion.cache_latents(out, seed, device),
        "transformer": lambda: diffusion.train_transformer(out, seed, plan(diffusion.FLOW), device),
        "vae-decoders": lambda: autoencoder.train_decoders(out, seed, plan(autoencoder.DECODERS), device),
        "check": lambda: evaluate.check_judge(out, seed),
        "evaluate": lambda: [print(k, evaluate.evaluate(out, args.guidance, args.seeds, k)) for k in args.on],
        "export": lambda: print(f"{export.export(out, args.into)} bytes in {args.into}"),
    }


def main() -> None:
    """Run a stage, or all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "runs" / "main", help="what is trained")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="instead of the stage's own number; more than before trains on")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--guidance", type=float, default=evaluate.GUIDANCE)
    parser.add_argument("--seeds", type=int, default=5, help="evaluate: videos a held-out scene")
    parser.add_argument("--on", nargs="+", choices=evaluate.KINDS, default=evaluate.KINDS[:3], help="evaluate: on what")
    parser.add_argument("--into", type=Path, default=Path("recipes/tiny"), help="export: the folder to write to")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    runs = stages(args, "cuda" if torch.cuda.is_available() else "cpu")
    if args.stage not in (*runs, "all"):
        parser.error(f"no stage '{args.stage}'; choose one of {', '.join(runs)}, all")
    for name in runs if args.stage == "all" else [args.stage]:
        runs[name]()


if __name__ == "__main__":
    main()
