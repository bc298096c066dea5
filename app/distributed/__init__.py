"""Collectives, rendezvous, shutdown and FSDP2."""
