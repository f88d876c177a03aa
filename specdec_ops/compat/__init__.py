"""Acceptance functions with the signatures that inference engines call today, on the ops of this package.

- `specdec_ops.compat.sgl_kernel`, for sgl-kernel 0.3.21 and SGLang 0.5.23: `tree_speculative_sampling_target_only`,
  `verify_tree_greedy`, `build_tree_kernel_efficient`
- `specdec_ops.compat.flashinfer`, for `flashinfer.sampling` of flashinfer-python 0.7.4: `chain_speculative_sampling`
- `specdec_ops.compat.vllm`, for `vllm.v1.sample.rejection_sampler` of vLLM 0.32.0 and, by name, older ones:
  `rejection_sample`

An engine changes one import. Each module tells what it does otherwise than the original, and why. They run wherever
the ops run, a CPU included, and nothing in them waits for the device.

Two things hold for all of them. Most take *probabilities*, as the originals do; the ops take logits, so the logarithm
is passed, of 0 too: log 0 is -inf, which the ops give no probability. Rows are thereby normalised. This makes one
copy of the probabilities, and softmax made another before: to save both, call the ops with the logits. vLLM's takes
the target's logits, and passes them on. And where the original leaves the random numbers to the caller (sgl-kernel),
they are honoured; where it makes them (FlashInfer, vLLM), they are those of specdec_ops.ops.acceptance.accept, so the
same seeds give other tokens than the original's, of the same distribution.

Nothing here is copied; the interfaces were read from the projects' sources, and are theirs.
"""
