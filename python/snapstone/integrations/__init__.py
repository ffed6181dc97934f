"""The engine in trainers that people use. Each module is for one of them, and imports it; nothing else here does.

| module | trainer |
|---|---|
| `torchtitan` | torchtitan |
| `megatron`, `megatron_bridge` | Megatron-core and Megatron-LM, Megatron-Bridge |
| `hf` | transformers' Trainer, and Accelerate beneath it |
| `lightning` | Lightning |
| `deepspeed` | DeepSpeed |
| `torch_checkpointing` | torch_checkpointing |
"""
