"""What llama.cpp calls things: tensors, keys and tokens of a GGUF file, as its own converter writes them."""
