"""The pools that this service has open, and the model that predicts for them."""
