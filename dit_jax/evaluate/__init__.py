"""Evaluation: evaluators of runs, and distances of samples to a reference in networks' features."""

from dit_jax.evaluate.distances import Moments as Moments
from dit_jax.evaluate.distances import Statistics as Statistics
from dit_jax.evaluate.distances import feature_statistics as feature_statistics
from dit_jax.evaluate.distances import frechet_distance as frechet_distance
from dit_jax.evaluate.distances import inception_score as inception_score
from dit_jax.evaluate.distances import precision_recall as precision_recall
from dit_jax.evaluate.evaluators import ClassEvaluator as ClassEvaluator
from dit_jax.evaluate.evaluators import RecordsEvaluator as RecordsEvaluator
from dit_jax.evaluate.evaluators import ShapeEvaluator as ShapeEvaluator
from dit_jax.evaluate.evaluators import judge_classes as judge_classes
from dit_jax.evaluate.images import open_images as open_images
from dit_jax.evaluate.images import open_reference as open_reference
from dit_jax.evaluate.images import save_statistics as save_statistics
from dit_jax.evaluate.images import write_npz as write_npz
from dit_jax.evaluate.judge import centroids as centroids
from dit_jax.evaluate.judge import judge as judge
from dit_jax.evaluate.judge import prompt_following as prompt_following
from dit_jax.evaluate.networks import INCEPTION as INCEPTION
from dit_jax.evaluate.networks import VIDEO as VIDEO
from dit_jax.evaluate.networks import NetworkFeatures as NetworkFeatures
