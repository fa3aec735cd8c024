"""What the service tells of itself: events, decisions, metrics, traces."""
