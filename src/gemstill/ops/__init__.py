"""Functions of tensors, torch alone: usable in anyone's loop."""
