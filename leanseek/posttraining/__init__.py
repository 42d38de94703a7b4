"""From a base model to one that follows and reasons: fine-tuning, rewards, GRPO, sampling for distillation."""
