"""What is on disk, beneath the module `deepspeed`. Imports DeepSpeed nowhere, so that tools can read it without.

| module | holds |
|---|---|
| `files` | the files of a DeepSpeed checkpoint as one checkpoint of the engine, and back |
| `stub` | what stands at the names of those files, and `latest` |
"""
