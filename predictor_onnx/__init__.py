"""Length predictors: trained (train), written (export), scored (evaluate), the default (model)."""
