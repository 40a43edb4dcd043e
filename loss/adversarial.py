"""The GAN terms of the VAE: the hinge loss (arXiv 1705.02894) and LeCam regularisation (arXiv 2104.03310)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loss.config import VAELossConfig
from utils.distributed import all_sum, world_size


def adversarial_factor(config: VAELossConfig, step: int) -> float:
    """0 before `discriminator_start`, `discriminator_factor` from that step (counted from 0) on."""
    return config.discriminator_factor if step >= config.discriminator_start else 0.0


def hinge_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """Mean of relu(1 - real) and relu(1 + fake), halved: a scalar."""
    return 0.5 * (F.relu(1.0 - logits_real).mean() + F.relu(1.0 + logits_fake).mean())


class DiscriminatorLoss(nn.Module):
    """The discriminator's loss on its logits of real images and of detached reconstructions.

    The buffers are LeCam's running mean logits, averaged over processes; they belong into the checkpoint.
    """

    def __init__(self, config: VAELossConfig):
        super().__init__()
        self.config = config
        self.register_buffer("real_logits_mean", torch.zeros(1))
        self.register_buffer("fake_logits_mean", torch.zeros(1))

    def forward(self, logits_real: Tensor, logits_fake: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Total and its terms, float32.

        Args:
            logits_real, logits_fake: of two separate calls of the discriminator, any shape.
            step: optimiser step, counted from 0.

        Returns:
            The loss to differentiate, and detached scalars `d_loss`, `logits_real`, `logits_fake`, `lecam_loss`.
        """
        real, fake = logits_real.float(), logits_fake.float()
        lecam = self._lecam(real.mean(), fake.mean())
        total = adversarial_factor(self.config, step) * hinge_loss(real, fake) + lecam
        terms = {"d_loss": total, "logits_real": real.mean(), "logits_fake": fake.mean(), "lecam_loss": lecam}
        return total, {name: term.detach() for name, term in terms.items()}

    def _lecam(self, real: Tensor, fake: Tensor) -> Tensor:
        """Squared excess of each mean logit over the other's running mean, on its own side; then moves those means."""
        weight, decay = self.config.lecam_regularization_weight, self.config.lecam_ema_decay
        if weight == 0:
            return real.new_zeros(())
        distance = F.relu(real - self.fake_logits_mean).square() + F.relu(self.real_logits_mean - fake).square()

        # The running means are those of all processes, so that every process is held to the same ones.
        seen = torch.stack([real.detach(), fake.detach()])
        all_sum(seen)
        seen = seen / world_size()
        # One batch that is not finite would spoil them for good: it leaves them as they are.
        seen = seen.where(seen.isfinite(), torch.cat([self.real_logits_mean, self.fake_logits_mean]))
        # New tensors, not in place: the graph of `distance` holds the old ones.
        self.real_logits_mean = self.real_logits_mean * decay + seen[:1] * (1 - decay)
        self.fake_logits_mean = self.fake_logits_mean * decay + seen[1:] * (1 - decay)
        return weight * distance.mean()
