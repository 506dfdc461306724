"""How members that run produce text together: one file per way of decoding."""
