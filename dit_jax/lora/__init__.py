"""LoRA: low-rank adapters of a frozen model, trained, kept, exchanged as files, and sampled with."""

from dit_jax.lora.adapters import LoraConfig as LoraConfig
from dit_jax.lora.run import LoraRun as LoraRun
from dit_jax.lora.run import lora_run as lora_run
