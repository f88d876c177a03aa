"""What all ops share and no op is named in: checks, memory, torch.library, choice of backend, the compiled module."""
