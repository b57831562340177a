"""Training: what a job resolves to (`plan`), schedules, scaling, dead latents, the loop over n SAEs, checkpoints."""
