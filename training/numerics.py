"""How a run computes: precision, kernels, compiling; set for the process, and said in a line."""

import argparse
import os

import torch

from utils.distributed import launcher_notes

AUTOCAST = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}


def set_numerics(args: argparse.Namespace, device: torch.device) -> list[str]:
    """Set torch's switches as the options say, and `args.compile` where nobody did; returns notes."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.allow_tf32
    notes = []
    if args.mixed_precision == "fp16" and device.type == "cpu":
        notes.append("--mixed-precision fp16 is slow on a CPU; 'no' computes in float32")
    if args.compile is None:
        args.compile = device.type == "cuda"
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    steps = str(args.gradient_accumulation_steps)
    return notes + launcher_notes(
        mixed_precision=(args.mixed_precision, f"--mixed-precision {args.mixed_precision}"),
        gradient_accumulation_steps=(steps, f"--gradient-accumulation-steps {steps}"),
        dynamo_backend=("inductor" if args.compile else "no", "--compile" if args.compile else "--no-compile"),
    )


def how_it_computes(args: argparse.Namespace, device: torch.device, world_size: int, *, compiled: str) -> str:
    """One line for the log: images a step, card, precision, and what is compiled, where --compile holds."""
    share = f"{args.batch_size // world_size} on each of {world_size}"
    micro = f", {args.gradient_accumulation_steps} times a step" if args.gradient_accumulation_steps > 1 else ""
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    exact = "TF32" if args.allow_tf32 and device.type == "cuda" else "float32"
    precision = exact if args.mixed_precision == "no" else f"{args.mixed_precision} autocast over {exact}"
    compiling = f"compiled: {compiled}" if args.compile else "not compiled"
    images = f"{args.batch_size} images a step = {share}{micro}"
    return f"{images} ({card}, {torch.get_num_threads()} threads); {precision}; {compiling}"
