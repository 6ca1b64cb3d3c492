"""The half of the renderers that runs inside the sandbox, where the text of a model is executed."""
