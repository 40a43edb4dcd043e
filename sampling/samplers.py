"""Samplers: from noise at t = 1 to data at t = 0, along SiT's ODE (Euler, Heun) or SDE (Euler-Maruyama).

A sampler sees the network only as `velocity(x_t, t, labels)`. The state is kept in float64; the network gets float32.
"""

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from models.interpolant import score_from_velocity, shift_time

Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]

SDE_LAST_TIME = 0.04  # the SDE's last noisy time; from there one noiseless step leads to t = 0 (SiT, appendix)


def ode_times(num_steps: int, time_shift: float = 1.0) -> Tensor:
    """(num_steps + 1,) float64 from 1 to 0, evenly spaced before they are shifted (`shift_time`)."""
    return shift_time(torch.linspace(1, 0, num_steps + 1, dtype=torch.float64), time_shift)


def sde_times(num_steps: int, time_shift: float = 1.0) -> Tensor:
    """(num_steps + 1,) float64 from 1 to 0.04, evenly spaced before they are shifted, then 0."""
    noisy = torch.linspace(1, SDE_LAST_TIME, num_steps, dtype=torch.float64)
    return torch.cat([shift_time(noisy, time_shift), torch.zeros(1, dtype=torch.float64)])


def euler(
    velocity: Velocity,
    noise: Tensor,
    labels: Tensor,
    *,
    num_steps: int,
    guidance_scale: float = 1.0,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    null_label: int | None = None,
    time_shift: float = 1.0,
    guidance_channels: int | None = None,
    guide: Velocity | None = None,
) -> Tensor:
    """First-order ODE sampler.

    Args:
        velocity: callable (x_t float32 (B, C, H, W), t float32 (B,), labels (B,)) -> (B, C, H, W). With classifier-free
            guidance B is doubled: the given labels, then the null label.
        noise: (B, C, H, W) standard normal.
        labels: (B,) int64.
        num_steps: network evaluations in time, >= 1.
        guidance_scale: of guidance; 1 evaluates the conditional network alone.
        guidance_interval: (low, high): guidance only while low <= t <= high.
        null_label: the label of the unconditional network; needed for classifier-free guidance.
        time_shift: of the grid of times (`shift_time`); 1 leaves it even.
        guidance_channels: so many of the first channels alone are guided, as in LightningDiT; None: all.
        guide: autoguidance (arXiv 2406.02507): a weaker velocity, which gets the labels and takes the place of the
            unconditional one.

    Returns:
        x_0, float64 (B, C, H, W).
    """
    guidance = guidance_scale, guidance_interval, null_label, guidance_channels, guide
    guided = guided_velocity(velocity, labels, *guidance)
    x = noise.double()
    for t, t_next in _steps(ode_times(num_steps, time_shift)):
        x = x + (t_next - t) * guided(x, t, t)
    return x


def heun(
    velocity: Velocity,
    noise: Tensor,
    labels: Tensor,
    *,
    num_steps: int,
    guidance_scale: float = 1.0,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    null_label: int | None = None,
    time_shift: float = 1.0,
    guidance_channels: int | None = None,
    guide: Velocity | None = None,
) -> Tensor:
    """Second-order ODE sampler (EDM, arXiv 2206.00364, algorithm 1); the last step is an Euler step. As `euler`."""
    guidance = guidance_scale, guidance_interval, null_label, guidance_channels, guide
    guided = guided_velocity(velocity, labels, *guidance)
    x = noise.double()
    for t, t_next in _steps(ode_times(num_steps, time_shift)):
        slope = guided(x, t, t)
        predicted = x + (t_next - t) * slope
        if t_next > 0:
            # Guidance is on or off for the step as a whole, as in the public code.
            slope = (slope + guided(predicted, t_next, t)) / 2
            predicted = x + (t_next - t) * slope
        x = predicted
    return x


def euler_maruyama(
    velocity: Velocity,
    noise: Tensor,
    labels: Tensor,
    *,
    num_steps: int,
    path_type: str,
    step_noise: Callable[[int], Tensor],
    guidance_scale: float = 1.0,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    null_label: int | None = None,
    time_shift: float = 1.0,
    guidance_channels: int | None = None,
    guide: Velocity | None = None,
) -> Tensor:
    """SDE sampler with diffusion w_t = 2 t (SiT, eq. 10); the last step, from t = 0.04, adds no noise. As `euler`, and

    Args:
        num_steps: network evaluations, >= 2.
        path_type: "linear" or "cosine", as the model was trained.
        step_noise: `step_noise(i)` is the (B, C, H, W) standard normal of step i, for i = 0 .. num_steps - 2.
    """
    guidance = guidance_scale, guidance_interval, null_label, guidance_channels, guide
    guided = guided_velocity(velocity, labels, *guidance)
    x = noise.double()
    for i, (t, t_next) in enumerate(_steps(sde_times(num_steps, time_shift))):
        v = guided(x, t, t)
        diffusion = 2 * t
        t_like_x = torch.full((), t, dtype=x.dtype, device=x.device)  # made there: a copy would wait for the device

        # Backwards in time the drift is the velocity minus half the diffusion times the score (SiT, eq. 10).
        drift = v - 0.5 * diffusion * score_from_velocity(v, x, t_like_x, path_type)
        x = x + (t_next - t) * drift
        if t_next > 0:  # the last step is noiseless
            x = x + (diffusion * (t - t_next)) ** 0.5 * step_noise(i).double()
    return x


def _steps(times: Tensor) -> Iterator[tuple[float, float]]:
    values = times.tolist()  # float64 both ways: exact
    return itertools.pairwise(values)


def guided_velocity(
    velocity: Velocity,
    labels: Tensor,
    scale: float,
    interval: tuple[float, float],
    null_label: int | None = None,
    channels: int | None = None,
    guide: Velocity | None = None,
) -> Callable[[Tensor, float, float], Tensor]:
    """`guided(x, t, t_of_step)`: the velocity in float64 at a float64 state, with guidance while t_of_step is in the
    interval; the rest as `euler` has it.

    Raises:
        ValueError: classifier-free guidance without a null label.
    """
    if scale > 1 and guide is None and null_label is None:
        raise ValueError(f"guidance scale {scale} needs a null label: this model was trained without label dropping")
    wanted = scale > 1 if guide is None else scale != 1

    def guided(x: Tensor, t: float, t_of_step: float) -> Tensor:
        on = wanted and interval[0] <= t_of_step <= interval[1]
        x_t, y = x.float(), labels
        if on and guide is None:
            x_t, y = torch.cat([x_t, x_t]), torch.cat([y, torch.full_like(y, null_label)])
        t_like_y = torch.full((len(x_t),), t, dtype=torch.float32, device=x.device)
        v = velocity(x_t, t_like_y, y).double()
        if not on:
            return v
        v, weaker = v.chunk(2) if guide is None else (v, guide(x_t, t_like_y, y).double())
        towards = weaker + scale * (v - weaker)
        return towards if channels is None else torch.cat([towards[:, :channels], v[:, channels:]], dim=1)

    return guided
