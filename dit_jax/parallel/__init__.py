"""The mesh, what lies where on it, attention and matrix products on it, and several processes."""

from dit_jax.parallel.attention import xla_attention as xla_attention
from dit_jax.parallel.context import DEFAULT_ATTENTION as DEFAULT_ATTENTION
from dit_jax.parallel.context import AttentionConfig as AttentionConfig
from dit_jax.parallel.context import choose_attention as choose_attention
from dit_jax.parallel.context import token_multiple as token_multiple
from dit_jax.parallel.context import ulysses_size as ulysses_size
from dit_jax.parallel.matmul import choose_dot_general as choose_dot_general
from dit_jax.parallel.mesh import MeshConfig as MeshConfig
from dit_jax.parallel.mesh import batch_sharding as batch_sharding
from dit_jax.parallel.mesh import batch_shards as batch_shards
from dit_jax.parallel.mesh import make_constrain as make_constrain
from dit_jax.parallel.mesh import make_mesh as make_mesh
from dit_jax.parallel.mesh import parameter_shardings as parameter_shardings
from dit_jax.parallel.mesh import peak_flops as peak_flops
from dit_jax.parallel.mesh import platform as platform
from dit_jax.parallel.mesh import state_shardings as state_shardings
from dit_jax.parallel.mesh import trim_memory as trim_memory
from dit_jax.parallel.mesh import tune_cpu as tune_cpu
from dit_jax.parallel.multihost import PROCESS_HELP as PROCESS_HELP
from dit_jax.parallel.multihost import coordination as coordination
from dit_jax.parallel.multihost import global_batch as global_batch
from dit_jax.parallel.multihost import joined as joined
from dit_jax.parallel.multihost import local_rows as local_rows
from dit_jax.parallel.multihost import take_process_flags as take_process_flags
