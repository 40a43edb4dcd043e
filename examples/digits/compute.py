"""How often should the VAE learn? REPA-E with --vae-every K at equal compute, on digits.

    python -m examples.digits.compute --folder build/digits-compute

The VAE's part is most of a step of REPA-E. With K > 1 steps are cheaper and latents follow the encoder more slowly: at
equal steps that must lose, so the question is Fréchet distance at equal processor time. K = 1 trains for --steps; what
the others cost a step is measured first, and they train for as long. REPA, whose VAE stays frozen and whose latents are
cached, is the limit of K. Every run is also measured after --steps. The judge is that of `examples.digits.study`.
"""

import argparse
import json
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from configs.parsing import positive_int
from examples.digits import judge, study
from utils.errors import command

TURNS = {"K = 1": 1, "K = 2": 2, "K = 4": 4, "REPA, frozen VAE": None}
CALIBRATION = (20, 80)  # steps of the two runs whose difference tells what a step costs


def train(folder: Path, name: str, every: int | None, steps: int, seed: int, **options) -> float:
    """One run; returns the seconds of a core that it took."""
    exps = folder / "exps"
    options = study.sit_options(folder, steps, seed) | options | dict(exp_name=name, vae_ckpt=exps / "vae/vae.pt")
    options |= dict(enc_type=f"timm:local-dir:{folder / 'encoder'}")
    if every is None:
        return study.run("train_ldm_only.py", *study.flags(**options, vae_latents_name="vae"))
    options |= dict(vae_every=every, disc_pretrained_ckpt=exps / "vae/vae-discriminator-ckpt.pt")
    return study.run("train_repae.py", *study.flags(**options, **study.vae_options(rate=1e-4)))


def seconds_of_a_step(folder: Path) -> dict[str, float]:
    """Of a core, for each way to train; measured one after the other."""
    few, more = CALIBRATION
    costs = {}
    for method, every in TURNS.items():
        short, long = (
            train(folder, "calibration", every, steps, 0, checkpointing_steps=few + more) for steps in (few, more)
        )
        costs[method] = (long - short) / (more - few)
    return costs


def follow(args, method: str, steps: int, seed: int, network, real) -> dict:
    """Train one method with one seed, and measure it after --steps and at its end."""
    name = f"every-{TURNS[method] or 'never'}-{seed}"
    seconds = train(args.folder, name, TURNS[method], steps, seed, checkpointing_steps=args.steps)
    found = {"seconds": seconds, "steps": steps}
    for at in {args.steps, steps}:
        found[at] = study.measure(args.folder, name, at, seed, network, real)
    print(f"seed {seed}, {method}: {steps} steps, {seconds / 60:.1f} min, FD {found[steps]['fd']:.2f}", flush=True)
    return found


def table(results: dict[str, list[dict]], costs: dict[str, float], steps: int) -> str:
    """Mean and standard deviation over seeds, as Markdown."""
    head = [
        "the VAE learns",
        "ms a step",
        f"FD, {steps} steps",
        "steps",
        "minutes of a core",
        "FD",
        "accuracy",
        "VAE, dB",
    ]
    rows = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for method, runs in results.items():
        ends = [run[run["steps"]] for run in runs]
        cells = [method, f"{1000 * costs[method]:.0f}", spread([run[steps]["fd"] for run in runs], ".2f")]
        cells += [str(runs[0]["steps"]), f"{statistics.mean(run['seconds'] for run in runs) / 60:.1f}"]
        cells += [
            spread([end[key] for end in ends], form)
            for key, form in (("fd", ".2f"), ("accuracy", ".1%"), ("psnr", ".2f"))
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def spread(values: list[float], form: str) -> str:
    deviation = f" ({statistics.stdev(values):{form}})" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{deviation}"


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("build/digits-compute"))
    parser.add_argument("--steps", type=positive_int, default=600, help="of K = 1")
    parser.add_argument("--vae-steps", type=positive_int, default=600)
    parser.add_argument("--seeds", type=positive_int, default=3)
    args = parser.parse_args(argv)

    # Once for all: data, encoder, VAE, judge; and what a step costs.
    torch.set_num_threads(1)
    started = time.perf_counter()
    args.folder.mkdir(parents=True, exist_ok=True)
    study.prepare(args.folder, args.vae_steps)
    real, labels = judge.load_digits_data(args.folder / "data")
    network, held_out = judge.train_judge(real, labels)
    costs = seconds_of_a_step(args.folder)

    # As many steps as the processor time of K = 1 pays for.
    steps = {method: round(args.steps * costs["K = 1"] / costs[method]) for method in TURNS}
    tasks = [(method, seed) for seed in range(args.seeds) for method in TURNS]
    with ThreadPoolExecutor(study.CORES) as pool:  # a process of one thread for each core
        found = pool.map(lambda task: follow(args, task[0], steps[task[0]], task[1], network, real), tasks)
        measured = dict(zip(tasks, found, strict=True))
    results = {method: [measured[method, seed] for seed in range(args.seeds)] for method in TURNS}

    # What came out.
    (args.folder / "results.json").write_text(json.dumps({"seconds_of_a_step": costs, "runs": results}, indent=1))
    report = table(results, costs, args.steps)
    (args.folder / "compute.md").write_text(report + "\n")
    print(f"The judge recognises {held_out:.1%} of real digits that it never saw.\n\n{report}")
    print(f"\n{(time.perf_counter() - started) / 60:.1f} minutes in all")


if __name__ == "__main__":
    main()
