"""Delta saves: a state of which nothing, a little or everything has changed since the checkpoint before."""
