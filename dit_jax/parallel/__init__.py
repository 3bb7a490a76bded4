"""The mesh, the layout of parameters and activations over it, and attention kernels."""

from dit_jax.parallel.attention import host_attention as host_attention
from dit_jax.parallel.attention import xla_attention as xla_attention
from dit_jax.parallel.host import restart_with_huge_pages as restart_with_huge_pages
from dit_jax.parallel.kernels import choose_attention as choose_attention
from dit_jax.parallel.kernels import choose_dot_general as choose_dot_general
from dit_jax.parallel.mesh import AXES as AXES
from dit_jax.parallel.mesh import MeshConfig as MeshConfig
from dit_jax.parallel.mesh import batch_shards as batch_shards
from dit_jax.parallel.mesh import make_mesh as make_mesh
from dit_jax.parallel.multihost import global_batch as global_batch
from dit_jax.parallel.multihost import initialize as initialize
from dit_jax.parallel.multihost import local_rows as local_rows
from dit_jax.parallel.rules import batch_sharding as batch_sharding
from dit_jax.parallel.rules import like_parameters as like_parameters
from dit_jax.parallel.rules import make_constrain as make_constrain
from dit_jax.parallel.rules import parameter_shardings as parameter_shardings
