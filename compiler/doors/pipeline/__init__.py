"""The door for pipelines: options, compilation into stages, runners on an engine, sessions and training steps."""
