"""Gradients of single examples, clipped: by samples, by ghost norms, one by one."""
