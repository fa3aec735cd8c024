"""A stream of requests, predicted one after the other as a service would."""
