"""Observation of the service: events, decisions, metrics, traces."""
