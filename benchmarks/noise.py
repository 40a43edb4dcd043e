"""How long the noise of a batch takes, by several schemes that make a sample depend on its own number alone.

    python -m benchmarks.noise [--batch-size 256] [--repeats 20]

The first line is no such scheme: it draws the batch at once, and shows what the others cost beyond the numbers
themselves. Processor time is measured, and the fastest of the repeats counts, as other load only ever slows them down.
`utils.rng.sample_normal` takes the fastest of the schemes that give the same bits on every machine.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from utils.rng import sample_normal, seed_of

SHAPES = ((4, 32, 32), (32, 16, 16))  # latents of f8d4 and f16d32 at 256 x 256 pixels
KEY = seed_of(0, "noise")
MULTIPLIERS, WEYL = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)  # of Philox4x32 (Salmon et al. 2011)


def at_once(indices: Sequence[int], shape: tuple[int, ...]) -> np.ndarray:
    generator = np.random.Generator(np.random.Philox(key=KEY))
    return generator.standard_normal((len(indices), *shape), dtype=np.float32)


def per_sample(streams: Callable[[Sequence[int]], Iterator[np.random.Generator]]) -> Callable:
    def draw(indices: Sequence[int], shape: tuple[int, ...]) -> np.ndarray:
        out = np.empty((len(indices), *shape), dtype=np.float32)
        for row, stream in zip(out, streams(indices), strict=True):
            stream.standard_normal(dtype=np.float32, out=row)
        return out

    return draw


def new_philox(indices: Sequence[int]) -> Iterator[np.random.Generator]:
    return (np.random.Generator(np.random.Philox(key=[KEY, index])) for index in indices)


def new_pcg64(indices: Sequence[int]) -> Iterator[np.random.Generator]:
    return (np.random.Generator(np.random.PCG64DXSM([KEY, index])) for index in indices)


def one_philox(indices: Sequence[int]) -> Iterator[np.random.Generator]:
    """One counter-based generator, put at the beginning of each sample's stream in turn."""
    philox = np.random.Philox(key=[KEY, 0])
    start, generator = philox.state, np.random.Generator(philox)
    for index in indices:
        start["state"]["key"][1] = index
        philox.state = start
        yield generator


def box_muller(indices: Sequence[int], shape: tuple[int, ...]) -> np.ndarray:
    """Philox4x32-10 of all samples together, in whole-array arithmetic, and Box-Muller."""
    # The counter: four numbers of 32 bits, the place within the sample and the sample's number.
    low, count = np.uint64(0xFFFFFFFF), int(np.prod(shape))
    counters = np.arange(count // 4, dtype=np.uint64)[None, :]
    sample = np.asarray(indices, dtype=np.uint64)[:, None]
    x = [np.broadcast_to(part, (len(indices), count // 4)) for part in (counters, sample, sample >> np.uint64(32), 0)]
    x = [part.astype(np.uint64) for part in x]

    # Ten rounds: low and high halves of two products, with the key mixed in.
    keys = [KEY & 0xFFFFFFFF, KEY >> 32]
    for _ in range(10):
        first, second = (x[2 * i] * np.uint64(MULTIPLIERS[i]) for i in (0, 1))
        high_1, high_2 = first >> np.uint64(32), second >> np.uint64(32)
        x = [high_2 ^ x[1] ^ np.uint64(keys[0]), second & low, high_1 ^ x[3] ^ np.uint64(keys[1]), first & low]
        keys = [(key + weyl) & 0xFFFFFFFF for key, weyl in zip(keys, WEYL, strict=True)]

    # Box-Muller: two uniform numbers to two normal ones.
    uniform = np.stack([(part.astype(np.float32) + 0.5) * np.float32(2**-32) for part in x], axis=-1)
    radius, angle = np.sqrt(-2 * np.log(uniform[..., :2])), 2 * np.float32(np.pi) * uniform[..., 2:]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=-1).reshape(len(indices), *shape)


def torch_generator(indices: Sequence[int], shape: tuple[int, ...]) -> torch.Tensor:
    out, generator = torch.empty(len(indices), *shape), torch.Generator()
    for row, index in zip(out, indices, strict=True):
        torch.randn(shape, generator=generator.manual_seed(seed_of(KEY, index)), out=row)
    return out


def in_use(indices: Sequence[int], shape: tuple[int, ...]) -> torch.Tensor:
    return sample_normal(0, "noise", indices, shape)


SCHEMES = {
    "the whole batch at once (no scheme)": at_once,
    "a new NumPy Philox for each sample": per_sample(new_philox),
    "a new NumPy PCG64DXSM for each sample": per_sample(new_pcg64),
    "one NumPy Philox, set for each sample": per_sample(one_philox),
    "Philox4x32 and Box-Muller on arrays": box_muller,
    "a torch generator, seeded for each sample *": torch_generator,
    "a new NumPy SFC64 for each sample: in use": in_use,
}


def milliseconds(draw: Callable, indices: Sequence[int], shape: tuple[int, ...], repeats: int) -> float:
    best = float("inf")
    for _ in range(repeats):
        start = time.process_time()
        draw(indices, shape)
        best = min(best, time.process_time() - start)
    return 1000 * best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=256, help="samples")
    parser.add_argument("--repeats", type=int, default=20, help="of which the fastest counts")
    args = parser.parse_args()
    torch.set_num_threads(1)

    # Both ways to Philox's streams are one.
    indices = range(1000, 1000 + args.batch_size)
    for shape in SHAPES:
        assert np.array_equal(per_sample(new_philox)(indices, shape), per_sample(one_philox)(indices, shape))

    print(f"| milliseconds for {args.batch_size} samples | {' | '.join('x'.join(map(str, s)) for s in SHAPES)} |")
    print(f"|---|{'---:|' * len(SHAPES)}")
    for name, draw in SCHEMES.items():
        times = [milliseconds(draw, indices, shape, args.repeats) for shape in SHAPES]
        print(f"| {name} | {' | '.join(f'{time:.1f}' for time in times)} |")
    why = "torch.randn has other code for processors without AVX2 (ATEN_CPU_CAPABILITY=default shows it)"
    print(f"\n* Its bits depend on the processor: {why}.")


if __name__ == "__main__":
    main()
