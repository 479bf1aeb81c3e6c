"""What is run: configs, topologies, checkpoints, prompts, strategies and regressions."""
