"""`python -m sightline.tiny`: train the demonstration checkpoints, report on them, or draw a sample scene."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from sightline.tiny import HERE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m sightline.tiny", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    train = verbs.add_parser("train", help="train from nothing and write the checkpoints")
    names = ("describe", "enhance", "embed", "blip", "generate", "all")
    train.add_argument("which", nargs="?", choices=names, default="all")
    train.add_argument("--seed", type=int, default=0, help="seed of weights and data (default 0)")
    train.add_argument("--steps", type=int, help="one leg of so many optimiser steps (default: all legs)")
    train.add_argument(
        "--minutes", type=float, help="end each leg after this much wall time; its schedule is fitted to it"
    )
    train.add_argument("--threads", type=int, default=2, help="torch threads (default 2)")
    train.add_argument(
        "--resume", action="store_true", help="one more leg of describe, generate or blip from --out; needs --steps"
    )
    train.add_argument("--out", type=Path, default=HERE, help="folder that gets a folder for each")
    report = verbs.add_parser("report", help="measure both checkpoints; writes REPORT.md and report.json")
    report.add_argument("--scenes", type=int, default=200, help="scenes of each kind (default 200)")
    report.add_argument("--seed", type=int, default=20_000, help="seed of the scenes (default 20000)")
    retrieval = verbs.add_parser("retrieval", help="nDCG@5 of the embedder on held-out captions, as JSON")
    retrieval.add_argument("--scenes", type=int, default=500, help="pairs of scene and caption (default 500)")
    retrieval.add_argument("--seed", type=int, default=20_000, help="seed of the scenes (default 20000)")
    retrieval.add_argument("--folder", type=Path, default=HERE / "embed", help="the checkpoint")
    answers = verbs.add_parser("answers", help="exact answers of the generator on fresh scenes, as JSON")
    answers.add_argument("--scenes", type=int, default=200, help="prompts of each kind (default 200)")
    answers.add_argument("--seed", type=int, default=20_000, help="seed of the scenes (default 20000)")
    answers.add_argument("--folder", type=Path, default=HERE / "generate", help="the checkpoint")
    captions = verbs.add_parser("captions", help="exact captions of the captioner on fresh scenes, as JSON")
    captions.add_argument("--scenes", type=int, default=500, help="scenes of each kind (default 500)")
    captions.add_argument("--seed", type=int, default=20_000, help="seed of the scenes (default 20000)")
    captions.add_argument("--folder", type=Path, default=HERE / "blip", help="the checkpoint")
    scene = verbs.add_parser("scene", help="draw a scene to a PNG and print its caption")
    scene.add_argument("out", type=Path)
    scene.add_argument("--seed", type=int, default=None)
    return parser


def _train(args: argparse.Namespace) -> None:
    if args.resume and not (args.steps and args.which in ("describe", "generate", "blip")):
        sys.exit("--resume is for `train describe|generate|blip --steps N`")
    # Spinning OpenMP threads make every step up to ten times slower on a shared machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    import torch

    from sightline.tiny import captioner, describer, embedder, enhancer, generator, report

    torch.set_num_threads(args.threads)
    modules = {"enhance": enhancer, "describe": describer, "embed": embedder, "blip": captioner}
    for name, module in {**modules, "generate": generator}.items():
        if args.which not in (name, "all"):
            continue
        path = args.out / name / report.RECORD
        legs = json.loads(path.read_text())["legs"] if args.resume else []
        for number, steps in enumerate((args.steps,) if args.steps else module.LEGS):
            is_resumed = args.resume or number > 0
            record = _leg(module, args.out / name, args, seed=args.seed + number, steps=steps, resume=is_resumed)
            legs.append(record)
            path.write_text(json.dumps({"legs": legs, "hardware": report.hardware()}, indent=2) + "\n")
            sys.stdout.write(json.dumps({name: record}) + "\n")


def _leg(
    module: ModuleType, out: Path, args: argparse.Namespace, *, seed: int, steps: int, resume: bool
) -> dict[str, Any]:
    """One training with a learning-rate schedule of its own; returns its record."""
    command = f"python -m sightline.tiny train {out.name} --seed {seed} --steps {steps} --threads {args.threads}"
    if args.minutes:
        command += f" --minutes {args.minutes:g}"
    if resume:
        command += " --resume"
    options = {"resume": True} if resume else {}
    return {"command": command, **module.train(out, seed=seed, steps=steps, minutes=args.minutes, **options)}


def _report(args: argparse.Namespace) -> None:
    from sightline.tiny import report

    figures = report.write(args.scenes, args.seed)
    sys.stdout.write(report.page(figures))


def _retrieval(args: argparse.Namespace) -> None:
    from sightline.tiny import retrieval

    sys.stdout.write(json.dumps(retrieval.report(args.scenes, args.seed, args.folder), indent=2) + "\n")


def _answers(args: argparse.Namespace) -> None:
    from sightline.tiny import answers

    sys.stdout.write(json.dumps(answers.measure(args.scenes, args.seed, args.folder), indent=2) + "\n")


def _captions(args: argparse.Namespace) -> None:
    from sightline.tiny import captions

    sys.stdout.write(json.dumps(captions.measure(args.scenes, args.seed, args.folder), indent=2) + "\n")


def _scene(args: argparse.Namespace) -> None:
    import numpy as np

    from sightline.tiny import scenes

    scene = scenes.draw_scene(np.random.default_rng(args.seed))
    scenes.render(scene).save(args.out)
    sys.stdout.write(scenes.caption(scene) + "\n")


def main(argv: list[str] | None = None) -> None:
    """Run one of the verbs."""
    args = _parser().parse_args(argv)
    verbs = {"train": _train, "report": _report, "retrieval": _retrieval, "answers": _answers}
    verbs |= {"captions": _captions, "scene": _scene}
    verbs[args.verb](args)


if __name__ == "__main__":
    main()
