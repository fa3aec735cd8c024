"""The pools of this service, and the model that predicts for them."""
