"""Prompts from files, and the default set for a checkpoint that comes with none."""

from __future__ import annotations

from cases.prompts.defaults import default_prompts
from cases.prompts.loader import Prompt, PromptError, load_prompts

__all__ = ["Prompt", "PromptError", "default_prompts", "load_prompts"]
