"""Collectives, rendezvous and FSDP2."""
