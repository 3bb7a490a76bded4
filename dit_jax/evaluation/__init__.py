"""Evaluation: what can be measured of made clips without another network."""

from dit_jax.evaluation.classifier import judge_classes as judge_classes
from dit_jax.evaluation.fidelity import mean_psnr as mean_psnr
from dit_jax.evaluation.fidelity import psnr as psnr
from dit_jax.evaluation.judge import Verdict as Verdict
from dit_jax.evaluation.judge import judge as judge
from dit_jax.evaluation.judge import prompt_following as prompt_following
