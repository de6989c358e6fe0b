"""What other runtimes than transformers, vLLM and SGLang call the tensors of a model, and how these lie there."""
