"""The plan of a sampling job, for `generate.py --dry-run`: FLOPs, memory, disk and time, by shapes alone."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from sampling.generation import AUTOCAST, SamplerConfig, decode_latents, sample_latents
from sampling.job import SamplingJob
from sampling.store import SampleStore
from utils.costs import aligned, flops_lines, gb, memory_lines, time_lines
from utils.counting import Cost, shapes_alone, to_shapes
from utils.parts import Part, Parts

PLAIN, GUIDED, GUIDE, DECODE = "SiT, conditional", "SiT, guided", "SiT, guiding", "VAE decode"


def evaluations(sampler: SamplerConfig, *, guide: bool = False) -> Counter[str]:
    """How often the sampler evaluates the network without and with classifier-free guidance, and the guide of
    autoguidance if there is one: it is run with stand-ins that count."""
    counted = Counter()

    class Stand(SimpleNamespace):
        def __call__(self, x_t: Tensor, t: Tensor, labels: Tensor):
            counted[self.name or (GUIDED if len(x_t) == 2 else PLAIN)] += 1
            return torch.zeros_like(x_t), []

    sit = Stand(name=None, in_channels=1, grid=1, patch_size=1, null_label=0, pos_embed=torch.zeros(1))
    weaker = Stand(name=GUIDE) if guide else None
    sample_latents(sit, [0], torch.zeros(1, dtype=torch.int64), 0, sampler, guide=weaker)
    return counted


def sample_cost(job: SamplingJob, batch_size: int) -> tuple[dict[Part, float], Counter[str]]:
    """FLOPs of one sample by part, and the most memory in bytes by kind, with so many samples at a time.

    The job's networks have shapes in place of weights from here on.
    """
    sit, vae, sampler = job.trained.sit, job.trained.vae, job.sampler
    times, parts = evaluations(sampler, guide=job.guide is not None), Parts()
    dtype = AUTOCAST.get(sampler.precision)
    channels, side = sit.in_channels, sit.grid * sit.patch_size
    with shapes_alone(), torch.no_grad():
        for network in (*job.networks, vae):
            to_shapes(network)
        weights = [tensor for network in (*job.networks, vae) for tensor in (*network.parameters(), *network.buffers())]
        with Cost(parts, {"weights": weights}) as cost:
            x = torch.empty(batch_size, channels, side, side, dtype=torch.float64)  # the sampler's state
            for name in times:
                doubled = 2 if name == GUIDED else 1
                x_t, t = x.float().repeat(doubled, 1, 1, 1), torch.empty(doubled * batch_size)
                labels = torch.empty(doubled * batch_size, dtype=torch.int64)
                network, half = job.networks[name == GUIDE], dtype is not None
                with parts.module(name, network), torch.autocast("cpu", dtype or torch.bfloat16, enabled=half):
                    network(x_t, t, labels)[0].float()
                del x_t
            with parts.module(DECODE, vae.decoder):
                decode_latents(vae, x, *torch.empty(2, 1, channels, 1, 1))
    times[DECODE] = 1
    return {
        part: flops * times[part.name] / batch_size for part, flops in cost.flops.items() if times[part.name]
    }, cost.peak


def plan_text(job: SamplingJob, store: SampleStore, processes: int, extra_bytes: int) -> str:
    """What the job is, and what it costs.

    Args:
        extra_bytes: what is written beside the `.npz`.
    """
    lines, left = [], store.count
    if store.interrupted() is not None:
        left = sum(len(store.indices(batch)) for batch in store.missing())
        found = f"an interrupted job lies at {store.job_file}: {store.count - left:,} of its samples are finished"
        lines.append(f"{found}, and are taken over if all that they depend on is the same")
    times, sampler = evaluations(job.sampler, guide=job.guide is not None), job.sampler
    batches = f"{store.num_batches:,} batches of {store.batch_size} on {processes} process{'es' * (processes > 1)}"
    lines.append(f"{left:,} samples of {store.shape[1]} px, {batches}, precision {sampler.precision}")
    lines.append(f"{sampler.nfe()} evaluations of SiT a sample, {times[GUIDED] + times[GUIDE]} of them guided")

    flops, peak = sample_cost(job, store.batch_size)
    size = int(np.prod(store.shape, dtype=np.int64))
    disk = [("disk", ""), (str(store.target), gb(size)), ("beside it, until it is written", gb(size))]
    disk += [("PNG, at most", gb(extra_bytes))] if extra_bytes else []
    total = sum(flops.values()) * left
    half, tf32 = sampler.precision in AUTOCAST, job.args.tf32 or sampler.precision == "tf32"
    paragraphs = [
        [f"note: {note}" for note in job.notes],
        lines,
        [*flops_lines(flops, "sample"), "a multiply-add is 2, and products alone count"],
        [*memory_lines(peak), "without workspaces and fragmentation"],
        aligned(disk),
        time_lines(total, processes, half=half, tf32=tf32, unit="hours"),
    ]
    return "\n\n".join("\n".join(paragraph) for paragraph in paragraphs if paragraph)
