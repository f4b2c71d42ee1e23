"""Training: TRL's SFTTrainer, extended; checkpoints; guards; progress."""
