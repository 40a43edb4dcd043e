"""One network's optimiser: AdamW, clipping, and under fp16 a gradient scaler of its own."""

import argparse
from collections.abc import Collection, Iterable

import torch
from torch import Tensor, nn

from training.schedule import CONSTANT, Schedule, learning_rate_schedule
from utils.errors import InputError


class Optimizer:
    """AdamW over named parameters, with gradient clipping and loss scaling.

    REPA-E has three of these. Each has its own gradient scaler, because an overflow in one network's gradients says
    nothing about the scale that suits the others (accelerate's single scaler would lower all, and its clipping unscales
    every optimiser).

    Args:
        parameters: (name, parameter) pairs in the order of the checkpoint's optimiser state.
        lr, betas, eps, weight_decay: AdamW's.
        max_grad_norm: gradients are clipped to this total norm.
        scale_loss: whether to scale losses against fp16 underflow.
        schedule: the share of `lr` at each step (`set_learning_rates`).
    """

    def __init__(
        self,
        parameters: list[tuple[str, nn.Parameter]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        max_grad_norm: float,
        scale_loss: bool,
        schedule: Schedule = CONSTANT,
    ):
        self.names = [name for name, _ in parameters]
        self.parameters = [parameter for _, parameter in parameters]
        self.lr, self.schedule, self.max_grad_norm = lr, schedule, max_grad_norm
        device = self.parameters[0].device.type
        # On CUDA fused: there a bad gradient skips the step on the device, without a look at it from the host.
        fused = device == "cuda" or None
        self.adamw = torch.optim.AdamW(
            self.parameters, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=fused
        )
        self.scaler = torch.amp.GradScaler(device, enabled=scale_loss)

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()

    def step(self) -> Tensor:
        """Clip, step, clear the gradients; returns the gradient norm before clipping.

        Where that norm is not finite, parameters and moments stay as they are. All processes do alike: they have the
        same gradients.
        """
        self.scaler.unscale_(self.adamw)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        if self.scaler.is_enabled():
            self.scaler.step(self.adamw)
            self.scaler.update()
        else:
            self._step_unless_bad(norm)
        self.adamw.zero_grad(set_to_none=True)
        return norm

    def _step_unless_bad(self, norm: Tensor) -> None:
        if self.adamw.param_groups[0]["fused"]:
            self.adamw.found_inf = (~norm.isfinite()).float()  # the kernel's own switch, which the scaler uses too
            self.adamw.step()
        elif norm.isfinite():
            self.adamw.step()

    def state_dict(self, shapes: dict[str, torch.Size] | None = None) -> dict:
        """torch's state dict; moments are viewed in the `shapes` that the checkpoint gives to these parameters."""
        state = self.adamw.state_dict()
        if shapes is not None:
            entries = {index: _reshaped(entry, shapes[self.names[index]]) for index, entry in state["state"].items()}
            state = {**state, "state": entries}
        return state

    def load_state_dict(self, saved: dict, names: list[str], what: str, *, fresh: Collection[str] = ()) -> None:
        """Take over saved moments by parameter name.

        Args:
            saved: a `state_dict`, ours or of a public checkpoint.
            names: the parameter name of each index in `saved`.
            what: names the state in errors.
            fresh: parameters whose moments start anew.
        """
        index_of = {name: index for index, name in enumerate(names)}
        entries = {}
        for index, (name, parameter) in enumerate(zip(self.names, self.parameters, strict=True)):
            if name in fresh or not parameter.requires_grad:  # a frozen one has no use for moments
                continue
            entry = saved["state"].get(index_of.get(name))
            if entry is None:
                if saved["state"]:  # none has moments before the first step
                    raise InputError(f"{what} lacks the moments of {name}")
                continue
            if entry["exp_avg"].numel() != parameter.numel():
                found = f"the moments of {name} have shape {tuple(entry['exp_avg'].shape)}"
                raise InputError(f"{what}: {found}; the network's parameter has {tuple(parameter.shape)}")
            entries[index] = _reshaped(entry, parameter.shape)
        # Hyperparameters are those of this run, not of the checkpoint: a resumed run may lower its learning rate.
        self.adamw.load_state_dict({"state": entries, "param_groups": self.adamw.state_dict()["param_groups"]})


def _reshaped(entry: dict, shape: torch.Size) -> dict:
    return {key: value.reshape(shape) if key.startswith("exp_avg") else value for key, value in entry.items()}


def adamw_settings(args: argparse.Namespace, *, scale_loss: bool) -> dict:
    """What the optimisers of a run have in common; the learning rates differ, but move alike.

    Raises:
        InputError: a schedule whose flags do not go together.
    """
    return dict(
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        weight_decay=args.adam_weight_decay,
        max_grad_norm=args.max_grad_norm,
        scale_loss=scale_loss,
        schedule=learning_rate_schedule(args),
    )


def set_learning_rates(optimizers: Iterable[Optimizer], step: int) -> dict[str, Tensor]:
    """Give every optimiser its learning rate of this step, counted from 0.

    Returns:
        `lr` for the log, that of the first optimiser, on its device; nothing where the rates stay as they are.
    """
    first, *_ = optimizers = list(optimizers)
    if not first.schedule.moves:
        return {}
    for optimizer in optimizers:
        for group in optimizer.adamw.param_groups:
            group["lr"] = optimizer.lr * optimizer.schedule(step)
    # Filled there: a copy would make the host wait for the device.
    return {"lr": torch.full((), first.lr * first.schedule(step), device=first.parameters[0].device)}


def checkpoint_entries(optimizers: dict[str, Optimizer], shapes: dict[str, dict[str, torch.Size]]) -> dict:
    """What a checkpoint holds of its optimisers, which are called as in the checkpoint: `opt`, `opt_vae`, `opt_disc`.

    Args:
        shapes: for an optimiser, the shapes that the checkpoint gives to its parameters where they differ from ours.
    """
    return {
        **{key: optimizer.state_dict(shapes.get(key)) for key, optimizer in optimizers.items()},
        "scalers": {key: optimizer.scaler.state_dict() for key, optimizer in optimizers.items()},
        "param_names": {key: optimizer.names for key, optimizer in optimizers.items()},
    }


def restore(optimizers: dict[str, Optimizer], checkpoint: dict, path: str, *, fresh: Collection[str] = ()) -> None:
    """Load the optimisers' states of a checkpoint, ours (by name) or public (by the known order).

    Args:
        fresh: parameters whose moments start anew.
    """
    for key, optimizer in optimizers.items():
        # Public order: SiT's own, LDM's for the VAE, and the loss module's, whose first parameter is `logvar`.
        public_names = ["logvar", *optimizer.names] if key == "opt_disc" else optimizer.names
        names = checkpoint.get("param_names", {}).get(key, public_names)
        if not isinstance(checkpoint[key].get("state"), dict):
            raise InputError(f"{path}: {key} is no optimiser's state dict")
        optimizer.load_state_dict(checkpoint[key], names, f"{path}: {key}", fresh=fresh)
        if (scaler := checkpoint.get("scalers", {}).get(key)) and optimizer.scaler.is_enabled():
            optimizer.scaler.load_state_dict(scaler)
