# shardxform without a Python of your own.
#
#   docker build -t shardxform .                                             moves and rounds weights: no torch
#   docker build -t shardxform --build-arg EXTRAS=fast,plot,hub,models .     also runs models, on a CPU or a CUDA GPU
#
# The default builds of torch for Linux bring CUDA. --build-arg TORCH_INDEX=URL takes torch from another package index,
# such as PyTorch's own of CPU builds, which are a tenth of the size.
#
#   docker run --rm --user "$(id -u):$(id -g)" -v "$PWD:/data" shardxform inspect Qwen3.5-35B-A3B
#   docker run --rm --gpus all ...                                           with the second, and the NVIDIA runtime
FROM python:3.12-slim

ARG EXTRAS=fast,plot,hub
ARG TORCH_INDEX=

WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY shardxform ./shardxform
RUN if [ -n "$TORCH_INDEX" ]; then pip install --no-cache-dir --index-url "$TORCH_INDEX" torch; fi \
    && pip install --no-cache-dir ".[$EXTRAS]" \
    && rm -rf /src/*

# Whoever runs it owns what it writes; compiled kernels are kept in the home directory of that user.
ENV HOME=/tmp
WORKDIR /data
ENTRYPOINT ["shardxform"]
CMD ["--help"]
