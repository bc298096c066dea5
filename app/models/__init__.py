"""Load pretrained models, add adapters, compute losses, generate. PEFT is imported in this room alone."""
