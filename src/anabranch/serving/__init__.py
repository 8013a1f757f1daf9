"""Reasoning inference: slots, paged keys and values, the step on every device, sampling."""
