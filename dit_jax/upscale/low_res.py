"""The low-resolution clip that a super-resolution model is conditioned on.

Beside the noise, the model sees the clip that it generates with ``factor`` times fewer rows and
columns, enlarged to the clip's own size again, and encoded by the codec if the model generates latents
(Ho et al. 2021, "Cascaded Diffusion Models"). In training that clip is noised to a level that is
uniform in [0, augmentation] for each clip, and that the network reads too (conditioning
augmentation)::

    low_res' = (1 - level) low_res + level eps                                                 (1)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Shaped

from dit_jax.diffusion.objective import token_noise
from dit_jax.files import InputError
from dit_jax.model import Conditioner, Conditioning, Field, ModelConfig, dense
from dit_jax.model.conditioners import per_group
from dit_jax.model.dit import TimeEmbedding
from dit_jax.sampling import Generation, Request
from dit_jax.types import DenoiserInputs, Range, Runtime, Sample, UnitInterval, per_segment
from dit_jax.upscale.resizing import enlarge, shrink

NAME = "low_res"  # of the field, in configs and requests
LEVEL = "_level"  # behind the field's name: the segment field of its noise level
# Set a segment's random numbers apart from its others in training, and the noise of sampling apart
# from that of tokens, whose indices are smaller.
OF_LEVEL, OF_NOISE, OF_SAMPLING = 6, 7, 2**32 - 2


@dataclasses.dataclass(frozen=True)
class LowRes(Conditioner):
    """Super-resolution: see the module."""

    factor: Annotated[int, Range(2)] = 2  # how many times fewer rows and columns the input has
    augmentation: UnitInterval = 0.3  # the highest noise level of it in training

    def field(self, model: ModelConfig) -> Field:
        return Field("token", (model.patch.dim,))

    def build(self, name: str, model: ModelConfig, runtime: Runtime) -> nn.Module:
        return LowResEmbedding(name, model, runtime)

    def derive(self, name: str, sample: Sample) -> Sample:
        video = sample["video"]
        if video.dtype != np.uint8:
            raise InputError(
                f"the model enlarges clips {self.factor} times and the data are latents: give records "
                "of pixels, of which low resolution is made, and the codec (codec.path)."
            )
        low_res = enlarge(shrink(video, self.factor), self.factor)
        return {**sample, "pixel_fields": {**sample.get("pixel_fields", {}), name: low_res}}

    def prepare(self, name: str, keys: Shaped[Array, "b n"], rows: Any, train: bool) -> Any:
        fold = jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (0, None))
        if train:
            uniform = jax.vmap(jax.vmap(lambda k: jax.random.uniform(k, maxval=self.augmentation)))
            level = uniform(fold(keys, OF_LEVEL))
        else:  # A request says how noisy its clip is to be (``sample --augmentation``).
            level = rows.segment_fields.get(name + LEVEL, jnp.zeros(keys.shape))
        low_res = rows.token_fields[name]
        noise_keys = fold(keys, OF_NOISE if train else OF_SAMPLING)
        eps = token_noise(noise_keys, rows.segment_ids, rows.token_ids, low_res.shape[-1])
        at = per_segment(level, rows.segment_ids)[..., None]  # [b, l, 1]
        noised = (1 - at) * low_res + at * eps  # (1)
        return dataclasses.replace(
            rows,
            token_fields={**rows.token_fields, name: noised},
            segment_fields={**rows.segment_fields, name + LEVEL: level},
        )

    def enlarge(
        self,
        requests: Sequence[Request],
        clips: Sequence[tuple[np.ndarray, float]],
        config: Any,
        codec: Any,
        augmentation: float = 0.0,
    ) -> list[Generation]:
        """See ``super_resolution.enlarging``."""
        from dit_jax.upscale.super_resolution import enlarging

        if not 0 <= augmentation <= self.augmentation:
            raise InputError(
                f"--augmentation {augmentation}: give 0 to {self.augmentation}, what the model was "
                f"trained on (model.conditioners.{NAME}.augmentation)."
            )
        return enlarging(requests, clips, config, codec, augmentation)


class LowResEmbedding(nn.Module):
    """One more linear layer of each token's patch, and the embedding of its noise level."""

    field: str
    model: ModelConfig
    runtime: Runtime

    @nn.compact
    def __call__(self, inputs: DenoiserInputs) -> Conditioning:
        run, width = self.runtime, self.model.dit.width
        linear = dense(
            width, ("patch", "embed"), run.dtype, "embedding", dot_general=run.dot_general
        )
        level = per_group(inputs, inputs.segment_fields[self.field + LEVEL])
        return Conditioning(
            tokens=linear(inputs.token_fields[self.field].astype(run.dtype)),
            modulation=TimeEmbedding(self.model.dit, run, name="time")(level),
        )


def factor_of(model: ModelConfig) -> int:
    """How many times a model enlarges clips; 1 if it does not."""
    conditioner = model.conditioners.get(NAME)
    return conditioner.factor if isinstance(conditioner, LowRes) else 1
