"""What a discriminator and the autoencoder it judges are trained with: functions of logits.

Hinge losses: Lim & Ye 2017, "Geometric GAN"; non-saturating ones: Goodfellow et al. 2014, section 3.
The weight of the adversarial term: Esser et al. 2021, "Taming transformers for high-resolution image
synthesis", equation 7. LeCam: Tseng et al. 2021, "Regularizing generative adversarial networks under
limited data". Which parameters a loss moves, and from which step on, is up to the caller.

Logits are ``[b, i, j, k]`` (clips, moments, rows, columns); masks ``[b, i]`` say which moments count
(``DiscriminatorConfig.logit_mask``), None that all do. Every logit that counts has the same weight, so
a long clip has more than an image. All results are float32 scalars.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dit_jax.types import Params

Mask = Bool[Array, "b t"] | None


def masked_mean(values: Float[Array, "b t *s"], mask: Mask = None) -> Float[Array, ""]:
    """The mean over what the mask leaves; 0 if that is nothing. What is left out may be NaN."""
    if mask is None:
        return values.astype(jnp.float32).mean()
    wide = mask.reshape(mask.shape + (1,) * (values.ndim - 2))
    kept = jnp.where(wide, values.astype(jnp.float32), 0)
    each = values.size // max(mask.size, 1)
    return kept.sum() / jnp.maximum(mask.sum() * each, 1)


def hinge_discriminator_loss(
    real: Float[Array, "b i j k"], fake: Float[Array, "b i j k"], mask: Mask = None
) -> Float[Array, ""]:
    """Half the mean of ``relu(1 - real) + relu(1 + fake)``: 1 where all logits are 0."""
    return masked_mean(jax.nn.relu(1 - real) + jax.nn.relu(1 + fake), mask) / 2


def hinge_generator_loss(fake: Float[Array, "b i j k"], mask: Mask = None) -> Float[Array, ""]:
    """The mean of ``-fake``."""
    return -masked_mean(fake, mask)


def adaptive_weight(
    reconstruction_gradient: Params,
    adversarial_gradient: Params,
    bound: float = 1e4,
    delta: float = 1e-6,
) -> Float[Array, ""]:
    """The adversarial term's weight under which both terms move the decoder's last layer alike.

    ``|reconstruction| / (|adversarial| + delta)``, at most ``bound``, of the gradients' norms; each is
    that of one loss for the last layer's parameters (an array or a tree of them). No gradient flows
    through the weight.
    """
    norms = [_norm(tree) for tree in (reconstruction_gradient, adversarial_gradient)]
    return jax.lax.stop_gradient(jnp.minimum(norms[0] / (norms[1] + delta), bound))


def _norm(tree: Params) -> jax.Array:
    squares = [jnp.square(leaf.astype(jnp.float32)).sum() for leaf in jax.tree.leaves(tree)]
    return jnp.sqrt(sum(squares, jnp.zeros(())))


def last_layer_gradients(
    reconstruction: Callable[[jax.Array], jax.Array],
    adversarial: Callable[[jax.Array], jax.Array],
    last_layer: Callable[[Params], jax.Array],
    params: Params,
) -> tuple[Params, Params]:
    """The gradients of both losses of a clip for the parameters of the layer that makes the clip.

    ``last_layer(params)`` makes it, of features that it closes over; it runs once, and each loss is
    differentiated down to the clip and no further. For ``adaptive_weight``.
    """
    clips, back = jax.vjp(last_layer, params)
    of_clip = [jax.grad(loss)(clips) for loss in (reconstruction, adversarial)]
    ours, theirs = (back(gradient)[0] for gradient in of_clip)
    return ours, theirs
