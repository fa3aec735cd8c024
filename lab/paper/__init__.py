"""The paper's tables under our policies."""
