"""Three steps of each golden training trajectory, on any device, through the very `train_step` of the scripts.

The tolerances are the CPU's. Other kernels add in another order, and AdamW makes whole steps of what that leaves in
gradients near zero: a `tally` of a limit above 1 allows for it.
"""

import contextlib
import copy
from types import SimpleNamespace

import numpy as np
import torch

import train_ldm_only
import train_repae
from loss.adversarial import DiscriminatorLoss
from loss.config import VAELossConfig
from loss.vae import VAELoss
from models.discriminator import PatchDiscriminator
from models.interpolant import Noising
from models.posterior import TrainableVAE
from models.sit import SiT
from models.vae import build_vae
from models.vae_keys import from_ldm, ldm_parameters, to_ldm
from tests.golden.fill import subsample
from tests.support import golden_lightning
from tests.support.golden_data import Tally, filled, load
from training.ema import update_ema
from training.optimizer import Optimizer


class RecordedDraws:
    """The draws of one step, as the fixture holds them."""

    def __init__(self, arrays, step, device):
        names = dict(posterior="posterior_eps", noise="noises", time="raw_time_draw", label="label_drop_uniform")
        of_step = {purpose: arrays[f"in.{name}"][step] for purpose, name in names.items()}
        self.values = {purpose: torch.from_numpy(values).to(device) for purpose, values in of_step.items()}

    def normal(self, purpose, *shape):
        return self.values[purpose].flatten() if purpose == "time" else self.values[purpose]

    uniform = normal


def fake_run(arrays, device):
    """What `train_step` asks of a run, with the recorded draws."""
    return SimpleNamespace(
        device=device,
        draws=lambda step, micro_step: RecordedDraws(arrays, step, device),
        autocast=contextlib.nullcontext,
        synchronised=lambda *modules, when: contextlib.nullcontext(),
    )


def recorded_encoders(arrays, now, device):
    """Encoders that give the recorded targets of the step `now.step`."""
    targets = [key for key in arrays if key.startswith("in.zs.")]
    return [lambda images, key=key: torch.from_numpy(arrays[key][now.step]).to(device) for key in targets]


def build_sit(arrays, meta, device, *, learn_pos_embed):
    sit = SiT(**meta["config"]["sit"], learn_pos_embed=learn_pos_embed)
    manifest = {key: tensor.shape for key, tensor in sit.state_dict().items()}
    sit.load_state_dict(filled(manifest), strict=False)
    sit.set_latent_stats(torch.from_numpy(arrays["in.latents_scale"]), torch.from_numpy(arrays["in.latents_bias"]))
    sit.to(device)
    return sit, *(copy.deepcopy(sit).requires_grad_(False) for _ in range(2))


def adamw(meta, parameters, key="learning_rate"):
    hyper = meta["hyperparameters"]
    return Optimizer(
        list(parameters),
        lr=hyper.get(key, hyper["learning_rate"]),
        betas=tuple(hyper["betas"]),
        eps=hyper["eps"],
        weight_decay=hyper["weight_decay"],
        max_grad_norm=hyper["max_grad_norm"],
        scale_loss=False,
    )


class GradientNorms:
    """Records the norm of every gradient as the optimiser is about to clip."""

    def __init__(self, optimizer):
        self.optimizer, self.step_inside, self.norms = optimizer, optimizer.step, []
        optimizer.step = self.step

    def step(self):
        pairs = zip(self.optimizer.names, self.optimizer.parameters, strict=True)
        self.norms.append({name: p.grad.double().norm().item() for name, p in pairs if p.grad is not None})
        return self.step_inside()


def snapshot(state):
    return {key: value.detach().cpu().clone() for key, value in state.items()}


def check_logs(meta, step, logs, tolerances, tally):
    expected = meta["logs"][step]
    assert expected.keys() == logs.keys()
    for name, value in expected.items():
        rel, absolute = tolerances(step, name)
        found = float(logs[name])
        tally.within("logs", abs(found - value), rel * abs(value) + absolute, (step, name))


def check_deltas(meta, arrays, net, before, after, tally, *, rel, rate=None):
    before, after = before[net], after[net]
    key_biases = set(meta["k_bias_keys"].get(net, ()))
    for name, norm in meta["delta_l2"][net].items():
        if name not in key_biases and after[name].is_floating_point():
            moved = (after[name] - before[name]).double().norm().item()
            tally.within("movements", abs(moved - norm), rel * norm + 1e-12, (net, name))
    if rate is not None:
        layout, samples = meta["delta_samples_layout"][net], arrays[f"delta_samples.{net}"]
        check_samples(layout, samples, key_biases, before, after, rate, tally)


def check_samples(layout, expected, key_biases, before, after, rate, tally):
    """90 % of the subsampled elements within 5 % of the learning rate."""
    start, within = 0, []
    for name, count in zip(layout["names"], layout["counts"], strict=True):
        moved = subsample((after[name] - before[name]).numpy(), count)
        if name not in key_biases:
            within.extend(np.abs(moved - expected[start : start + count]) <= 0.05 * rate)
        start += count
    assert start == len(expected)
    tally.within("elements", 1 - np.mean(within), 0.1)


REPAE_LOG_TOLERANCES = {
    "traj_repae_f8d4_lowlr": lambda step, name: [
        (1e-4, 1e-6),
        (2e-3 if "grad_norm" in name else 5e-4, 1e-5),
        (1e-2 if "grad_norm" in name else 3e-3, 1e-4),
    ][step],
    "traj_repae_f8d4": lambda step, name: [(1e-4, 1e-6), (3e-3, 1e-4), (1e-2, 2e-3)][step],
    "traj_repae_f16d32": lambda step, name: [(1e-4, 1e-6), (3e-3, 1e-4), (1e-2, 2e-3)][step],
}


def check_repae(name, lpips, device, tally=None):
    """Losses, gradients, movements and statistics of three joint steps."""
    tally = tally or Tally()
    arrays, meta = load(name)
    lowlr = name.endswith("lowlr")
    config = VAELossConfig()
    vae = build_vae(meta["config"]["vae"])
    vae.load_state_dict(from_ldm(filled({k: v.shape for k, v in to_ldm(vae).items()}), vae.config))
    discriminator = PatchDiscriminator()
    discriminator.load_state_dict(filled({k: v.shape for k, v in discriminator.state_dict().items()}))
    vae, discriminator, lpips = vae.to(device), discriminator.to(device), copy.deepcopy(lpips).to(device)
    sit, ema, ema_fast = build_sit(arrays, meta, device, learn_pos_embed=True)
    trainable = TrainableVAE(vae)
    now = SimpleNamespace(step=0)
    nets = SimpleNamespace(sit=sit, sit_ddp=sit, ema=ema, vae=trainable.train(), vae_ddp=trainable)
    nets.discriminator = nets.discriminator_ddp = discriminator.train()
    nets.vae_loss, nets.discriminator_loss = VAELoss(config, lpips), DiscriminatorLoss(config).to(device)
    nets.latent_shape, nets.encoders = arrays["in.noises"].shape[2:], recorded_encoders(arrays, now, device)
    optimizers = SimpleNamespace(
        opt=adamw(meta, sit.named_parameters()),
        opt_vae=adamw(meta, ldm_parameters(vae), "vae_learning_rate"),
        opt_disc=adamw(meta, discriminator.named_parameters(), "disc_learning_rate"),
    )
    of_net = {"sit": optimizers.opt, "vae": optimizers.opt_vae, "discriminator": optimizers.opt_disc}
    norms = {net: GradientNorms(optimizer) for net, optimizer in of_net.items()}
    modules = {"sit": sit, "ema": ema, "ema_fast": ema_fast, "discriminator": discriminator}
    states = {name: module.state_dict for name, module in modules.items()} | {"vae": lambda: to_ldm(vae)}
    before = {net: snapshot(state()) for net, state in states.items()}
    noising = Noising(meta["config"]["path"], meta["config"]["weighting"])
    settings = dict(micro_steps=1, noising=noising, proj_coeff=0.5, vae_align_proj_coeff=1.5, ema_decay=0.9999)

    for step in range(3):
        now.step = step
        batch = iter([[torch.from_numpy(arrays[key][step]).to(device) for key in ("in.image_u8", "in.labels")]])
        logs = train_repae.train_step(fake_run(arrays, device), nets, optimizers, batch, step, **settings)
        update_ema(ema_fast, sit, 0.5)
        check_logs(meta, step, logs, REPAE_LOG_TOLERANCES[name], tally)
        for key, buffer in (("bn_mean", sit.bn.running_mean), ("bn_var", sit.bn.running_var)):
            tally.close("latent statistics", buffer, arrays[f"step{step}.{key}"], 2e-3 if lowlr else 2e-2, where=key)
        for net, expected in meta["grad_l2_before_clip"][step].items():
            key_biases = set(meta["k_bias_keys"].get(net, ()))
            for parameter, norm in expected.items():
                if parameter not in key_biases:
                    apart = abs(norms[net].norms[step][parameter] - norm)
                    tally.within("gradient norms", apart, [1e-3, 1e-2, 5e-2][step] * norm, (step, parameter))

    after = {net: snapshot(state()) for net, state in states.items()}
    rel, hyper = 1e-2 if lowlr else 3e-2, meta["hyperparameters"]
    vae_rate = hyper.get("vae_learning_rate", hyper["learning_rate"])
    check_deltas(meta, arrays, "sit", before, after, tally, rel=rel, rate=hyper["learning_rate"])
    check_deltas(meta, arrays, "vae", before, after, tally, rel=rel, rate=vae_rate)
    check_deltas(meta, arrays, "discriminator", before, after, tally, rel=rel)
    check_deltas(meta, arrays, "ema_fast", before, after, tally, rel=rel)
    check_deltas(meta, arrays, "ema", before, after, tally, rel=5e-2)
    assert sit.bn.num_batches_tracked.item() == arrays["final.sit.bn.num_batches_tracked"]
    scale, bias = ema.latent_stats()
    tally.close("extracted statistics", scale, arrays["extracted.latents_scale"], 1e-4)
    tally.close("extracted statistics", bias, arrays["extracted.latents_bias"], 1e-4)


def check_ldm_only(name, device, tally=None):
    """Losses, gradients and movements of three steps of SiT alone."""
    tally = tally or Tally()
    arrays, meta = load(name)
    sit, ema, ema_fast = build_sit(arrays, meta, device, learn_pos_embed=False)
    now, latent_shape = SimpleNamespace(step=0), arrays["in.noises"].shape[2:]
    encoders = recorded_encoders(arrays, now, device)
    nets = SimpleNamespace(sit=sit, sit_ddp=sit, ema=ema, latent_shape=latent_shape, encoders=encoders)
    optimizer = adamw(meta, sit.named_parameters())
    norms = GradientNorms(optimizer)
    states = {"sit": sit.state_dict, "ema": ema.state_dict, "ema_fast": ema_fast.state_dict}
    before = {net: snapshot(state()) for net, state in states.items()}
    noising = Noising(meta["config"]["path"], meta["config"]["weighting"])
    settings = dict(micro_steps=1, noising=noising, proj_coeff=0.5, ema_decay=0.9999)

    for step in range(3):
        now.step = step
        mean_std, labels = (torch.from_numpy(arrays[key][step]).to(device) for key in ("in.moments", "in.labels"))
        batch = iter([(mean_std, torch.zeros(len(labels), 3, 8, 8, dtype=torch.uint8), labels)])
        logs = train_ldm_only.train_step(fake_run(arrays, device), nets, optimizer, batch, step, **settings)
        update_ema(ema_fast, sit, 0.5)
        check_logs(meta, step, logs, lambda step, name: (1e-5, 1e-6), tally)
        key_biases = set(meta["k_bias_keys"]["sit"])
        for parameter, norm in meta["grad_l2_before_clip"][step]["sit"].items():
            if parameter not in key_biases:
                apart = abs(norms.norms[step].get(parameter, 0.0) - norm)
                tally.within("gradient norms", apart, 1e-4 * norm, (step, parameter))

    after = {net: snapshot(state()) for net, state in states.items()}
    check_deltas(meta, arrays, "sit", before, after, tally, rel=1e-4, rate=1e-4)
    check_deltas(meta, arrays, "ema_fast", before, after, tally, rel=1e-4)
    assert torch.equal(after["sit"]["bn.running_var"], before["sit"]["bn.running_var"])
    assert torch.equal(after["sit"]["pos_embed"], before["sit"]["pos_embed"])


def check_lightning(device, tally=None):
    """LightningDiT's own train.py: losses, gradients and movements of three steps, in its time.

    `train_step` sees the network turned, as a function of our t = 1 - s with the opposite velocity; the latents are
    normalised and drawn already. Nothing is clipped there: the norm is out of reach here.
    """
    tally = tally or Tally()
    arrays, meta = load("options/ldit_traj")
    hyper = meta["hyperparameters"] | {"learning_rate": meta["hyperparameters"]["lr"], "max_grad_norm": 1e9}
    sit = golden_lightning.build(meta).to(device)
    one = torch.full((1, sit.in_channels, 1, 1), 1 - sit.bn.eps)
    sit.set_latent_stats(one.rsqrt(), 0 * one)
    ema, ema_fast = (copy.deepcopy(sit).requires_grad_(False) for _ in range(2))

    def turned(x_t, t, labels, drop):
        velocity, projections = sit(x_t, 1 - t, labels, drop)
        return -velocity, projections

    shape = arrays["in.latents"].shape[2:]
    nets = SimpleNamespace(sit=sit, sit_ddp=turned, ema=ema, latent_shape=shape, encoders=[])
    optimizer = adamw({"hyperparameters": hyper}, sit.named_parameters())
    norms = GradientNorms(optimizer)
    before = snapshot(sit.state_dict())
    draws = arrays | {"in.posterior_eps": arrays["in.noise"], "in.noises": arrays["in.noise"]}
    draws["in.raw_time_draw"] = -arrays["in.raw_time_draw"]  # sigmoid(-n) = 1 - sigmoid(n)
    noising = Noising("linear", "lognormal", hyper["class_dropout_prob"])
    settings = dict(micro_steps=1, noising=noising, proj_coeff=0, cosine_coeff=1, ema_decay=hyper["ema_decay"])

    for step in range(3):
        latents, labels = (torch.from_numpy(arrays[key][step]).to(device) for key in ("in.latents", "in.y"))
        batch = iter([(torch.cat([latents, torch.zeros_like(latents)], dim=1), labels)])
        logs = train_ldm_only.train_step(fake_run(draws, device), nets, optimizer, batch, step, **settings)
        update_ema(ema_fast, sit, hyper["ema_fast_decay"])
        names = dict(mse_loss="denoising_loss", cos_loss="cosine_loss", total="sit_loss", grad_norm="grad_norm_sit")
        for theirs, ours in names.items():
            expected = meta["logs"][step][theirs]
            apart = abs(float(logs[ours]) - expected)
            tally.within("logs", apart, 1e-5 * expected + 1e-7, (step, theirs))
        for parameter, norm in meta["grad_l2_before_clip"][step].items():
            apart = abs(norms.norms[step].get(parameter, 0.0) - (norm or 0.0))
            tally.within("gradient norms", apart, 5e-4 * (norm or 0.0), (step, parameter))

    for net, network in (("model", sit), ("ema_fast", ema_fast)):
        after = snapshot(network.state_dict())
        for name, norm in meta["delta_l2"][net].items():
            apart = abs((after[name] - before[name]).double().norm().item() - norm)
            tally.within("movements", apart, 5e-4 * norm, (net, name))
    moved = {name: value - before[name] for name, value in snapshot(sit.state_dict()).items()}
    samples = [subsample(moved[name].numpy(), count) for name, count in meta["delta_samples_layout"]]
    tally.close("elements", np.concatenate(samples), arrays["delta_samples.model"], 0, 0.05 * hyper["lr"])
