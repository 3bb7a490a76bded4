"""Training: tasks and evaluators, the state and step of a run, checkpoints, what is logged."""

from dit_jax.training.checkpoint import CheckpointConfig as CheckpointConfig
from dit_jax.training.checkpoint import Checkpointer as Checkpointer
from dit_jax.training.checkpoint import gather_data_state as gather_data_state
from dit_jax.training.checkpoint import open_run as open_run
from dit_jax.training.step import OptimizerConfig as OptimizerConfig
from dit_jax.training.step import TrainState as TrainState
from dit_jax.training.step import abstract_params as abstract_params
from dit_jax.training.step import abstract_state as abstract_state
from dit_jax.training.step import begin_ema as begin_ema
from dit_jax.training.step import everything as everything
from dit_jax.training.step import init_frozen as init_frozen
from dit_jax.training.step import init_state as init_state
from dit_jax.training.step import learning_rate as learning_rate
from dit_jax.training.step import make_optimizer as make_optimizer
from dit_jax.training.step import make_step as make_step
from dit_jax.training.step import split as split
from dit_jax.training.task import ClipsEvaluator as ClipsEvaluator
from dit_jax.training.task import Evaluation as Evaluation
from dit_jax.training.task import Evaluator as Evaluator
from dit_jax.training.task import HeldOutLoss as HeldOutLoss
from dit_jax.training.task import Parts as Parts
from dit_jax.training.task import Progress as Progress
from dit_jax.training.task import StopSignal as StopSignal
from dit_jax.training.task import Task as Task
from dit_jax.training.task import Work as Work
