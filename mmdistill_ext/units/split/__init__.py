"""How a head's own loss is split into simple and hard samples (FIT)."""
