"""The node: a Flower ClientApp that fine-tunes LoRA adapters and ships compressed updates."""
