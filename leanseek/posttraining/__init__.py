"""From a base model to one that reasons: fine-tuning, rewards, GRPO, distillation."""
