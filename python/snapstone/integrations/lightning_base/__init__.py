"""What the modules `lightning` and `pytorch_lightning` share. Imports neither package.

| module | holds |
|---|---|
| `saves` | the saves of one trainer: what is in flight, what waits for it, errors |
| `directory` | a checkpoint directory as the dictionary that Lightning expects of a file |
| `checkpoint_io` | `CheckpointIO` without its base class |
| `sharded` | strategies of sharded models without their base classes |
| `hooks` | the few names of Lightning that take part, replaced and put back |
"""
